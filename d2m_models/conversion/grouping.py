"""Which blocks should form MoB groups: those that change their input least (Fig. 3).

Shapes: n samples, L blocks of one kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.output import watched


@dataclass(frozen=True)
class BlockMSE:
    """Mean squared difference of a block's output and input: kind -> [n, L], and each sample's
    timestep [n]."""

    values: dict[str, Tensor]
    timesteps: Tensor


@torch.no_grad()
def measure_block_mse(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> BlockMSE:
    """Runs a dense FLUX on calibration inputs and measures every block.

    Args:
        batches: keyword arguments of the model's forward; spread timesteps and several prompts, for
            a block's part differs with both.
    """
    rows: dict[str, list[Tensor]] = {}
    current: dict[str, list[Tensor]] = {}
    timesteps = []

    def record(name, kwargs, output):
        kind = "single" if name.startswith("single") else "double"
        before = torch.cat([kwargs["hidden_states"], kwargs["encoder_hidden_states"]], dim=1)
        change = (torch.cat([output[1], output[0]], dim=1) - before).float()
        current.setdefault(kind, []).append(change.square().mean((1, 2)).cpu())

    with watched(model, record):
        for batch in batches:
            current.clear()
            model(**batch)
            for kind, columns in current.items():
                rows.setdefault(kind, []).append(torch.stack(columns, dim=1))
            timesteps.append(batch["timestep"].detach().float().cpu())
    if not timesteps:
        raise ValueError("batches is empty; pass at least one batch of calibration inputs")
    return BlockMSE({kind: torch.cat(mse) for kind, mse in rows.items()}, torch.cat(timesteps))


def propose_groups(
    mse_L: Tensor | Sequence[float], count: int, size: int, first: int = 1, last: int = 1
) -> tuple[tuple[int, ...], ...]:
    """The `count` disjoint runs of `size` consecutive blocks with the least sum of log MSE.

    Exact, by dynamic programming. Blocks outside of groups always run, so those that change the
    tokens most stay outside.

    Args:
        mse_L: one value a block (the mean over samples).
        first, last: blocks at the ends that stay outside; at least 1, so that first-block caching
            keeps working.

    Returns:
        Groups for `MoBConfig`, ascending.
    """
    values = torch.as_tensor(mse_L, dtype=torch.float64)
    if values.ndim != 1 or not torch.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"mse must be finite values >= 0, one a block, got {tuple(values.shape)}")
    least = {"count": (count, 1), "size": (size, 2), "first": (first, 1), "last": (last, 1)}
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    blocks, need = len(values), first + count * size + last
    if need > blocks:
        raise ValueError(
            f"{count} groups of {size} with {first} + {last} blocks outside need {need} blocks, "
            f"the model has {blocks}"
        )
    logs = values.clamp(min=1e-30).log()
    cost = [float(logs[i : i + size].sum()) for i in range(blocks - size + 1)]
    # best[g][i]: least cost of g groups within blocks[:i]
    infinity = float("inf")
    best = [[infinity] * (blocks + 1) for _ in range(count + 1)]
    best[0] = [0.0] * (blocks + 1)
    taken: dict[tuple[int, int], bool] = {}
    for g in range(1, count + 1):
        for i in range(first + size, blocks - last + 1):
            with_last = best[g - 1][i - size] + cost[i - size]
            taken[g, i] = with_last < best[g][i - 1]
            best[g][i] = min(with_last, best[g][i - 1])
    groups, g, i = [], count, blocks - last
    while g:
        if taken[g, i]:
            groups.append(tuple(range(i - size, i)))
            g, i = g - 1, i - size
        else:
            i -= 1
    return tuple(reversed(groups))
