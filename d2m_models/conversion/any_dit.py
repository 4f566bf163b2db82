"""Turns the FFNs of a model it has never seen into MoE layers, in place.

Shapes: D width, F neurons. FFNs are found by their form, see `forms.py`; those of FLUX.2's
single-stream blocks, which are fused with attention, by their class, see `flux2.py`. What cannot be
converted is named and left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2m_models.config import MoEConfig
from d2m_models.conversion.flux2 import convert_parallel, parallel_attentions
from d2m_models.conversion.forms import NotConvertible, candidates, converted
from d2m_models.moe import ExpertLayer
from d2m_models.partition import check_orders, permute_neurons
from d2m_models.topk import moe_layers

logger = logging.getLogger(__name__)


@torch.no_grad()
def convert(
    model: nn.Module, config: MoEConfig, neuron_order: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Converts every FFN of `model` in place and returns it; for FLUX use `convert_flux`.

    Args:
        model: a model whose blocks hold ordinary feed-forward modules (diffusers' `FeedForward`,
            timm's `Mlp`, a Sequential, ...), with dropout 0 inside them.
        config: the experts; an FFN whose size does not fit is left alone.
        neuron_order: {FFN name: LongTensor[F], new position -> dense neuron}; dense order without.

    Returns:
        The same model; `model.d2m_report` is {"converted": [names], "skipped": {name: reason}}.

    Raises:
        ValueError: no FFN could be converted (the message names those that were skipped), or
            neuron_order names something else.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config must be a MoEConfig, got {type(config).__name__}")
    if hasattr(model, "single_transformer_blocks") and hasattr(model, "time_text_embed"):
        raise TypeError(f"{type(model).__name__} has fused single-stream FFNs; use convert_flux")
    if moe_layers(model):
        raise ValueError("model is already converted")
    found: dict[str, ExpertLayer] = {}
    skipped: dict[str, str] = {}
    orders = dict(neuron_order or {})
    for name, ffn in candidates(model):
        try:
            found[name] = converted(ffn, config)
        except NotConvertible as reason:
            skipped[name] = str(reason)
    fused: dict[str, nn.Module] = {}
    for name, attention in parallel_attentions(model):
        try:
            config.sizes(attention.query_dim, attention.mlp_hidden_dim)
            fused[name] = attention
        except ValueError as reason:
            skipped[name] = str(reason)
    names = [*found, *fused]
    unknown = sorted(set(orders) - set(names))
    if unknown:
        raise ValueError(f"neuron_order names no convertible FFN: {unknown}; there are {names}")
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no FFN that can be converted; skipped: {skipped}"
        )
    widths = {name: layer.neuron_order.numel() for name, layer in found.items()}
    widths |= {name: attention.mlp_hidden_dim for name, attention in fused.items()}
    checked = check_orders(orders, widths)
    # From here on nothing fails, so a model is never left half converted.
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name, attention in fused.items():
        found[name] = convert_parallel(attention, config)
    for name, order_F in checked.items():
        _permute(found[name], order_F)
    for name, reason in skipped.items():
        logger.warning("left %s untouched: %s", name, reason)
    model.d2m_report = {"converted": names, "skipped": skipped}
    return model


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
        rows = 2 if layer.activation in ("geglu", "swiglu") else 1
        idle += neurons * (rows * up.in_features + down.out_features)
        idle += neurons * rows * (up.bias is not None)
    return ParameterCount(total, total - idle)


def _permute(layer: ExpertLayer, order_F: Tensor) -> None:
    """Puts the neurons of a fresh layer in the given order."""
    layer.neuron_order.copy_(order_F)
    (up, down), gate = layer.linears(), layer.gate_linear()
    hidden, columns = order_F.numel(), down.in_features - order_F.numel()
    stacks = 2 if gate is None and layer.activation in ("geglu", "swiglu") else 1
    for linear in (up, gate):
        for tensor in () if linear is None else (linear.weight, linear.bias):
            if tensor is not None:
                first = tensor.shape[0] - stacks * hidden  # fused: q, k and v come first
                tensor.copy_(permute_neurons(tensor, order_F, 0, first, stacks))
    down.weight.copy_(permute_neurons(down.weight, order_F, 1, columns))
