"""A DiT of any class as teacher and student: converted as a copy, saved by diffusers, loaded again.

Shapes: D width, F neurons.

The saved configuration is the dense class's, with one more entry, from which the model is built
again without a forward:

    d2m: {structure: `AnyMoEConfig`, groups: [how tokens go through each MoB group]}
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2m_kernels.activations import is_gated
from d2m_models.config import AnyMoEConfig, GroupsConfig, MoBConfig
from d2m_models.conversion.any_dit import convert
from d2m_models.conversion.any_mob import GroupedBlock, add_mob, regroup
from d2m_models.moe import ExpertLayer
from d2m_models.topk import moe_layers

ENTRY = "d2m"


def block_of(name: str) -> str:
    """ "transformer_blocks.3.ff" -> "transformer_blocks.3"."""
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


def neuron_places(name: str, layer: ExpertLayer) -> list[tuple[str, int, int]]:
    """(parameter, dimension, first of F rows or columns) of all that belongs to neurons.

    A gated w1 in one Linear has two such stacks; fused Linears have others' rows or columns first.
    """
    (up, down), gate, hidden = layer.linears(), layer.gate_linear(), layer.neuron_order.numel()
    names = {id(m): f"{name}.{n}" for n, m in layer.named_modules()}
    stacks = 2 if gate is None and is_gated(layer.activation) else 1
    found = []
    for linear in (up,) if gate is None else (up, gate):
        first = linear.out_features - stacks * hidden
        for kind in ("weight", "bias"):
            if getattr(linear, kind) is not None:
                starts = [first + i * hidden for i in range(stacks)]
                found += [(f"{names[id(linear)]}.{kind}", 0, start) for start in starts]
    return [*found, (f"{names[id(down)]}.weight", 1, down.in_features - hidden)]


def ffns(dense: nn.Module, structure: AnyMoEConfig) -> dict[str, ExpertLayer]:
    """The FFNs that `convert` finds, as layers that share the dense model's parameters."""
    shared = {id(t): t for t in (*dense.parameters(), *dense.buffers())}
    return moe_layers(convert(copy.deepcopy(dense, shared), structure.moe))


def convert_any(
    dense: nn.Module,
    structure: AnyMoEConfig,
    neuron_order: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """`convert` on a copy, without MoB groups; the routers come from the seed.

    The result has `d2m_config` and `d2m_blocks`, the names of the blocks whose FFNs are converted,
    and diffusers saves it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = convert(copy.deepcopy(dense), structure.moe, neuron_order)
    return _described(model, AnyMoEConfig(structure.moe))


def group_any(model: nn.Module, mob: GroupsConfig, inputs: Mapping[str, Any], seed: int = 0):
    """A copy of a model of `convert_any` with MoB groups and fresh block routers.

    Args:
        inputs: of one forward, two samples or more, see `add_mob`.
    """
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_mob(model, inputs=inputs, **mob.to_dict())
    return _described(model, AnyMoEConfig(model.d2m_config.moe, mob))


def _described(model: nn.Module, structure: AnyMoEConfig) -> nn.Module:
    model.d2m_config = structure
    model.d2m_blocks = tuple(dict.fromkeys(block_of(name) for name in moe_layers(model)))
    leads = [m for m in model.modules() if isinstance(m, GroupedBlock) and m.leads]
    entry = {"structure": structure.to_dict(), "groups": [m.group.to_dict() for m in leads]}
    if hasattr(model, "register_to_config"):  # a model of diffusers, which saves it
        model.register_to_config(**{ENTRY: entry})
    return model


@torch.no_grad()
def load_any(kind: type, folder: Any, **options: Any) -> nn.Module:
    """A saved model of `convert_any` or `group_any`, of the dense diffusers class `kind`.

    Args:
        options: of `from_pretrained`.
    """

    def build(self, *args, **kwargs):
        kind.__init__(self, *args, **kwargs)
        structure = AnyMoEConfig.from_dict(entry["structure"])
        convert(self, structure.moe)
        if structure.mob is not None:
            regroup(self, _members(structure.mob), entry["groups"])
        _described(self, structure)

    entry = kind.load_config(folder)[ENTRY]
    own = {"__init__": functools.wraps(kind.__init__)(build)}
    fp32 = [*(kind._keep_in_fp32_modules or ()), "router", "mob_routers"]
    built = type(kind.__name__, (kind,), {**own, "_keep_in_fp32_modules": fp32})
    model, info = built.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:3])}")
    model.__class__ = kind
    return model.eval()


def _members(mob: GroupsConfig) -> list[tuple[str, MoBConfig, tuple[int, ...]]]:
    """(list of blocks, how a group chooses, its blocks) of every group."""
    return [
        (name, MoBConfig(groups, (), mob.active, mob.alpha, mob.select), tuple(group))
        for name, groups in mob.groups.items()
        for group in groups
    ]
