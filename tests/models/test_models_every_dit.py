"""Every transformer class of diffusers, small: converted, exact again, routed, trained.

The counts, what is named and which lists of blocks form groups are compared with what
`benchmarks/every_dit.py` has written for docs/models.md.
"""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
from every_dit import converted, error, mob
from helpers.small_dits import LEFT_OUT, SMALL, build, tensors
from torch import nn

from d2m_models import moe_layers, set_top_k

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "every_dit.json"
COMMITTED = json.loads(FILE.read_text())
# Linears of blocks that narrow and end no FFN
OTHER_PARTS = ("attn", "attention", "norm", "emb", "film", "skip_linear", "audio_heads")
NO_BACKWARD = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")


def test_no_class_of_diffusers_is_forgotten():
    import diffusers.models.transformers as package
    from diffusers import ModelMixin

    names = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        names |= {
            name
            for name, kind in vars(module).items()
            if isinstance(kind, type)
            and issubclass(kind, ModelMixin)
            and kind.__module__ == module.__name__
        }
    rows = COMMITTED["rows"]
    assert names == SMALL.keys() | LEFT_OUT.keys() and rows.keys() == SMALL.keys()
    assert sum(bool(row["converted"]) and not row["skipped"] for row in rows.values()) >= 56


def gradients(model, inputs, linears) -> dict[str, bool]:
    """Whether the model's output depends on each of these Linears."""
    model.zero_grad()
    sum(y.square().sum() for y in tensors(model(**inputs))).backward()
    return {
        name: linear.weight.grad is not None and bool(linear.weight.grad.any())
        for name, linear in linears.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_class(name):
    model, inputs, dense, report = converted(name)
    row = COMMITTED["rows"][name]
    assert (len(report["converted"]), report["skipped"]) == (row["converted"], row["skipped"])
    layers = moe_layers(model)
    assert set(layers) == set(report["converted"])

    ends = {id(layer.linears()[1]) for layer in layers.values()}
    silent = [
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear)
        and m.in_features > m.out_features
        and any(part.isdigit() for part in path.split("."))
        and id(m) not in ends
        and not path.endswith(".router")
        and not any(path.startswith(skipped) for skipped in report["skipped"])
        and not any(word in path.lower() for word in OTHER_PARTS)
    ]
    assert not silent, "an FFN may end here"
    if not layers:
        return
    set_top_k(model, "dense")
    assert error(model, inputs, dense) < 1e-5
    set_top_k(model, 2)
    assert 1e-4 < error(model, inputs, dense) < 1

    downs = {path: layer.linears()[1] for path, layer in layers.items()}
    routers = {path: layer.router for path, layer in layers.items()}
    if name in NO_BACKWARD:
        with pytest.raises(NotImplementedError, match="FlexAttention does not support backward"):
            gradients(model, inputs, downs)
        return
    plain, plain_inputs = build(name)
    needed = gradients(
        plain, plain_inputs, {p: plain.get_submodule(_path(model, d)) for p, d in downs.items()}
    )
    assert any(needed.values())
    assert gradients(model, inputs, downs) == needed == gradients(model, inputs, routers)


def _path(model, module):
    return next(path for path, m in model.named_modules() if m is module)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_groups_of_every_class(name):
    assert mob(name) == COMMITTED["rows"][name]["mob"]
