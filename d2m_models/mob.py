"""Mixture of Blocks: of a group of m blocks every sample runs kappa (eqs. 4-5).

Shapes: B samples, m blocks in the group, kappa active ones, I image tokens, X text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_models.config import group_names, named_blocks
from d2m_models.moe import ROUTER_STD
from d2m_models.weights import effective_weight


class MoBRouting(NamedTuple):
    """probs [B, m] fp32, softmax over the group, with gradient; ids [B, kappa] int64, places
    within the group (0..m-1) of the blocks that run, ascending."""

    probs: Tensor
    ids: Tensor


def pool_tokens(x_BID: Tensor, c_BXD: Tensor, group: Any = None) -> Tensor:
    """LayerNorm(mean over the tokens of [x, c]) in fp32, [B, D].

    With `group` (context parallelism) the mean is over the tokens of all ranks: were each rank to
    route by its own tokens, ranks would choose different blocks and wait for each other for ever.
    """
    total_BD = x_BID.sum(1, dtype=torch.float32) + c_BXD.sum(1, dtype=torch.float32)
    count = float(x_BID.shape[1] + c_BXD.shape[1])
    if group is not None:
        from torch.distributed.nn.functional import all_reduce

        both = torch.cat([total_BD, total_BD.new_full((total_BD.shape[0], 1), count)], dim=1)
        both = all_reduce(both, group=group)
        return F.layer_norm(both[:, :-1] / both[:, -1:], both[:, :-1].shape[-1:])
    return F.layer_norm(total_BD / count, total_BD.shape[-1:])


def select_blocks(logits_Bm: Tensor, active: int, select: str = "topk") -> Tensor:
    """Places of the blocks that run, ascending: [B, kappa] int64.

    "topk": the `active` largest logits (eq. 5); "run": the `active` consecutive blocks with the
    largest sum of logits (eq. 4). Ties go to the first.
    """
    logits_Bm = logits_Bm.detach()
    if select == "run":
        score = logits_Bm.unfold(1, active, 1).sum(-1)
        first_B1 = score.argsort(dim=-1, descending=True, stable=True)[:, :1]
        return first_B1 + torch.arange(active, device=logits_Bm.device)
    best = logits_Bm.argsort(dim=-1, descending=True, stable=True)[:, :active]
    return best.sort(dim=-1).values


class MixtureOfBlocks(nn.Module):
    """The router of one group and the rule by which its blocks run; the blocks live elsewhere.

    logits = alpha * W_x pool([x, c]) + (1 - alpha) * W_y y        (eq. 5)

    Args:
        dim: D. size: m. active: kappa. alpha, select: see `MoBConfig`.
        condition_dim: width of y where it is not D.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        active: int = 1,
        alpha: float = 0.5,
        select: str = "topk",
        condition_dim: int | None = None,
    ):
        super().__init__()
        self.size, self.active, self.alpha, self.select = size, active, alpha, select
        self.token_gate = nn.Linear(dim, size, bias=False)  # W_x
        self.condition_gate = nn.Linear(condition_dim or dim, size, bias=False)  # W_y
        for gate in (self.token_gate, self.condition_gate):
            nn.init.normal_(gate.weight, std=ROUTER_STD)

    def route(self, x_BID: Tensor, c_BXD: Tensor, y_BD: Tensor, group: Any = None) -> MoBRouting:
        """Which blocks each sample runs (eq. 5); fp32 throughout, also under autocast."""
        with torch.autocast(x_BID.device.type, enabled=False):
            pooled_BD = pool_tokens(x_BID, c_BXD, group)
            w_x, _ = effective_weight(self.token_gate)
            w_y, _ = effective_weight(self.condition_gate)
            logits_Bm = self.alpha * F.linear(pooled_BD, w_x.float())
            logits_Bm = logits_Bm + (1 - self.alpha) * F.linear(y_BD.float(), w_y.float())
        return MoBRouting(logits_Bm.softmax(-1), select_blocks(logits_Bm, self.active, self.select))

    def forward(
        self,
        x_BID: Tensor,
        c_BXD: Tensor,
        y_BD: Tensor,
        run: Callable[..., tuple[Tensor, Tensor]],
        after: Callable[[int, Tensor], Tensor] = lambda place, x: x,
        group: Any = None,
        touch: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, MoBRouting]:
        """Runs each sample through its own blocks, in the model's order; a skipped block is the
        identity (eq. 4). In training the router learns through a straight-through factor:

            out = in + (B(in) - in) * (p + (1 - p).detach())

        whose value is 1, whose derivative by p is that of the block's contribution.

        Args:
            run: (place, x, c, rows) -> (x, c): the block at that place on a sub-batch; `rows` is
                an index tensor, or None for the whole batch.
            after: (place, x) -> x, applied to the whole batch after each place, run or not
                (ControlNet residuals, which belong to places in the dense model).
            group: see `pool_tokens`.
            touch: (place, x, c) -> a zero, added to x, for blocks that no sample here chose. With
                sharded parameters (FSDP) every rank must enter every block, forward and backward,
                else ranks wait for each other for ever.
        """
        routing = self.route(x_BID, c_BXD, y_BD, group)
        chosen = routing.ids.tolist()  # the group's one host read
        for place in range(self.size):
            rows = [b for b, ids in enumerate(chosen) if place in ids]
            if len(rows) == len(chosen):
                x_BID, c_BXD = self._step(place, x_BID, c_BXD, routing.probs[:, place], run, None)
            elif rows:
                at = torch.tensor(rows, device=x_BID.device)
                p = routing.probs[at, place]
                x_bID, c_bXD = self._step(place, x_BID[at], c_BXD[at], p, run, at)
                x_BID = x_BID.index_copy(0, at, x_bID.to(x_BID.dtype))
                c_BXD = c_BXD.index_copy(0, at, c_bXD.to(c_BXD.dtype))
            elif touch is not None:
                x_BID = x_BID + touch(place, x_BID, c_BXD)
            x_BID = after(place, x_BID)
        return x_BID, c_BXD, routing

    def _step(self, place, x, c, p_b, run, rows):
        x_out, c_out = run(place, x, c, rows)
        if not self.training:
            return x_out, c_out
        factor_b11 = (p_b + (1 - p_b).detach())[:, None, None]
        return x + (x_out - x) * factor_b11.to(x.dtype), c + (c_out - c) * factor_b11.to(c.dtype)

    def extra_repr(self) -> str:
        return f"blocks={self.size}, active={self.active}, alpha={self.alpha}, select={self.select}"


def check_cache(model: nn.Module, config: Any) -> None:
    """Raises unless the cache is right for a FLUX model whose groups skip blocks.

    MagCache and TaylorSeer count every block's calls. First-block caching acts on the first and on
    the last block, which must therefore always run.
    """
    if model.d2m_config.mob is None:
        return
    if type(config).__name__ != "FirstBlockCacheConfig":
        raise ValueError(
            f"{type(config).__name__} counts the calls of every block, which differ between "
            f"the blocks of a MoB group; use FirstBlockCacheConfig, or a model without MoB"
        )
    names = list(named_blocks(model))
    grouped = {name for group in group_names(model.d2m_config).values() for name in group}
    ends = [name for name in (names[0], names[-1]) if name in grouped]
    if ends:
        raise ValueError(
            f"first-block caching compares the first block's output and ends at the last block, "
            f"but {' and '.join(ends)} may be skipped by a MoB group; keep the first and the last "
            f"block out of groups (see propose_groups)"
        )
