"""Turns the FFNs of a model it has never seen into MoE layers, in place.

Shapes: D width, F neurons. An FFN is found by its form, two Linears D -> F (or 2F, gated) and
F -> D in one module, and accepted only if that module, with random weights, computes

    down(act(up(x)))     or, gated,     down(u * act(g)),  [u, g] = up(x)

with one of the activations `moe_ffn` knows; what computes anything else is named and left alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_models.config import MoEConfig
from d2m_models.moe import MoEFeedForward, moe_layers
from d2m_models.partition import check_order, permute_neurons

logger = logging.getLogger(__name__)

_POINTWISE = {
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward of their own
_GATED = {"geglu": F.gelu, "swiglu": F.silu}


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
    if hasattr(model, "single_transformer_blocks") and type(model).__name__.startswith("Flux"):
        raise TypeError(f"{type(model).__name__} has fused single-stream FFNs; use convert_flux")
    if moe_layers(model):
        raise ValueError("model is already converted")
    found: dict[str, MoEFeedForward] = {}
    skipped: dict[str, str] = {}
    orders = dict(neuron_order or {})
    for name, ffn in _candidates(model):
        try:
            found[name] = _converted(ffn, name, config, orders.get(name))
        except _NotConvertible as reason:
            skipped[name] = str(reason)
    unknown = sorted(set(orders) - set(found))
    if unknown:
        raise ValueError(
            f"neuron_order names no convertible FFN: {unknown}; there are {list(found)}"
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no FFN that can be converted; skipped: {skipped}"
        )
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        _permute(layer)
    for name, reason in skipped.items():
        logger.warning("left %s untouched: %s", name, reason)
    model.d2m_report = {"converted": list(found), "skipped": skipped}
    return model


class _NotConvertible(Exception):
    pass


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Innermost modules with the Linears of an FFN: up and down, or two ups (a gate) and down."""
    found = []
    for name, module in model.named_modules():
        linears = _linears(module)
        if not name or len(linears) not in (2, 3) or isinstance(module, _CONTAINERS):
            continue
        inner = [m for m in module.modules() if m is not module and not isinstance(m, _CONTAINERS)]
        if any(len(_linears(m)) == len(linears) for m in inner):
            continue
        *ups, down = sorted((m for _, m in linears), key=lambda m: m.in_features)
        width, hidden = down.out_features, down.in_features
        if all(m.in_features == width for m in ups) and hidden > width:
            outs = {m.out_features for m in ups}
            if outs <= ({hidden, 2 * hidden} if len(ups) == 1 else {hidden}):
                found.append((name, module))
    return found


def _converted(
    ffn: nn.Module, name: str, config: MoEConfig, order_F: Tensor | None
) -> MoEFeedForward:
    """The MoE layer for one FFN, its neurons not permuted yet."""
    linears = _linears(ffn)
    if len(linears) == 3:
        raise _NotConvertible("its gate is a Linear of its own")
    (up, up_linear), (down, down_linear) = linears
    if up_linear.in_features > down_linear.in_features:
        (up, up_linear), (down, down_linear) = (down, down_linear), (up, up_linear)
    dim, hidden = up_linear.in_features, down_linear.in_features
    busy = [n for n, m in ffn.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if busy:
        raise _NotConvertible(f"it has dropout > 0 in {busy}; set it to 0")
    try:
        config.sizes(dim, hidden)
    except ValueError as error:
        raise _NotConvertible(str(error)) from None
    activation, gate_first = _recognise(ffn, up, down)
    if order_F is not None:
        order_F = check_order(order_F, hidden, f"neuron_order[{name!r}]")
    layer = MoEFeedForward(ffn, config, activation, up, down, gate_first)
    layer.train(ffn.training).to(up_linear.weight.device)
    if order_F is not None:
        layer.neuron_order.copy_(order_F)
    return layer


def _recognise(ffn: nn.Module, up: str, down: str) -> tuple[str, bool]:
    """(activation, gate_first) of an FFN, found by running a copy of it with random weights."""
    probe = copy.deepcopy(ffn).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for _, linear in _linears(probe):
        linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
        if linear.bias is not None:
            linear.bias.normal_(std=0.1, generator=generator)
    up_linear, down_linear = probe.get_submodule(up), probe.get_submodule(down)
    x = 2 * torch.randn(2, 8, up_linear.in_features, generator=generator)
    try:
        y = probe(x)
    except Exception as error:
        raise _NotConvertible(f"it does not run on tokens alone ({error})") from None
    z = up_linear(x)
    hidden = down_linear.in_features
    candidates = {}
    if z.shape[-1] == hidden:
        candidates = {(name, False): act(z) for name, act in _POINTWISE.items()}
    else:
        a, b = z.split(hidden, dim=-1)
        for name, act in _GATED.items():
            candidates[name, False] = a * act(b)
            candidates[name, True] = b * act(a)
    for key, h in candidates.items():
        # fp32 rounding stays below 1e-5; gelu and its tanh form differ by more than 1e-4
        expected = down_linear(h)
        if isinstance(y, Tensor) and y.shape == expected.shape:
            if (y - expected).norm() <= 2e-5 * expected.norm():
                return key
    known = [*_POINTWISE, *_GATED]
    raise _NotConvertible(f"it does not compute down(act(up(x))) with act in {known}")


def _permute(layer: MoEFeedForward) -> None:
    """Puts the neurons of a fresh layer in its order."""
    order_F = layer.neuron_order.long().cpu()
    if torch.equal(order_F, torch.arange(order_F.numel())):
        return
    up, down = layer.linears()
    stacks = up.out_features // order_F.numel()
    for tensor, dim, copies in ((up.weight, 0, stacks), (up.bias, 0, stacks), (down.weight, 1, 1)):
        if tensor is not None:
            tensor.copy_(permute_neurons(tensor, order_F, dim, stacks=copies))
