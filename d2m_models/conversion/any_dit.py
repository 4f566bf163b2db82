"""Turns the FFNs of a model it has never seen into MoE layers, in place.

Shapes: D width, F neurons. FFNs are found by what they compute, as a module of their own
(`forms.py`) or among a block's own Linears (`in_block.py`); those of FLUX.2's single-stream blocks,
whose up and down Linears attention shares, by their class (`flux2.py`). What cannot be converted is
named and left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2m_kernels.activations import is_gated
from d2m_models.config import MoEConfig, MoEShare
from d2m_models.conversion.flux2 import convert_parallel, parallel_attentions
from d2m_models.conversion.forms import (
    NotConvertible,
    candidates,
    converted,
    is_repeated,
    others,
)
from d2m_models.conversion.in_block import convert_in_block, find_in_block, may_hold_ffn
from d2m_models.moe import ExpertLayer
from d2m_models.partition import check_orders, permute_neurons
from d2m_models.topk import moe_layers

logger = logging.getLogger(__name__)


class _Found(NamedTuple):
    """F of an FFN that can be converted, and what does it."""

    hidden: int
    convert: Callable[[], ExpertLayer]


@torch.no_grad()
def convert(
    model: nn.Module,
    config: MoEConfig | MoEShare,
    neuron_order: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Converts every FFN of `model`'s repeated blocks in place and returns the model.

    For FLUX.1 use `convert_flux`, whose result diffusers saves and loads.

    Args:
        model: a model whose blocks, in lists, hold ordinary FFNs (diffusers' `FeedForward`, timm's
            `Mlp`, a Sequential, Linears of the block's own, ...), with dropout 0 inside them.
        config: the experts. An FFN whose size does not fit a `MoEConfig` is left alone; a
            `MoEShare` fits FFNs of any size.
        neuron_order: {FFN name: LongTensor[F], new position -> dense neuron}; dense order without.

    Returns:
        The same model; `model.d2m_report` is {"converted": [names], "skipped": {name: reason}}.

    Raises:
        ValueError: no FFN could be converted (the message names those that were skipped), or
            neuron_order names something else.
    """
    if not isinstance(config, (MoEConfig, MoEShare)):
        raise TypeError(f"config must be a MoEConfig or MoEShare, got {type(config).__name__}")
    if any(kind.__name__ == "FluxTransformer2DModel" for kind in type(model).__mro__):
        raise TypeError(f"for {type(model).__name__} use convert_flux, whose result can be saved")
    if moe_layers(model):
        raise ValueError("model is already converted")
    if hasattr(model, "mob_routers"):
        raise ValueError("model has MoB groups; call convert before add_mob")
    found, skipped = _find(model, config)
    orders = dict(neuron_order or {})
    unknown = sorted(set(orders) - set(found))
    if unknown:
        raise ValueError(f"neuron_order names no convertible FFN: {unknown}; there are {[*found]}")
    if not found:
        model.d2m_report = {"converted": [], "skipped": skipped}
        raise ValueError(
            f"{type(model).__name__} has no FFN that can be converted in a list of blocks; "
            f"skipped: {skipped}"
        )
    checked = check_orders(orders, {name: ffn.hidden for name, ffn in found.items()})
    # From here on nothing fails, so a model is never left half converted.
    for name, ffn in found.items():
        layer = ffn.convert()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        if name in checked:
            _permute(layer, checked[name])
    for name, reason in skipped.items():
        logger.warning("left %s untouched: %s", name, reason)
    model.d2m_report = {"converted": [*found], "skipped": skipped}
    return model


def _find(
    model: nn.Module, config: MoEConfig | MoEShare
) -> tuple[dict[str, _Found], dict[str, str]]:
    """All FFNs by name: those that can be converted, and why the others cannot."""
    found: dict[str, _Found] = {}
    skipped: dict[str, str] = others(model)

    def consider(name: str, look: Callable[[], _Found | None]) -> None:
        try:
            if (ffn := look()) is not None:
                found[name] = ffn
        except NotConvertible as reason:
            skipped[name] = str(reason)

    def alone(ffn: nn.Module) -> _Found:
        layer = converted(ffn, config)
        return _Found(layer.neuron_order.numel(), lambda: layer)

    def own(block: nn.Module) -> _Found | None:
        place = find_in_block(block, config)
        return place and _Found(place.hidden, lambda: convert_in_block(block, place, config))

    def parallel(attention: nn.Module) -> _Found:
        try:
            config.sizes(attention.query_dim, attention.mlp_hidden_dim)
        except ValueError as reason:
            raise NotConvertible(str(reason)) from None
        return _Found(attention.mlp_hidden_dim, lambda: convert_parallel(attention, config))

    modules = dict(candidates(model))
    for name, ffn in modules.items():
        consider(name, lambda ffn=ffn: alone(ffn))
    for name, block in model.named_modules():
        if name not in modules and is_repeated(name) and may_hold_ffn(block):
            consider(name, lambda block=block: own(block))
    for name, attention in parallel_attentions(model):
        consider(name, lambda attention=attention: parallel(attention))
    return found, skipped


class ParameterCount(NamedTuple):
    """Parameters held, and those that one token meets."""

    total: int
    activated: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Of any converted model: all, and all but the neurons of experts a token does not use."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        if layer.top_k == "dense":
            continue
        up, down = layer.linears()
        neurons = (layer.num_experts - layer.top_k) * layer.expert
        rows = 2 if is_gated(layer.activation) else 1
        idle += neurons * (rows * up.in_features + down.out_features)
        idle += neurons * rows * (up.bias is not None)
    return ParameterCount(total, total - idle)


def _permute(layer: ExpertLayer, order_F: Tensor) -> None:
    """Puts the neurons of a fresh layer in the given order."""
    layer.neuron_order.copy_(order_F)
    (up, down), gate = layer.linears(), layer.gate_linear()
    hidden, columns = order_F.numel(), down.in_features - order_F.numel()
    stacks = 2 if gate is None and is_gated(layer.activation) else 1
    for linear in (up, gate):
        for tensor in () if linear is None else (linear.weight, linear.bias):
            if tensor is not None:
                first = tensor.shape[0] - stacks * hidden  # fused: q, k and v come first
                tensor.copy_(permute_neurons(tensor, order_F, 0, first, stacks))
    down.weight.copy_(permute_neurons(down.weight, order_F, 1, columns))
