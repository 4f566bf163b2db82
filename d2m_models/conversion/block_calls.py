"""How blocks are called in one forward of a model, and what of it could be done apart.

Shapes: B samples, S tokens, D width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.blocks import take_rows

Arguments = dict[str, Any]


@dataclass
class Call:
    """One call of a block: its arguments by name, its outputs, and whether those are a tuple."""

    arguments: Arguments
    outputs: tuple
    single: bool


@functools.cache
def signature(kind: type) -> inspect.Signature:
    """The parameters of a block's forward without self."""
    while own := getattr(kind, "ungrouped", None) or getattr(kind, "dense_class", None):
        kind = own
    first, *rest = inspect.signature(kind.forward).parameters.values()
    return inspect.Signature(rest)


def bind(block: nn.Module, args: tuple, kwargs: Arguments) -> Arguments:
    """Arguments by the names of the block's parameters; those without a name stay as they are."""
    return dict(signature(type(block)).bind(*args, **kwargs).arguments)


def called(block: nn.Module, arguments: Arguments, **own: Any) -> Any:
    """The block, called with arguments by name and others of its own."""
    bound = inspect.BoundArguments(signature(type(block)), arguments)
    return block(*bound.args, **own, **bound.kwargs)


def outputs_of(output: Any) -> tuple:
    return output if isinstance(output, tuple) else (output,)


def condition_of(value: Any) -> Tensor | None:
    """The first tensor of numbers in an argument."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    for part in parts:
        found = condition_of(part) if isinstance(part, (list, tuple)) else part
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
    return None


def watch(model: nn.Module, blocks: nn.ModuleList, inputs: Mapping[str, Any]) -> list[Call]:
    """What every block was called with, in one forward of the dense model."""
    calls: dict[int, Call] = {}

    def see(block, args, kwargs, output, index):
        single = not isinstance(output, tuple)
        calls[index] = Call(bind(block, args, kwargs), outputs_of(output), single)

    handles = [
        block.register_forward_hook(functools.partial(see, index=i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        run_in_eval(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [calls.get(i) for i in range(len(blocks))]


def way(call: Call, following: Call) -> tuple[str, ...] | None:
    """Which argument of the next block each output is, or None where one is none."""
    names = [
        next((n for n, value in following.arguments.items() if value is output), None)
        for output in call.outputs
    ]
    return None if None in names or call.single != following.single else tuple(names)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return a is b or type(a) is type(b) and not isinstance(a, Tensor) and a == b


def check_samples(at: str, blocks: list[nn.Module], calls: list[Call], batch: int) -> None:
    """Raises unless every block gives a sample alone what it gives it among others."""
    if batch < 2:
        raise ValueError(f"{at}: inputs must hold two samples or more, got {batch}")
    for block, call in zip(blocks, calls, strict=True):
        rows = torch.tensor([batch - 1], device=call.outputs[0].device)
        try:
            alone = outputs_of(called(block, take_rows(call.arguments, rows, batch)))
            for one, all_ in zip(alone, call.outputs, strict=True):
                torch.testing.assert_close(one[0], all_[batch - 1], rtol=1e-3, atol=1e-4)
        except Exception as error:
            raise ValueError(
                f"{at}: {type(block).__name__} does not run on one sample of a batch as it runs "
                f"on all (arguments {list(call.arguments)}): {str(error).strip().splitlines()[0]}"
            ) from None


def looks_like_time(arguments: Arguments, streams: tuple[str, ...], batch: int) -> str | None:
    """The argument whose name or shape is a time embedding's: of samples, not of tokens."""
    found = {
        name: y
        for name, value in arguments.items()
        if name not in streams and (y := condition_of(value)) is not None and len(y) == batch
    }
    named = [
        n for n in found if any(word in n for word in ("temb", "time", "adaln", "mod", "cond"))
    ]
    flat = [n for n, y in found.items() if y.ndim == 2]
    return next(iter([*named, *flat]), None)


def run_in_eval(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    training = model.training
    try:
        return model.eval()(**inputs)
    finally:
        model.train(training)


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [t for p in parts for t in tensors_of(p)] if isinstance(parts, Iterable) else []
