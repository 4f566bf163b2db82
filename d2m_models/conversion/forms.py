"""The forms of feed-forward modules that can become MoE layers, whatever model they are from.

Shapes: D width, F neurons. Two or three Linears in one module, accepted only if that module, with
random weights, computes

    down(act(up(x)))            up [F, D]
    down(u * act(g))            up [2F, D] gives [u; g] or [g; u]
    down(up(x) * act(gate(x)))  two Linears [F, D]

with one of the activations `moe_ffn` knows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_models.config import MoEConfig, MoEShare
from d2m_models.moe import MoEFeedForward

_POINTWISE = {
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward of their own
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GATED = {"geglu": F.gelu, "geglu_tanh": _POINTWISE["gelu_tanh"], "swiglu": F.silu}


class NotConvertible(Exception):
    pass


def _of_kind(module: nn.Module, kind: type | tuple) -> list:
    return [m for m in module.modules() if isinstance(m, kind)]


def linears_of(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def is_repeated(name: str) -> bool:
    """Whether a module is in a list of blocks; what stands alone (embedders, heads) is not."""
    return any(part.isdigit() for part in name.split("."))


def _innermost(model: nn.Module, kind: type | tuple, counts: Iterable[int]):
    """Modules of repeated blocks with so many layers of a kind, none of whose parts has as many."""
    for name, module in model.named_modules():
        count = len(layers := _of_kind(module, kind))
        if count not in counts or not is_repeated(name) or isinstance(module, _CONTAINERS):
            continue
        inner = [m for m in module.modules() if m is not module and not isinstance(m, _CONTAINERS)]
        if not any(len(_of_kind(m, kind)) == count for m in inner):
            yield name, module, layers


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of repeated blocks with the Linears of an FFN: up and down, or also a gate."""
    for name, module, linears in _innermost(model, nn.Linear, (2, 3)):
        *ups, down = sorted(linears, key=lambda m: m.in_features)
        width, hidden = down.out_features, down.in_features
        if all(m.in_features == width for m in ups) and hidden > width:
            outs = {m.out_features for m in ups}
            if outs <= ({hidden, 2 * hidden} if len(ups) == 1 else {hidden}):
                yield name, module


def others(model: nn.Module) -> dict[str, str]:
    """FFNs of repeated blocks that no form here describes: {name: what they are}."""
    found = {}
    for name, module, convs in _innermost(model, _CONVS, range(2, 9)):
        width = convs[0].in_channels
        wider = any(conv.out_channels > width for conv in convs[:-1])
        if convs[-1].out_channels == width and wider and not _of_kind(module, nn.Linear):
            found[name] = (
                f"its neurons come from {len(convs)} convolutions, which mix tokens, while an "
                f"expert sees one token alone"
            )
    for name, module in model.named_modules():
        stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] > 1]
        if len(stacks) >= 2 and is_repeated(name) and len({p.shape[0] for p in stacks}) == 1:
            found[name] = f"it is a mixture of {stacks[0].shape[0]} experts already"
    return found


def refuse_dropout(modules: Iterable[tuple[str, nn.Module]]) -> None:
    busy = [name for name, m in modules if isinstance(m, nn.Dropout) and m.p > 0]
    if busy:
        raise NotConvertible(f"it has dropout > 0 in {busy}; set it to 0")


def converted(ffn: nn.Module, config: MoEConfig | MoEShare) -> MoEFeedForward:
    """The MoE layer for one FFN; it adopts the FFN's Linears, whose neurons stay where they are."""
    *ups, (down, down_linear) = sorted(linears_of(ffn), key=lambda item: item[1].in_features)
    dim, hidden = down_linear.out_features, down_linear.in_features
    refuse_dropout(ffn.named_modules())
    if len({linear.bias is None for _, linear in ups}) > 1:
        raise NotConvertible("one of up and gate has a bias and the other has none")
    try:
        config.sizes(dim, hidden)
    except ValueError as error:
        raise NotConvertible(str(error)) from None
    activation, gate_first, up, gate = _recognise(ffn, [name for name, _ in ups], down)
    layer = MoEFeedForward(ffn, config, activation, up, down, gate_first, gate)
    return layer.train(ffn.training).to(down_linear.weight.device)


def _recognise(ffn: nn.Module, ups: list[str], down: str) -> tuple[str, bool, str, str | None]:
    """(activation, gate_first, up, gate), found by running a copy of the FFN with random weights.

    `gate` is the path of the gate's own Linear, or None.
    """
    probe = copy.deepcopy(ffn)
    if any(p.is_meta for p in probe.parameters()):  # a model that is about to be loaded
        probe.to_empty(device="cpu")
    probe = probe.to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for _, linear in linears_of(probe):
        linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
        if linear.bias is not None:
            linear.bias.normal_(std=0.1, generator=generator)
    down_linear = probe.get_submodule(down)
    x = 2 * torch.randn(2, 8, down_linear.out_features, generator=generator)
    try:
        y = probe(x)
    except Exception as error:
        raise NotConvertible(f"it does not run on tokens alone ({error})") from None
    z = [probe.get_submodule(up)(x) for up in ups]
    expected = {key: down_linear(h) for key, h in guesses(ups, z, down_linear.in_features).items()}
    return matching(y, expected)


Form = tuple[str, bool, str, str | None]  # activation, gate_first, up, gate


def guesses(ups: list[str], z: list[Tensor], hidden: int) -> dict[Form, Tensor]:
    """Every known form -> its neurons [..., F], of the outputs z of one or two up Linears."""
    if len(ups) == 2:
        return {
            (name, False, ups[i], ups[1 - i]): z[i] * act(z[1 - i])
            for name, act in _GATED.items()
            for i in (0, 1)
        }
    if z[0].shape[-1] == hidden:
        return {(name, False, ups[0], None): act(z[0]) for name, act in _POINTWISE.items()}
    a, b = z[0].chunk(2, dim=-1)
    return {
        (name, first, ups[0], None): (b * act(a) if first else a * act(b))
        for name, act in _GATED.items()
        for first in (False, True)
    }


def matching(y: Any, expected: Mapping[Form, Tensor]) -> Form:
    """The form that gives y."""
    for key, h in expected.items():
        # fp32 rounding stays below 1e-5; gelu and its tanh form differ by more than 1e-4
        if isinstance(y, Tensor) and y.shape == h.shape and (y - h).norm() <= 2e-5 * h.norm():
            return key
    known = sorted({name for name, *_ in expected})
    raise NotConvertible(f"it does not compute down(act(up(x))) with act in {known}")
