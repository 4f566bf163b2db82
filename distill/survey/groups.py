"""What a group of single-stream blocks loses if one of them runs: depth pruning and MoB.

Shapes: n tokens, D width, I = inputs of a block's `proj_out`.

A single-stream block of FLUX gives x + gate * (f W + b) with f its attention and FFN. If the first
block of a group is to do the whole group's work, its W and b are best fitted to the group's change,

    argmin |gate * (f W + b) - (group(x) - x)|^2 + r |W - the block's own W|^2

over all tokens: a pruned depth; or over the tokens of each third of t (as many parts as the group
has blocks): what a MoB group of such copies can do at the same depth, were its router to tell noise
levels apart and nothing else. Gates differ by sample and column, which would make an equation a
column; all are solved at once by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2m_models.conversion.least_squares import RIDGE


class Tokens(NamedTuple):
    """f [n, I], gate [n, D], change [n, D] of a group and t [n] of its tokens."""

    f: Tensor
    gate: Tensor
    change: Tensor
    t: Tensor

    def of(self, rows: Tensor) -> Tokens:
        return Tokens(*(value[rows] for value in self))


@torch.no_grad()
def record_groups(
    model: nn.Module, groups: Sequence[Sequence[int]], batches: Iterable[Mapping[str, Any]],
    tokens: int, generator: torch.Generator,
) -> list[Tokens]:  # fmt: skip
    """About `tokens` random tokens of every group, an equal share of every batch.

    Args:
        batches: keyword arguments of the model's forward, each with "timestep" [B].
    """
    batches = list(batches)
    share, kept = -(-tokens // len(batches)), [[] for _ in groups]
    seen: dict[tuple[int, str], Tensor] = {}
    blocks, handles = model.single_transformer_blocks, []

    def whole(text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text, image], dim=1)

    for i, group in enumerate(groups):
        first, last = blocks[group[0]], blocks[group[-1]]

        def enter(_module, _args, kwargs, i=i):
            seen[i, "x"] = whole(kwargs["encoder_hidden_states"], kwargs["hidden_states"])

        def leave(_module, _args, _kwargs, output, i=i):
            seen[i, "change"] = whole(*output) - seen.pop((i, "x"))

        def gate(_module, _args, output, i=i):
            seen[i, "gate"] = output[1]

        def inputs(_module, args, i=i):
            seen[i, "f"] = args[0]

        handles += [
            first.register_forward_pre_hook(enter, with_kwargs=True),
            last.register_forward_hook(leave, with_kwargs=True),
            first.norm.register_forward_hook(gate),
            first.proj_out.register_forward_pre_hook(inputs),
        ]
    try:
        for batch in batches:
            model(**batch)
            for i in range(len(groups)):
                f = seen.pop((i, "f"))
                rows, columns = f.shape[:2]
                pick = torch.randperm(rows * columns, generator=generator)[:share].to(f.device)
                row = pick // columns
                kept[i].append(Tokens(
                    f.flatten(0, 1)[pick].float(),
                    seen.pop((i, "gate"))[row].float(),
                    seen.pop((i, "change")).flatten(0, 1)[pick].float(),
                    batch["timestep"][row].float(),
                ))  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return [Tokens(*map(torch.cat, zip(*parts, strict=True))) for parts in kept]


def gated_least_squares(
    tokens: Tokens, start: tuple[Tensor, Tensor], ridge: float = RIDGE, steps: int = 60
) -> tuple[Tensor, Tensor]:
    """(W [I, D], b [D]) of the equation above, by conjugate gradients from `start`.

    Jacobi's preconditioner: the diagonal of the normal equations, sum f^2 gate^2.
    """
    f = torch.cat([tokens.f, torch.ones_like(tokens.f[:, :1])], dim=1)
    gate_squared, n = tokens.gate.square(), len(f)
    penalty = ridge * f.square().mean() * gate_squared.mean()

    def normal(w: Tensor) -> Tensor:
        return f.t() @ (gate_squared * (f @ w)) / n + penalty * w

    w = torch.cat([start[0], start[1][None]]).float()
    diagonal = f.square().t() @ gate_squared / n + penalty
    rest = f.t() @ (tokens.gate * tokens.change) / n + penalty * w - normal(w)  # pulled to `start`
    direction = step = rest / diagonal
    energy = (rest * step).sum()
    for _ in range(steps):
        if energy <= 1e-20:
            break
        ahead = normal(direction)
        length = energy / (direction * ahead).sum()
        w, rest = w + length * direction, rest - length * ahead
        step = rest / diagonal
        before, energy = energy, (rest * step).sum()
        direction = step + energy / before * direction
    return w[:-1], w[-1]


def survey_group(block: nn.Module, size: int, fit: Tokens, judge: Tokens) -> dict[str, float]:
    """Relative errors |change of one block - change of the group|^2 / |change of the group|^2.

    Args:
        block: the group's first. size: how many blocks the group has.

    Returns:
        kept: the block as it is. pruned: refitted once. mob: refitted for each of `size` parts of
        the noise levels.
    """
    start = (block.proj_out.weight.detach().float().t(), block.proj_out.bias.detach().float())

    def error(weights: Sequence[tuple[Tensor, Tensor]]) -> float:
        part = (judge.t * len(weights)).long().clamp(0, len(weights) - 1)
        rest = sum(
            (own.gate * (own.f @ w + b) - own.change).double().square().sum()
            for (w, b), own in ((weights[p], judge.of(part == p)) for p in part.unique().tolist())
        )
        return float(rest / judge.change.double().square().sum())

    part = (fit.t * size).long().clamp(0, size - 1)
    copies = [gated_least_squares(fit.of(part == p), start) for p in range(size)]
    once = gated_least_squares(fit, start)
    return {"kept": error([start]), "pruned": error([once]), "mob": error(copies)}
