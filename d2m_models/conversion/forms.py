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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_models.config import MoEConfig
from d2m_models.moe import MoEFeedForward

_POINTWISE = {
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward of their own
_GATED = {"geglu": F.gelu, "swiglu": F.silu}


class NotConvertible(Exception):
    pass


def linears_of(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Innermost modules with the Linears of an FFN: up and down, or two ups (a gate) and down."""
    found = []
    for name, module in model.named_modules():
        linears = linears_of(module)
        if not name or len(linears) not in (2, 3) or isinstance(module, _CONTAINERS):
            continue
        inner = [m for m in module.modules() if m is not module and not isinstance(m, _CONTAINERS)]
        if any(len(linears_of(m)) == len(linears) for m in inner):
            continue
        *ups, down = sorted((m for _, m in linears), key=lambda m: m.in_features)
        width, hidden = down.out_features, down.in_features
        if all(m.in_features == width for m in ups) and hidden > width:
            outs = {m.out_features for m in ups}
            if outs <= ({hidden, 2 * hidden} if len(ups) == 1 else {hidden}):
                found.append((name, module))
    return found


def converted(ffn: nn.Module, config: MoEConfig) -> MoEFeedForward:
    """The MoE layer for one FFN; it adopts the FFN's Linears, whose neurons stay where they are."""
    *ups, (down, down_linear) = sorted(linears_of(ffn), key=lambda item: item[1].in_features)
    dim, hidden = down_linear.out_features, down_linear.in_features
    busy = [n for n, m in ffn.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if busy:
        raise NotConvertible(f"it has dropout > 0 in {busy}; set it to 0")
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
    probe = copy.deepcopy(ffn).to("cpu", torch.float32).eval()
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
    guesses = {}
    if len(ups) == 2:
        for name, act in _GATED.items():
            guesses[name, False, ups[0], ups[1]] = z[0] * act(z[1])
            guesses[name, False, ups[1], ups[0]] = z[1] * act(z[0])
    elif z[0].shape[-1] == down_linear.in_features:
        guesses = {(name, False, ups[0], None): act(z[0]) for name, act in _POINTWISE.items()}
    else:
        a, b = z[0].chunk(2, dim=-1)
        for name, act in _GATED.items():
            guesses[name, False, ups[0], None] = a * act(b)
            guesses[name, True, ups[0], None] = b * act(a)
    for key, h in guesses.items():
        # fp32 rounding stays below 1e-5; gelu and its tanh form differ by more than 1e-4
        expected = down_linear(h)
        if isinstance(y, Tensor) and y.shape == expected.shape:
            if (y - expected).norm() <= 2e-5 * expected.norm():
                return key
    known = list(_GATED if len(ups) == 2 else [*_POINTWISE, *_GATED])
    raise NotConvertible(f"it does not compute down(act(up(x))) with act in {known}")
