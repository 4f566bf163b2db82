"""What the ops need of tensors around a kernel: autocast, wide sums, strides, gradients.

Shapes: T tokens, D model.
"""

from __future__ import annotations

import contextlib
import functools

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast wants on this device, or None where it is off or unknown (meta)."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str):
    """A region in which ops keep the dtypes they are given (logits stay fp32); else free."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def in_given_dtypes(backward):
    """A `Function.backward` as it is outside autocast, also where it is called inside."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        with without_autocast(grads[0].device.type):
            return backward(ctx, *grads)

    return run


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that sums are taken in."""
    return x.to(wide_dtype(x))


def matmul(a, b):
    """a b in the wider of both wide dtypes."""
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(dtype) @ b.to(dtype)


def unit(t):
    """t, copied only when its inner stride is not 1."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def needs_grad(*tensors) -> bool:
    """Whether autograd has to see an op on these; without it a call costs the host a third less."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def tokens_of(x) -> torch.Tensor:
    """x as [T, D] with a unit inner stride; a view where possible."""
    x_TD = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return x_TD if x_TD.stride(-1) == 1 or x_TD.shape[-1] == 1 else x_TD.contiguous()
