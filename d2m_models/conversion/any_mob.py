"""Mixture of Blocks on a model it has never seen.

Shapes: B samples, D width, A width of the condition, m blocks in a group.

A block of a list is called with tokens (one stream or two) and what belongs to the samples, and
its outputs are the next block's arguments. Which output is which argument is seen in one forward of
the dense model. Then the first block of a group runs the whole group, by `MixtureOfBlocks`, and
the others hand on what they are given. Blocks stay where they are, under their names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models import private
from d2m_models.blocks import take_rows
from d2m_models.config import MoBConfig
from d2m_models.mob import MixtureOfBlocks

Arguments = dict[str, Any]


@dataclass
class _Call:
    """One call of a block: its arguments by name, its outputs, and whether those are a tuple."""

    arguments: Arguments
    outputs: tuple
    single: bool


@dataclass
class _Group:
    """What the blocks of a group share; no Module, so that nothing is registered twice."""

    model: nn.Module
    router: MixtureOfBlocks
    blocks: list[nn.Module]
    streams: tuple[str, ...]  # of each output, the argument it goes on as
    single: bool
    condition: str

    def result(self, tokens: Sequence[Tensor]) -> Any:
        return tokens[0] if self.single else tuple(tokens)

    def run(self, arguments: Arguments) -> Any:
        """All chosen blocks on these arguments."""
        x, *rest = (arguments[name] for name in self.streams)
        batch = x.shape[0]

        def place(index: int, x: Tensor, c: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            own = arguments if rows is None else take_rows(arguments, rows, batch)
            own = own | dict(zip(self.streams, (x, c), strict=False))
            outputs = _outputs(_called(self.blocks[index], own))
            return outputs[0], outputs[1] if rest else c

        x, c, _ = self.router(
            x,
            rest[0] if rest else x[:, :0],
            _condition(arguments[self.condition]).flatten(1),
            run=place,
            group=private.token_group(self.model),
        )
        return self.result((x, c) if rest else (x,))


class GroupedBlock(nn.Module):
    """What a block of a group is beside its own class, see `add_mob`."""

    group: _Group
    leads: bool

    def forward(self, *args, alone: bool = False, **kwargs):
        if alone:
            return super().forward(*args, **kwargs)
        arguments = _bind(self, args, kwargs)
        if self.leads:
            return self.group.run(arguments)
        return self.group.result([arguments[name] for name in self.group.streams])


@functools.cache
def _grouped_class(kind: type) -> type:
    return type(kind.__name__, (GroupedBlock, kind), {"__signature__": _signature(kind)})


def _signature(kind: type) -> inspect.Signature:
    """The parameters of a block's forward without self."""
    while issubclass(kind, GroupedBlock) or hasattr(kind, "dense_class"):
        kind = getattr(kind, "dense_class", None) or kind.__mro__[2]
    first, *rest = inspect.signature(kind.forward).parameters.values()
    return inspect.Signature(rest)


def _bind(block: nn.Module, args: tuple, kwargs: Arguments) -> Arguments:
    """Arguments by the names of the block's parameters; those without a name stay as they are."""
    signature = getattr(type(block), "__signature__", None) or _signature(type(block))
    return dict(signature.bind(*args, **kwargs).arguments)


def _called(block: nn.Module, arguments: Arguments) -> Any:
    bound = inspect.BoundArguments(type(block).__signature__, arguments)
    return block(*bound.args, alone=True, **bound.kwargs)


def _outputs(output: Any) -> tuple:
    return output if isinstance(output, tuple) else (output,)


