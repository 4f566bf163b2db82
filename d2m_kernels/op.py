"""How an op is defined: on every device, on its tensors' device, below autograd."""

import functools

import torch


def define(name, schema):
    """Defines d2m::name; the decorated function is its implementation on every device."""
    torch.library.define(f"d2m::{name}", schema)

    def register(function):
        torch.library.impl(f"d2m::{name}", "default")(_below_autograd(_on_its_device(function)))
        return function

    return register


def _on_its_device(function):
    """Triton launches on the current device, whatever its arguments are on: make it theirs."""

    @functools.wraps(function)
    def run(*args):
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(*args)
        return function(*args)

    return run


def _below_autograd(function):
    """An op called bare, outside of the `autograd.Function`s, records none of its inner steps."""

    @functools.wraps(function)
    def run(*args):
        if not torch.is_grad_enabled():  # as in every autograd.Function
            return function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return function(*args)

    return run


def gradient_buffers(inputs, needs):
    """One new contiguous buffer for each gradient wanted, an empty tensor for each that is not."""
    like = inputs[0]
    return tuple(
        t.new_empty(t.shape) if need else like.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )
