"""Mixture of Blocks on a model it has never seen.

Shapes: B samples, D width, A width of the condition, m blocks in a group.

A block of a list is called with tokens (one stream or two) and what belongs to the samples, and
its outputs are the next block's arguments. Which output is which argument is seen in one forward of
the dense model. Then the first block of a group runs the whole group, by `MixtureOfBlocks`, and
the others hand on what they are given. Blocks stay where they are, under their names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models import private
from d2m_models.blocks import take_rows
from d2m_models.config import MoBConfig
from d2m_models.conversion.block_calls import (
    Arguments,
    bind,
    called,
    check_samples,
    condition_of,
    looks_like_time,
    outputs_of,
    run_in_eval,
    same,
    tensors_of,
    watch,
    way,
)
from d2m_models.mob import MixtureOfBlocks


@dataclass
class _Group:
    """What the blocks of a group share; no Module, so that nothing is registered twice."""

    model: nn.Module
    router: MixtureOfBlocks
    blocks: list[nn.Module]
    streams: tuple[str, ...]  # of each output, the argument it goes on as
    single: bool
    condition: str
    active: int

    def to_dict(self) -> dict[str, Any]:
        """What `regroup` makes it from again, beside the blocks."""
        gates = self.router.token_gate, self.router.condition_gate
        dim, width = (gate.in_features for gate in gates)
        return {"streams": list(self.streams), "single": self.single,
                "condition": self.condition, "dim": dim, "condition_dim": width}  # fmt: skip

    def result(self, tokens: Sequence[Tensor]) -> Any:
        return tokens[0] if self.single else tuple(tokens)

    def run(self, arguments: Arguments) -> Any:
        """All chosen blocks on these arguments."""
        x, *rest = (arguments[name] for name in self.streams)
        batch = x.shape[0]

        def place(index: int, x: Tensor, c: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            own = arguments if rows is None else take_rows(arguments, rows, batch)
            own = own | dict(zip(self.streams, (x, c), strict=False))
            outputs = outputs_of(called(self.blocks[index], own, alone=True))
            return outputs[0], outputs[1] if rest else c

        x, c, _ = self.router(
            x,
            rest[0] if rest else x[:, :0],
            condition_of(arguments[self.condition]).flatten(1),
            run=place,
            group=private.token_group(self.model),
        )
        return self.result((x, c) if rest else (x,))


class GroupedBlock(nn.Module):
    """What a block of a group is beside its own class, see `add_mob`."""

    ungrouped: type
    group: _Group
    leads: bool

    def forward(self, *args, alone: bool = False, **kwargs):
        if alone:
            return super().forward(*args, **kwargs)
        arguments = bind(self, args, kwargs)
        if self.leads:
            return self.group.run(arguments)
        return self.group.result([arguments[name] for name in self.group.streams])


@functools.cache
def _grouped_class(kind: type) -> type:
    return type(kind.__name__, (GroupedBlock, kind), {"ungrouped": kind})


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
        ValueError: the way of the tokens cannot be followed, a block is given something of its own
            or does not run on single samples; the model is then as it was.
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
        calls = watch(model, blocks, inputs)
        for group in config.double_groups:
            at = f"{name}[{group[0]}..{group[-1]}]"
            formed.append(_form(model, at, blocks, group, calls, config, condition))
    _install(model, formed, inputs)
    model.mob_routers = nn.ModuleList(group.router for group in formed)
    return model


def regroup(
    model: nn.Module,
    members: Sequence[tuple[str, MoBConfig, Sequence[int]]],
    described: Sequence[Mapping[str, Any]],
) -> None:
    """Groups as `add_mob` has formed them once, in place and without a forward.

    Args:
        members: of each group the name of its list of blocks, how it chooses, and its blocks.
        described: of each group what `_Group.to_dict` has given.
    """
    routers = []
    for (name, config, indices), how in zip(members, described, strict=True):
        blocks = [model.get_submodule(name)[i] for i in indices]
        router = MixtureOfBlocks(
            how["dim"], len(blocks), config.active, config.alpha, config.select,
            condition_dim=how["condition_dim"],
        )  # fmt: skip
        way = tuple(how["streams"]), how["single"], how["condition"]
        _join(_Group(model, router, blocks, *way, config.active))
        routers.append(router)
    model.mob_routers = nn.ModuleList(routers)


def _join(group: _Group) -> None:
    for block in group.blocks:
        block.__class__ = _grouped_class(type(block))
        block.group, block.leads = group, block is group.blocks[0]


def _install(model: nn.Module, formed: list[_Group], inputs: Mapping[str, Any]) -> None:
    """Makes the groups; undone where the model with all blocks active is not the dense one."""
    expected = tensors_of(run_in_eval(model, inputs))
    members = [block for group in formed for block in group.blocks]
    for group in formed:
        _join(group)
        group.router.active = len(group.blocks)
    try:
        for y, y_dense in zip(tensors_of(run_in_eval(model, inputs)), expected, strict=True):
            torch.testing.assert_close(y, y_dense, rtol=1e-3, atol=1e-4)
    except Exception as error:
        for block in members:
            block.__class__ = block.ungrouped
            del block.group, block.leads
        kinds = sorted({type(block).__name__ for block in members})
        raise ValueError(
            f"{type(model).__name__} does not compute the same where {', '.join(kinds)} form "
            f"groups and all blocks run; it uses what is between the blocks of a group: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    for group in formed:
        group.router.active = group.active


def _form(model, at, blocks, group, calls, config, condition) -> _Group:
    """One group, or why it cannot be one."""
    kind = type(blocks[group[0]]).__name__
    seen = [calls[i] for i in group]
    if len({type(blocks[i]) for i in group}) > 1 or None in seen:
        raise ValueError(f"{at}: the blocks of a group must be of one class, and all must run")
    ways = {way(a, b) for a, b in zip(seen, seen[1:], strict=False)}
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
    for name in first.arguments:
        if name not in streams and not all(
            same(c.arguments[name], first.arguments[name]) for c in seen
        ):
            raise ValueError(
                f"{at}: {kind} is given another {name!r} in each block, which a "
                f"block that stands for others would not have"
            )
    check_samples(at, [blocks[i] for i in group], seen, len(tokens[0]))
    condition = condition or looks_like_time(first.arguments, streams, len(tokens[0]))
    y = condition_of(first.arguments.get(condition))
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
    members = [blocks[i] for i in group]
    return _Group(model, router, members, streams, first.single, condition, config.active)
