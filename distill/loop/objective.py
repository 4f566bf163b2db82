"""Eq. (10) on a global batch that several ranks, in several parts, compute together.

Shapes: b rows of a part, B rows of the global batch, L features, T tokens, E experts (or blocks of
a MoB group).

Losses of a batch are not sums over its samples: w_l of eq. (9) and the load in the balance loss are
statistics of all B rows. So a part first gives its statistics, these are summed over parts and
ranks, and then the part's share of the loss follows, with gradient. The shares of all parts add up
to the loss of the batch, whichever way it is divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.output import block_features, run_with_aux
from distill.configs.sections import LossConfig
from distill.data.batch import Batch
from distill.loop.losses import (
    Balance,
    distill_loss,
    feature_terms,
    feature_weights,
    mean_balance,
    mob_terms,
    moe_terms,
    reduce_features,
    total_loss,
)
from distill.loop.parallel import World


@dataclass(frozen=True)
class Statistics:
    """Of some rows; everything detached.

    distill: eq. (7). errors [L], norms [L]: of eqs. (8-9). loads: layer or group -> [E], slots that
    chose each. tokens: layer or group -> how many were routed.
    """

    rows: int
    distill: Tensor
    errors: Tensor
    norms: Tensor
    loads: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def combine(parts: Sequence[Statistics], world: World) -> Statistics:
        """Of all parts on all ranks; of one part on one rank the same object."""
        if len(parts) == 1 and world.size == 1:
            return parts[0]
        whole = world.sum(torch.stack([p._sums() for p in parts]).sum(0))
        like = parts[0]
        counts = [1, 1, len(like.errors), len(like.norms)]
        counts += [n for load in like.loads.values() for n in (len(load), 1)]
        rows, distill, errors, squares, *routed = whole.split(counts)
        return Statistics(
            rows=round(rows.item()),
            distill=(distill / rows).float().squeeze(0),
            errors=(errors / rows).float(),
            norms=squares.sqrt().float(),
            loads=dict(zip(like.loads, routed[0::2], strict=True)),
            tokens=dict(zip(like.loads, (t.squeeze(0) for t in routed[1::2]), strict=True)),
        )

    def _sums(self) -> Tensor:
        """As one vector of numbers that add up, in fp64."""
        values = [
            self.distill.new_tensor([self.rows]),
            self.distill.reshape(1) * self.rows,
            self.errors * self.rows,
            self.norms.double().square(),
        ]
        for name, load in self.loads.items():
            values += [load, self.tokens[name].reshape(1)]
        return torch.cat([v.double() for v in values])


@dataclass(frozen=True)
class Terms:
    """One part's forward, with gradient: eq. (7), errors of eq. (8), what balance needs."""

    distill: Tensor
    errors: Tensor
    balance: dict[str, Balance]
    statistics: Statistics


class Distillation:
    """Eq. (10) of one batch: the objective of `train`, also for the pruned comparators.

    Args:
        source: batches, as `distill.data.batch.Digits.batch` gives them.
        features: names of the student's features to align; None for all it reports.
        aliases: student feature name -> teacher block name, where they differ.
        first: number of the first batch, so that consecutive stages see different data.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        source: Any,
        loss: LossConfig,
        batch_size: int,
        seed: int,
        first: int = 0,
        features: Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self.teacher, self.student, self.source, self.config = teacher, student, source, loss
        self.batch_size, self.seed, self.first = batch_size, seed, first
        self.features, self.aliases = features, dict(aliases or {})
        self.device = next(student.parameters()).device

    def __call__(self, step: int) -> dict[str, Tensor]:
        """All rows at once, in this process alone."""
        terms = self.terms(self.batch(step))
        return self.loss(terms, terms.statistics)

    def skipped_shards(self) -> Tensor | None:
        """[shards], 1 where this process found a shard damaged; None for data without shards."""
        bad = getattr(self.source, "bad", None)
        if bad is None:
            return None
        found = torch.zeros(len(self.source.shards), device=self.device)
        found[list(bad)] = 1
        return found

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        batch = self.source.batch(self.seed, self.first + step, self.batch_size, rows=rows)
        return batch.to(self.device)

    def terms(self, batch: Batch) -> Terms:
        """Both models on the batch."""
        inputs, family, student = batch.inputs(), batch.family, self.student
        names = getattr(student, "d2m_blocks", None)  # None: FLUX.1's
        with torch.no_grad(), block_features(self.teacher, student.d2m_config, names) as known:
            target = family.output(self.teacher(**inputs))
        out, aux = run_with_aux(self.student, inputs)
        distill = distill_loss(target, family.output(out))
        names = self.features if self.features is not None else list(aux.features)
        _, errors_L, norms_L = feature_terms(
            {name: known[self.aliases.get(name, name)] for name in names},
            {name: aux.features[name] for name in names},
        )
        balance = self._balance(aux)
        statistics = Statistics(
            rows=len(batch),
            distill=distill.detach(),
            errors=errors_L.detach(),
            norms=norms_L,
            loads={name: b.load for name, b in balance.items()},
            tokens={name: b.tokens for name, b in balance.items()},
        )
        return Terms(distill, errors_L, balance, statistics)

    def _balance(self, aux: Any) -> dict[str, Balance]:
        """Over blocks where there are MoB groups, else over experts, layer by layer."""
        variant = self.config.balance_variant
        if aux.mob:
            return {name: mob_terms(m, variant) for name, m in aux.mob.items()}
        return {n: moe_terms(r, variant) for n, r in aux.routing.items() if r.ids.shape[1] > 0}

    def loss(self, terms: Terms, whole: Statistics) -> dict[str, Tensor]:
        """The part's share of eq. (10) and of its terms; `whole`: statistics of the batch."""
        own = terms.statistics.rows
        share = own / whole.rows
        weights_L = feature_weights(whole.distill, whole.errors, whole.norms)
        distill = terms.distill if own == whole.rows else terms.distill * share
        errors_L = terms.errors if own == whole.rows else terms.errors * share
        feature = reduce_features(weights_L, errors_L, self.config.feature_reduction)
        balance = mean_balance(
            [b.loss(whole.loads[n], whole.tokens[n]) for n, b in terms.balance.items()], distill
        )
        loss = total_loss(distill, feature, balance, self.config.feature, self.config.balance)
        return {"loss": loss, "distill": distill, "feature": feature, "balance": balance}
