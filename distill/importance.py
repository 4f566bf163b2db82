"""First-order Taylor importance of every FFN neuron, eq. (6).

Shapes: F neurons, D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from d2m_models.conversion.flux import ffn_linears
from distill.data.batch import Batch


def neuron_importance(up: nn.Linear, down: nn.Linear, first: int) -> Tensor:
    """sum |g * w| over a neuron's weights: its w1 row, b1 entry and w2 column. [F] fp32."""

    def taylor(weight: Tensor) -> Tensor:
        return (weight.grad.float() * weight.detach().float()).abs()

    score_F = taylor(up.weight).sum(1) + taylor(down.weight)[:, first:].sum(0)
    return score_F if up.bias is None else score_F + taylor(up.bias)


def flow_matching_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The diffusion model's own loss on real data: mean (v(x_t, c, t) - (noise - x0))^2."""
    prediction = model(**batch.inputs()).sample
    return (prediction.float() - batch.velocity.float()).square().mean()


def _backward(model: nn.Module, batch: Batch | Iterable[Batch]) -> int:
    """Accumulates the gradient of the loss, times the number of rows if the batch comes in parts;
    returns that factor.
    """
    with torch.enable_grad():
        if isinstance(batch, Batch):
            flow_matching_loss(model, batch).backward()
            return 1
        rows = 0
        for part in batch:
            (flow_matching_loss(model, part) * len(part)).backward()
            rows += len(part)
        return rows


def taylor_importance(
    model: nn.Module, batches: Iterable[Batch | Iterable[Batch]]
) -> dict[str, Tensor]:
    """Eq. (6), I_i = |dL/dw_i w_i|, summed over each neuron's weights and over batches.

    L is the flow-matching loss on real data. The distillation loss would not do: it and its
    gradient are zero where importance is needed, at the teacher's own weights.

    Args:
        model: the dense teacher, in any training mode; its gradients are cleared afterwards.
        batches: each gives one gradient; |g w| is summed, not the gradients. A batch that does not
            fit into memory is given as its parts, one after another.

    Returns:
        FFN name -> scores [F] fp32 on the CPU, larger = more important.
    """
    linears = ffn_linears(model)
    weights = [p for up, down, _ in linears.values() for p in (up.weight, up.bias, down.weight)]
    frozen = [p for p in weights if p is not None and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    scores: dict[str, Tensor] = {}
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            rows = _backward(model, batch)
            for name, (up, down, first) in linears.items():
                score = neuron_importance(up, down, first).cpu() / rows
                scores[name] = scores[name] + score if name in scores else score
    finally:
        model.zero_grad(set_to_none=True)
        for p in frozen:
            p.requires_grad_(False)
    if not scores:
        raise ValueError("taylor_importance got no batches; it needs at least one")
    return scores
