"""What a forward returns beside the sample, and how to record the same of a dense teacher.

Shapes: B samples, I image tokens, X text tokens, D width, m blocks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from d2m_kernels import Routing
from d2m_models.config import AnyMoEConfig, FluxMoEConfig, group_names, named_blocks
from d2m_models.mob import MoBRouting
from d2m_models.topk import moe_layers

Features = dict[str, tuple[Tensor, ...]]


@dataclass
class FluxMoEAux:
    """What distillation needs of a forward; tensors carry gradient.

    Attributes:
        features: block name ("transformer_blocks.3", "single_transformer_blocks.7"), or group name
            ("mob.double.0") in place of the group's blocks, -> (image [B, I, D], text [B, X, D]).
        routing: MoE layer name ("transformer_blocks.3.ff", "single_transformer_blocks.7") ->
            Routing over that layer's tokens, samples in order (inside a group: those that ran it).
        mob: group name -> MoBRouting.
    """

    features: Features = field(default_factory=dict)
    routing: dict[str, Routing] = field(default_factory=dict)
    mob: dict[str, MoBRouting] = field(default_factory=dict)


@dataclass
class FluxMoEOutput(Transformer2DModelOutput):
    """`sample`, and `aux` when the forward was called with `output_aux=True`."""

    aux: FluxMoEAux | None = None


@contextmanager
def watched(
    model: nn.Module, see: Callable[[str, dict, Any], None], names: Iterable[str] | None = None
) -> Iterator[None]:
    """Inside, every block that has run is told: see(name, keyword arguments, output).

    Args:
        names: of the blocks; without it those of `named_blocks`.
    """

    def tell(_module, _args, kwargs, output, name):
        see(name, kwargs, output)

    blocks = named_blocks(model) if names is None else {n: model.get_submodule(n) for n in names}
    handles = [
        block.register_forward_hook(partial(tell, name=name), with_kwargs=True)
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _streams(output: Any) -> tuple[Tensor, ...]:
    """A block's streams of tokens; of FLUX.1's (text, image) the image comes first."""
    found = output if isinstance(output, tuple) else (output,)
    return tuple(t for t in reversed(found) if isinstance(t, Tensor))


@contextmanager
def block_features(
    model: nn.Module,
    config: FluxMoEConfig | AnyMoEConfig | None = None,
    names: Iterable[str] | None = None,
) -> Iterator[Features]:
    """Records the block outputs of a (dense) model under the names `FluxMoEAux.features` uses.

        with block_features(teacher, student.d2m_config, named_blocks(student)) as features:
            teacher(...)

    Each forward overwrites the entries. With the student's `config`, the group entries hold the
    output of the group's last block, the teacher feature of the paper's third stage. `names` are
    needed for all models but FLUX.1.
    """
    aliases = {} if config is None else {n[-1]: g for g, n in group_names(config).items()}
    features: Features = {}

    def record(name, _kwargs, output):
        features[name] = features[aliases.get(name, name)] = _streams(output)

    with watched(model, record, names):
        yield features


def run_with_aux(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, FluxMoEAux]:
    """A converted model's output, of whatever family, and what distillation needs of the forward.

    FLUX.1's forward gives it by itself. Others are watched: a layer's routing is what its
    `run_experts` returns, a group's feature what its last block hands on.
    """
    if isinstance(model.d2m_config, FluxMoEConfig):
        out = model(**inputs, output_aux=True)
        return out, out.aux
    aux, groups = FluxMoEAux(), group_names(model.d2m_config)
    layers = moe_layers(model)

    def routed(name: str, run: Callable) -> Callable:
        def keep(*args, **kwargs):
            y, aux.routing[name] = run(*args, **kwargs)
            return y, aux.routing[name]

        return keep

    def chosen(_router, _args, output, name):
        aux.mob[name] = output[2]

    routers = zip(groups, getattr(model, "mob_routers", ()), strict=True)
    handles = [r.register_forward_hook(partial(chosen, name=name)) for name, r in routers]
    for name, layer in layers.items():
        layer.run_experts = routed(name, layer.run_experts)
    try:
        with block_features(model, model.d2m_config) as features:
            out = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            del layer.run_experts
    grouped = {name for names in groups.values() for name in names}
    aux.features = {name: kept for name, kept in features.items() if name not in grouped}
    return out, aux
