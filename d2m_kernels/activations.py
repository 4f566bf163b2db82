"""The activations an FFN may have, and their derivatives, for every back-end made of torch ops.

A gated activation multiplies an `up` half by the activation of a `gate` half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PLAIN = ("gelu", "gelu_tanh", "silu", "relu")
GATED = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}
ACTIVATIONS = (*PLAIN, *GATED)


def is_gated(activation: str | None) -> bool:
    return activation in GATED


def pointwise(name: str, z: torch.Tensor) -> torch.Tensor:
    """act(z), elementwise; of a gated activation, the function its gate goes through."""
    name = GATED.get(name, name)
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "silu":
        return F.silu(z)
    return F.relu(z)


def pointwise_backward(name: str, z: torch.Tensor, dh: torch.Tensor) -> torch.Tensor:
    """dh * act'(z), elementwise, by torch's own fused derivative kernels."""
    name = GATED.get(name, name)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(dh, z)
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dh, z, approximate="tanh")
    if name == "silu":
        return torch.ops.aten.silu_backward(dh, z)
    return torch.ops.aten.threshold_backward(dh, z, 0)


def _pointwise_backward_(name: str, z: torch.Tensor, dh: torch.Tensor) -> torch.Tensor:
    aten = torch.ops.aten
    if name in ("gelu", "gelu_tanh"):
        kind = "tanh" if name == "gelu_tanh" else "none"
        return aten.gelu_backward.grad_input(dh, z, approximate=kind, grad_input=dh)
    if name == "silu":
        return aten.silu_backward.grad_input(dh, z, grad_input=dh)
    return aten.threshold_backward.grad_input(dh, z, 0, grad_input=dh)


def activate(name: str, z: torch.Tensor) -> torch.Tensor:
    """h [.., F] from the pre-activation z [.., F], or [.., 2F] = [up | gate] when gated."""
    if not is_gated(name):
        return pointwise(name, z)
    up, gate = z.chunk(2, dim=-1)
    return up * pointwise(name, gate)


def activate_into(name: str, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`activate` into `out` [.., F]."""
    if is_gated(name):
        up, gate = z.chunk(2, dim=-1)
        return torch.mul(up, pointwise(name, gate), out=out)
    aten = torch.ops.aten
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu.out(z, approximate="tanh" if name == "gelu_tanh" else "none", out=out)
    return aten.silu.out(z, out=out) if name == "silu" else aten.relu.out(z, out=out)


def activate_(name: str, z: torch.Tensor) -> torch.Tensor:
    """`activate` in z's own memory: the result is z, or its `up` half when gated."""
    if not is_gated(name):
        return _in_place(name, z)
    up, gate = z.chunk(2, dim=-1)
    return up.mul_(_in_place(GATED[name], gate))


def _in_place(name: str, z: torch.Tensor) -> torch.Tensor:
    if name in ("gelu", "gelu_tanh"):
        return torch.ops.aten.gelu_(z, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.silu(z, inplace=True) if name == "silu" else F.relu_(z)


def activate_backward(name: str, z: torch.Tensor, dh: torch.Tensor) -> torch.Tensor:
    """dz, shaped like z, from dh [.., F]."""
    if not is_gated(name):
        return pointwise_backward(name, z, dh)
    up, gate = z.chunk(2, dim=-1)
    return torch.cat([dh * pointwise(name, gate), pointwise_backward(name, gate, dh * up)], dim=-1)


def activate_backward_(name: str, z: torch.Tensor, dh: torch.Tensor) -> torch.Tensor:
    """`activate_backward` in dh's memory, where dz has its size: when not gated."""
    return activate_backward(name, z, dh) if is_gated(name) else _pointwise_backward_(name, z, dh)
