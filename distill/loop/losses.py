"""Losses of section 3.2: output distillation (7), block features (8-9), balance, total (10).

Shapes: T tokens (or samples, for MoB), E experts (or blocks of a group), K chosen of them.
All losses are computed in fp32 whatever the models run in, and none of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2m_kernels import Routing
from d2m_models.mob import MoBRouting

Features = Mapping[str, Sequence[Tensor]]


def distill_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Eq. (7): mean over all elements of (f_tea - f_stu)^2."""
    return (teacher.detach().float() - student.float()).square().mean()


def feature_terms(teacher: Features, student: Features) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Names ("block/0" image, "block/1" text), ||f_tea - f_stu||^2 (mean over elements, with
    gradient) and ||f_tea||_2; [L] each.

    Every tensor of a block counts as a layer of its own: a double block has an image and a text
    feature whose scales differ.

    Args:
        teacher, student: block name -> its features; the teacher may have more blocks.
    """
    absent = [name for name in student if name not in teacher]
    if absent or not student:
        raise ValueError(f"the teacher has no feature named {absent}" if absent else "no features")
    names, errors, norms = [], [], []
    for name, features in student.items():
        if len(features) != len(teacher[name]):
            raise ValueError(
                f"block {name} has {len(features)} features, the teacher's {len(teacher[name])}"
            )
        for i, (tea, stu) in enumerate(zip(teacher[name], features, strict=True)):
            tea = tea.detach()
            names.append(f"{name}/{i}")
            errors.append(_MeanSquare.apply(tea, stu))
            norms.append(torch.linalg.vector_norm(tea.float()))
    return tuple(names), torch.stack(errors), torch.stack(norms)


class _MeanSquare(torch.autograd.Function):
    """mean (f_tea - f_stu)^2 in fp32 that saves the two features as they are.

    Both are kept anyway; autograd would add an fp32 difference, 57 MB a feature and sample for FLUX
    at 1024 x 1024, 3.2 GB in all.
    """

    @staticmethod
    def forward(ctx, tea: Tensor, stu: Tensor) -> Tensor:
        ctx.save_for_backward(tea, stu)
        return (tea.float() - stu.float()).square().mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        tea, stu = ctx.saved_tensors
        with torch.autocast(stu.device.type, enabled=False):
            difference = tea.float() - stu.float()
            return None, -((grad / stu.numel()) * (2 * difference)).to(stu.dtype)


def reduce_features(weights_L: Tensor, errors_L: Tensor, reduction: str) -> Tensor:
    """Eq. (8): sum_l w_l ||f_tea^l - f_stu^l||^2, or its mean over the layers that count."""
    loss = (weights_L * errors_L).sum()
    return loss / (weights_L > 0).sum().clamp(min=1) if reduction == "mean" else loss


@torch.no_grad()
def feature_weights(distill: Tensor, errors_L: Tensor, norms_L: Tensor) -> Tensor:
    """Eq. (9), w_l = |L_distill| / |L_feature^l| * (sum_m ||f_tea^m||_2) / (L ||f_tea^l||_2), [L].

    w_l is detached; otherwise w_l * L_feature^l would be constant in the features and their
    gradient would vanish. Layers that equal the teacher's exactly (dense blocks in front) have no
    direction to be pulled in and leave both sums, L included. All arguments are fp32.
    """
    live_L = (errors_L > 0) & (norms_L > 0)
    total = torch.where(live_L, norms_L, 0).sum()
    scale_L = distill.float().abs() * total / (live_L.sum() * norms_L * errors_L)
    return torch.where(live_L, scale_L, 0)


def balance_loss(load_E: Tensor, gate_TE: Tensor) -> Tensor:
    """sum_i (share of slots that chose i) * E * (mean gate of i), before eq. (10); 1 when even.

    Args:
        load_E: slots that chose each expert, in any unit; carries no gradient.
        gate_TE: g of every token that was routed.
    """
    load_E = load_E.detach().to(torch.float32)
    share_E = load_E / load_E.sum().clamp(min=1)
    return load_E.numel() * (share_E * gate_TE.float().mean(0)).sum()


def _variant(variant: str, top_k: int) -> str:
    """ "weights": the paper's g (eq. 3: renormalised over the chosen, 0 elsewhere). "softmax": all
    probabilities. "auto": "weights" unless one is chosen, whose g is always 1, of gradient 0.
    """
    if variant == "auto":
        return "softmax" if top_k == 1 else "weights"
    return variant


@dataclass(frozen=True)
class Balance:
    """What one layer's (or MoB group's) balance loss is made of.

    gate [T, E]: g of every token (or sample), with gradient. load [E]: slots that chose each.
    tokens: how many were routed; fewer than T where tokens are masked.
    """

    gate: Tensor
    load: Tensor
    tokens: Tensor

    def loss(self, load_E: Tensor, tokens: Tensor) -> Tensor:
        """These tokens' share of the balance loss of all those that `load_E`, `tokens` count."""
        # balance_loss takes the mean over all rows; rescale to the tokens that were not masked
        return balance_loss(load_E, self.gate) * (self.gate.shape[0] / tokens)


def moe_terms(routing: Routing, variant: str = "auto") -> Balance:
    """Of one MoE layer, over its own tokens; masked ones do not count."""
    top_k = routing.ids.shape[1]
    tokens = (routing.offsets[-1] // max(top_k, 1)).clamp(min=1)
    if _variant(variant, top_k) == "softmax":
        gate_TE = routing.probs
    else:
        ids_TK = routing.ids.clamp(min=0).long()  # masked tokens: id -1, weight 0
        gate_TE = torch.zeros_like(routing.probs).scatter_add(1, ids_TK, routing.weights)
    return Balance(gate_TE, routing.offsets.diff(), tokens)


def mob_terms(mob: MoBRouting, variant: str = "auto") -> Balance:
    """Of one MoB group, over samples; probs [B, m], ids [B, kappa]."""
    probs_BE, ids_BK = mob.probs, mob.ids.long()
    load_E = torch.nn.functional.one_hot(ids_BK, probs_BE.shape[1]).sum((0, 1))
    gate_BE = probs_BE
    if _variant(variant, ids_BK.shape[1]) == "weights":
        chosen = probs_BE.gather(1, ids_BK)
        weights = chosen / chosen.sum(1, keepdim=True)
        gate_BE = torch.zeros_like(probs_BE).scatter(1, ids_BK, weights)
    return Balance(gate_BE, load_E, load_E.new_tensor(len(ids_BK)))


def mean_balance(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """Mean over layers, so that lambda_balance means the same at any depth; 0 without layers."""
    return torch.stack(list(terms)).mean() if terms else like.new_zeros(())


def total_loss(
    distill: Tensor, feature: Tensor, balance: Tensor, feature_weight: float, balance_weight: float
) -> Tensor:
    """Eq. (10): L_distill + lambda_feature L_feature + lambda_balance L_balance."""
    return distill + feature_weight * feature + balance_weight * balance
