"""First-order Taylor importance of every FFN neuron, eq. (6).

Shapes: F neurons, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.config import AnyMoEConfig
from d2m_models.conversion.any_model import ffns, neuron_places
from d2m_models.conversion.flux import ffn_linears
from distill.data.batch import Batch

Place = tuple[Tensor, int, int, int]  # a parameter, its dimension of neurons, the first, how many


def neuron_importance(places: Sequence[Place]) -> Tensor:
    """sum |g * w| over a neuron's weights: w1 row (or rows), w2 column, b1 entry. [F] fp32.

    0 where an FFN does not act on the output (that of the last block's text, in some models).
    """

    def taylor(weight: Tensor, dim: int, first: int, hidden: int) -> Tensor:
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        each = (grad.float() * weight.detach().float()).abs().narrow(dim, first, hidden)
        return each if each.ndim == 1 else each.sum(1 - dim)

    score_F, *rest = (taylor(*place) for place in places)
    return sum(rest, score_F)


def ffn_places(model: nn.Module, structure: Any = None) -> dict[str, list[Place]]:
    """FFN name -> where its neurons' weights are, in a dense model.

    Args:
        structure: what the model is to become, an `AnyMoEConfig`; not needed for FLUX.1.
    """
    if not isinstance(structure, AnyMoEConfig):
        return {
            name: [
                (p, dim, first, up.out_features)
                for p, dim, first in ((up.weight, 0, 0), (down.weight, 1, column), (up.bias, 0, 0))
                if p is not None
            ]
            for name, (up, down, column) in ffn_linears(model).items()
        }
    params = dict(model.named_parameters())
    return {
        name: [
            (params[key], dim, first, layer.neuron_order.numel())
            for key, dim, first in neuron_places(name, layer)
        ]
        for name, layer in ffns(model, structure).items()
    }


def flow_matching_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss on real data, for flow mean (v(x_t, c, t) - (noise - x0))^2."""
    prediction = batch.family.predicted(model(**batch.inputs()))
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
    model: nn.Module, batches: Iterable[Batch | Iterable[Batch]], structure: Any = None
) -> dict[str, Tensor]:
    """Eq. (6), I_i = |dL/dw_i w_i|, summed over each neuron's weights and over batches.

    L is the flow-matching loss on real data. The distillation loss would not do: it and its
    gradient are zero where importance is needed, at the teacher's own weights.

    Args:
        model: the dense teacher, in any training mode; its gradients are cleared afterwards.
        batches: each gives one gradient; |g w| is summed, not the gradients. A batch that does not
            fit into memory is given as its parts, one after another.
        structure: see `ffn_places`.

    Returns:
        FFN name -> scores [F] fp32 on the CPU, larger = more important.
    """
    found = ffn_places(model, structure)
    frozen = [p for places in found.values() for p, *_ in places if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    scores: dict[str, Tensor] = {}
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            rows = _backward(model, batch)
            for name, places in found.items():
                score = neuron_importance(places).cpu() / rows
                scores[name] = scores[name] + score if name in scores else score
    finally:
        model.zero_grad(set_to_none=True)
        for p in frozen:
            p.requires_grad_(False)
    if not scores:
        raise ValueError("taylor_importance got no batches; it needs at least one")
    return scores
