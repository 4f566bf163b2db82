"""Where an MoE layer starts: one FFN's neurons, router and output weights from calibration data.

Shapes: n tokens, D width, F neurons, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from d2m_models.config import MoEConfig
from d2m_models.conversion.formation import FFNRecord, contribution_router, form_clusters
from d2m_models.conversion.least_squares import RIDGE, least_squares
from d2m_models.partition import coactivation_neuron_order, neuron_order_from_importance

FORMATIONS = ("taylor", "coactivation", "clusters", "copies")


class Start(NamedTuple):
    """order [F] new position -> dense neuron, a permutation unless it holds copies; router [E, D];
    w2 [D, F] in the new order, and what is added to b2 [D]; None for the dense ones."""

    order: Tensor
    router: Tensor
    w2: Tensor | None = None
    b2: Tensor | None = None


@torch.no_grad()
def start_ffn(
    record: FFNRecord, score_F: Tensor, w2_DF: Tensor, moe: MoEConfig, formation: str,
    generator: torch.Generator, refit: bool = True, ridge: float = RIDGE,
) -> Start:  # fmt: skip
    """One FFN as a mixture.

    With `refit` the output weights are those that make up, on average, for what a token's experts
    leave out:

        argmin over (W, b) of |(g(x) * h) W + b - h w2|^2 / n + r |W|^2

    g: the gates of eq. 3 with this router, 1 for shared neurons. The layer is then no longer the
    dense one under top_k "dense", and the dense w2 is not kept.

    Args:
        record: of the dense FFN. score_F: a neuron's importance, eq. (6) or `contribution`; the
            highest are shared. w2_DF: the dense one.
        formation: "taylor": routed neurons are dealt evenly by score, the paper's way;
            "coactivation": neurons that fire together share an expert; "clusters" and "copies":
            see `form_clusters`; copies need `refit`. Routers are fitted in all of them.
    """
    if formation not in FORMATIONS:
        raise ValueError(f"formation is {formation!r}; expected one of {FORMATIONS}")
    if formation == "copies" and not refit:
        raise ValueError("formation 'copies' needs refitted outputs: a neuron would count twice")
    record, w2_DF = FFNRecord(*(t.float() for t in record)), w2_DF.float()
    shared, _ = moe.sizes(record.x.shape[1], record.h.shape[1])
    if formation in ("clusters", "copies"):
        order_F, router_ED = form_clusters(record, score_F, w2_DF, moe, generator,
                                           formation == "copies")  # fmt: skip
    else:
        order_F = (
            coactivation_neuron_order(score_F, record.h, shared, moe.num_experts)
            if formation == "coactivation"
            else neuron_order_from_importance(score_F, shared, moe.num_experts)
        )
        router_ED, _ = contribution_router(record, w2_DF, order_F, shared, moe.num_experts)
    start = Start(order_F, router_ED)
    if not refit:
        return start
    fitted = least_squares(gated(start, record, moe), record.h @ w2_DF.t(), ridge)
    return start._replace(w2=fitted.weight.t().float(), b2=fitted.bias.float())


def gated(start: Start, record: FFNRecord, moe: MoEConfig) -> Tensor:
    """Activations in the new order, times the gates of eq. 3 and routed_scale: [n, F]."""
    x_nD, h_nF = record
    logits_nE = x_nD @ start.router.to(x_nD).t()
    shared, size = moe.sizes(x_nD.shape[1], h_nF.shape[1])
    top = logits_nE.topk(moe.num_experts if moe.top_k == "dense" else moe.top_k, dim=1)
    weight_nK = top.values.softmax(1) * moe.routed_scale
    gate_nE = torch.zeros_like(logits_nE).scatter_(1, top.indices, weight_nK)
    gate_nF = functional.pad(gate_nE.repeat_interleave(size, dim=1), (shared, 0), value=1.0)
    return h_nF[:, start.order.to(h_nF.device)] * gate_nF


def outputs(start: Start, record: FFNRecord, w2_DF: Tensor, moe: MoEConfig) -> Tensor:
    """What the started layer gives, without the dense b2: [n, D]."""
    if start.w2 is None or start.b2 is None:
        return gated(start, record, moe) @ w2_DF.float()[:, start.order.to(w2_DF.device)].t()
    return gated(start, record, moe) @ start.w2.t() + start.b2
