"""How an op d2m::name is defined: on every device, on its tensors' device, below autograd."""

from __future__ import annotations

import functools

import torch


def define(name: str, schema: str):
    """Defines d2m::name; the decorated function is its implementation on every device."""
    torch.library.define(f"d2m::{name}", schema)

    def register(function):
        torch.library.impl(f"d2m::{name}", "default")(_on_its_device(_unrecorded(function)))
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


def _unrecorded(function):
    """An op called bare, outside of the `autograd.Function`s, records none of its inner steps."""

    @functools.wraps(function)
    def run(*args):
        if not torch.is_grad_enabled():  # as in every autograd.Function
            return function(*args)
        with torch.set_grad_enabled(False):  # half the cost of torch.no_grad(): 0.7 us
            return function(*args)

    return run
