"""What an FFN loses in closed form: as a linear map, pruned, and as a mixture of experts.

Shapes: n tokens, D width, F neurons, S shared ones, E experts of H neurons, C clusters of tokens.

Every form that is compared computes y = g(x) * h(x) W + b with h the dense FFN's own activations,
gates g in {0, 1} that say which neurons are active for a token, and W, b by least squares on one
sample of tokens; its error is what it leaves unexplained of the FFN's output on another sample. So
the comparison is of structures, at equal activated neurons, each with the best output weights that
it can have; no form is favoured by where it starts. Training moves all of them further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from d2m_models.config import MoEConfig
from d2m_models.conversion.formation import FFNRecord
from d2m_models.conversion.least_squares import (
    contribution,
    least_squares,
    token_clusters,
    unexplained,
)
from d2m_models.partition import (
    cluster_neuron_order,
    coactivation_neuron_order,
    neuron_order_from_importance,
)

FORMATIONS = ("dealt", "coactivation", "clusters")


class Sample(NamedTuple):
    """Tokens of one FFN: x [n, D], h [n, F], y = h w2 [n, D]."""

    x: Tensor
    h: Tensor
    y: Tensor

    @classmethod
    def of(cls, record: FFNRecord, w2_DF: Tensor) -> Sample:
        """The sample on the weight's device; the output bias, which nothing changes, left out."""
        x, h = (t.to(w2_DF.device, torch.float32) for t in record)
        return cls(x, h, h @ w2_DF.float().t())


def survey_ffn(
    fit: Sample, judge: Sample, w2_DF: Tensor, ratios: Sequence[float],
    candidates: Sequence[MoEConfig], generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Relative errors of one FFN.

    Args:
        fit, judge: different tokens. ratios: activated expansion ratios r_a of pruning.
        candidates: mixtures; their top_k is a number.

    Returns:
        {"linear": error of a linear map, "pruned": {r_a: error}, "mixtures": [{"moe", "ratio",
        "formation", "error", "pruned": the error of pruning at its ratio}, ...]}
    """
    score_F = contribution(fit.h, w2_DF)
    order_F = score_F.argsort(descending=True, stable=True)
    width = fit.x.shape[1]

    def pruned(ratio: float) -> float:
        kept = order_F[: round(ratio * width)]
        return unexplained(least_squares(fit.h[:, kept], fit.y)(judge.h[:, kept]), judge.y)

    errors = {ratio: pruned(ratio) for ratio in ratios}
    mixtures = []
    for moe in candidates:
        ratio = moe.activated_ratio
        if ratio not in errors:
            errors[ratio] = pruned(ratio)
        for formation in FORMATIONS:
            error = mixture_error(fit, judge, w2_DF, score_F, moe, formation, generator)
            mixtures.append({"moe": moe.to_dict(), "ratio": ratio, "formation": formation,
                             "error": error, "pruned": errors[ratio]})  # fmt: skip
    linear = unexplained(least_squares(fit.x, fit.y)(judge.x), judge.y)
    return {"linear": linear, "pruned": dict(sorted(errors.items())), "mixtures": mixtures}


def mixture_error(
    fit: Sample, judge: Sample, w2_DF: Tensor, score_F: Tensor, moe: MoEConfig, formation: str,
    generator: torch.Generator,
) -> float:  # fmt: skip
    """The relative error of one mixture, formed in one of three ways.

    dealt: as the paper does, routed neurons dealt evenly by score. coactivation: neurons that fire
    together share an expert. clusters: tokens form clusters, and a cluster's experts have the
    neurons that serve it most. The router is linear in x in all of them.
    """
    width, hidden = fit.x.shape[1], fit.h.shape[1]
    shared, size = moe.sizes(width, hidden)
    experts, top_k = moe.num_experts, moe.top_k
    assert isinstance(top_k, int)
    if formation == "clusters":
        each = top_k if top_k and experts % top_k == 0 else 1
        cluster = token_clusters(fit.x, experts // each, generator)
        own_n = cluster(fit.x).argmax(1)
        score_CF = torch.stack([
            contribution(fit.h[own_n == c], w2_DF) * (own_n == c).float().mean()
            for c in range(experts // each)
        ])  # fmt: skip
        order_F = cluster_neuron_order(score_F, score_CF, shared, experts)

        def scores(sample: Sample) -> Tensor:
            return cluster(sample.x).repeat_interleave(each, dim=1)
    else:
        order_F = (
            neuron_order_from_importance(score_F, shared, experts)
            if formation == "dealt"
            else coactivation_neuron_order(score_F, fit.h, shared, experts)
        )
        routed_EH = order_F[shared:].view(experts, size)
        share_nE = torch.stack(
            [(fit.h[:, own] @ w2_DF[:, own].float().t()).norm(dim=1) for own in routed_EH], dim=1
        ).log1p()
        router = least_squares(fit.x, share_nE - share_nE.mean(1, keepdim=True), ridge=1e-2)

        def scores(sample: Sample) -> Tensor:
            return router(sample.x)

    def active(sample: Sample) -> Tensor:
        chosen_nk = scores(sample).topk(top_k, dim=1).indices
        gate_nE = one_hot(chosen_nk, experts).sum(1).float()
        h_nF = sample.h[:, order_F].clone()
        h_nF[:, shared:] *= gate_nE.repeat_interleave(size, dim=1)
        return h_nF

    return unexplained(least_squares(active(fit), fit.y)(active(judge)), judge.y)
