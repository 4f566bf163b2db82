"""Models with fewer blocks that keep what the whole ones keep, block for block.

A unit is a block outside of the MoB groups, or a whole group. Of units of one kind in a row, only
the first ones and the last one run; what the second keeps, those left out keep as well.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from d2m_models.config import KINDS, FluxMoEConfig


@dataclass(frozen=True)
class Unit:
    """blocks: indices of a kind's blocks. signature: equal for units that compute the same.
    repeat: how many units of the whole model it stands for."""

    kind: str
    blocks: tuple[int, ...]
    signature: tuple
    grouped: bool
    repeat: int = 1


def units(config: FluxMoEConfig) -> list[Unit]:
    """All of a model, in the order of running."""
    found = []
    for kind, count in (("double", config.num_layers), ("single", config.num_single_layers)):
        dense = getattr(config, f"dense_{kind}_blocks")
        groups = getattr(config.mob, f"{kind}_groups", ())
        members = {i for group in groups for i in group}
        lone = [(i,) for i in range(count) if i not in members]
        for blocks in sorted([*lone, *groups]):
            signature = (kind, blocks[0] in members, *(i in dense for i in blocks))
            found.append(Unit(kind, blocks, signature, blocks[0] in members))
    return found


def fewer(whole: list[Unit], tight: tuple | None = None) -> list[Unit]:
    """At most three units of a kind in a row, two of the signature `tight`; the one before the last
    stands for the rest."""
    kept: list[Unit] = []
    for signature, run in groupby(whole, key=lambda unit: unit.signature):
        row, most = list(run), 2 if signature == tight else 3
        if len(row) > most:
            middle = replace(row[most - 2], repeat=len(row) - most + 1)
            row = [*row[: most - 2], middle, row[-1]]
        kept += row
    return kept


def shortened(model: nn.Module, kept: list[Unit]) -> Any:
    """A model of these units alone, which shares its modules with `model`."""
    short = copy(model)
    short.__dict__["_modules"] = dict(model._modules)
    config = getattr(model, "d2m_config", None)
    groups: dict[str, list] = {f"{kind}_groups": [] for kind in KINDS}
    for kind, name in KINDS.items():
        own = [unit for unit in kept if unit.kind == kind]
        blocks = getattr(model, name)
        setattr(short, name, nn.ModuleList(blocks[i] for unit in own for i in unit.blocks))
        at = 0
        for unit in own:
            if unit.grouped:
                groups[f"{kind}_groups"].append(tuple(range(at, at + len(unit.blocks))))
            at += len(unit.blocks)
    if config is None:
        return short
    mob = config.mob
    if mob is not None:
        routers = {}
        for key in groups:
            firsts = [group[0] for group in getattr(mob, key)]
            own = [u for u in kept if u.grouped and f"{u.kind}_groups" == key]
            routers[key] = nn.ModuleList(
                model.mob_routers[key][firsts.index(u.blocks[0])] for u in own
            )
        short.mob_routers = nn.ModuleDict(routers)
        mob = replace(mob, **{key: tuple(chosen) for key, chosen in groups.items()})
    short.d2m_config = replace(
        config, mob=mob, dense_double_blocks=(), dense_single_blocks=(),
        num_layers=len(short.transformer_blocks),
        num_single_layers=len(short.single_transformer_blocks),
    )  # fmt: skip
    return short


def spread(after: list[int], kept: list[Unit]) -> list[int]:
    """Sums after every block of the short model -> after every block of the whole one."""
    found, at, before = [], 0, 0
    for unit in kept:
        marks = after[at : at + len(unit.blocks)]
        steps = [b - a for a, b in zip([before, *marks], marks, strict=False)]
        for _ in range(unit.repeat):
            for step in steps:
                found.append((found[-1] if found else 0) + step)
        at, before = at + len(unit.blocks), marks[-1]
    return found