def _condition(value: Any) -> Tensor | None:
    """The first tensor of numbers in an argument."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    for part in parts:
        found = _condition(part) if isinstance(part, (list, tuple)) else part
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
    return None


@torch.no_grad()
def add_mob(
    model: nn.Module,
    groups: Mapping[str, Sequence[Sequence[int]]],
    inputs: Mapping[str, Any],
    active: int = 1,
    alpha: float = 0.5,
    select: str = "topk",
    condition: str | None = None,
) -> nn.Module:
    """Forms Mixture-of-Blocks groups in place and returns the model; `convert` comes before.

    Args:
        model: a model whose blocks form lists, each block fed with the one before. For FLUX.1 use
            `FluxMoEConfig(mob=...)`, whose result diffusers saves and loads.
        groups: {name of a list of blocks: groups of consecutive block indices}.
        inputs: keyword arguments of one forward, from which the way of tokens through the blocks
            is read.
        active, alpha, select: as `MoBConfig`.
        condition: the argument of a block that the router reads beside the tokens (eq. 5); by
            default the one that looks like a time embedding.

    Returns:
        The same model; `model.mob_routers` holds a `MixtureOfBlocks` a group, in order, whose
        output a forward hook sees.

    Raises:
        ValueError: the way of the tokens cannot be followed, or a block has no such argument.
    """
    if hasattr(model, "mob_routers"):
        raise ValueError("model has MoB groups already")
    formed = []
    for name, wanted in groups.items():
        blocks = model.get_submodule(name)
        config = MoBConfig(double_groups=wanted, active=active, alpha=alpha, select=select)
        last = max(group[-1] for group in config.double_groups)
        if last >= len(blocks):
            raise ValueError(f"groups of {name} name block {last}, it has {len(blocks)} blocks")
        calls = _watch(model, blocks, inputs)
        for group in config.double_groups:
            at = f"{name}[{group[0]}..{group[-1]}]"
            formed.append(_form(model, at, blocks, group, calls, config, condition))
    for group in formed:
        for block in group.blocks:
            block.__class__ = _grouped_class(type(block))
            block.group, block.leads = group, block is group.blocks[0]
    model.mob_routers = nn.ModuleList(group.router for group in formed)
    return model


def _watch(model: nn.Module, blocks: nn.ModuleList, inputs: Mapping[str, Any]) -> list[_Call]:
    """What every block was called with, in one forward of the dense model."""
    calls: dict[int, _Call] = {}

    def see(block, args, kwargs, output, index):
        single = not isinstance(output, tuple)
        calls[index] = _Call(_bind(block, args, kwargs), _outputs(output), single)

    handles = [
        block.register_forward_hook(functools.partial(see, index=i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    training = model.training
    try:
        model.eval()(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [calls.get(i) for i in range(len(blocks))]


def _form(model, at, blocks, group, calls, config, condition) -> _Group:
    """One group, or why it cannot be one."""
    kind = type(blocks[group[0]]).__name__
    seen = [calls[i] for i in group]
    if len({type(blocks[i]) for i in group}) > 1 or None in seen:
        raise ValueError(f"{at}: the blocks of a group must be of one class, and all must run")
    ways = {_way(a, b) for a, b in zip(seen, seen[1:], strict=False)}
    streams = ways.pop() if len(ways) == 1 else None
    first = seen[0]
    if (
        streams is None
        or len(streams) > 2
        or any(not isinstance(t, Tensor) or t.ndim != 3 for c in seen for t in c.outputs)
    ):
        raise ValueError(
            f"{at}: {kind} cannot form a group: its outputs must be one or two streams of tokens "
            f"[B, S, D] that are the next block's arguments as they are; its arguments are "
            f"{list(first.arguments)}"
        )
    tokens = [first.arguments[name] for name in streams]
    if len({(t.shape[0], t.shape[2]) for t in tokens}) > 1:
        shapes = {n: tuple(t.shape) for n, t in zip(streams, tokens, strict=True)}
        raise ValueError(
            f"{at}: {kind} has streams of different widths {shapes}, which eq. 5 pools"
        )
    condition = condition or _looks_like_time(first.arguments, streams, len(tokens[0]))
    y = _condition(first.arguments.get(condition))
    if y is None or len(y) != len(tokens[0]):
        raise ValueError(
            f"{at}: {kind} has no condition for the router among its arguments "
            f"{list(first.arguments)}; name one with [B, ...] numbers by condition="
        )
    router = MixtureOfBlocks(
        tokens[0].shape[2],
        len(group),
        config.active,
        config.alpha,
        config.select,
        condition_dim=y[0].numel(),
    ).to(tokens[0].device)
    return _Group(model, router, [blocks[i] for i in group], streams, first.single, condition)


def _way(call: _Call, following: _Call) -> tuple[str, ...] | None:
    """Which argument of the next block each output is, or None where one is none."""
    names = [
        next((n for n, value in following.arguments.items() if value is output), None)
        for output in call.outputs
    ]
    return None if None in names or call.single != following.single else tuple(names)


def _looks_like_time(arguments: Arguments, streams: tuple[str, ...], batch: int) -> str | None:
    """The argument whose name or shape is a time embedding's: of samples, not of tokens."""
    found = {
        name: y
        for name, value in arguments.items()
        if name not in streams and (y := _condition(value)) is not None and len(y) == batch
    }
    named = [
        n for n in found if any(word in n for word in ("temb", "time", "adaln", "mod", "cond"))
    ]
    flat = [n for n, y in found.items() if y.ndim == 2]
    return next(iter([*named, *flat]), None)
