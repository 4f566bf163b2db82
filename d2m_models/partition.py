"""Which neuron goes where: orders of an FFN's neurons, and the permutation that applies them.

Shapes: D width, F neurons of the dense FFN, S shared neurons, R = F - S routed ones, E experts,
H = R / E neurons of one expert, n calibration tokens.

An order is a LongTensor[F] that maps new position -> dense neuron; positions are laid out as
[ shared | expert 0 | ... | expert E-1 ], the layout `d2m_kernels.moe_ffn` reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def _check_split(hidden: int, shared: int, num_experts: int) -> int:
    """H, or an error if [shared | E equal experts] does not fill `hidden` neurons."""
    for name, value, low in (("shared", shared, 0), ("num_experts", num_experts, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an int >= {low}, got {value!r}")
    routed = hidden - shared
    if routed < num_experts or routed % num_experts:
        raise ValueError(
            f"{hidden} neurons less {shared} shared leave {routed}, "
            f"which do not divide into {num_experts} equal experts"
        )
    return routed // num_experts


def _check_scores(importance_F: Tensor) -> Tensor:
    if not isinstance(importance_F, Tensor) or importance_F.ndim != 1:
        found = (
            tuple(importance_F.shape) if isinstance(importance_F, Tensor) else type(importance_F)
        )
        raise ValueError(f"importance must be a tensor [F] with one score a neuron, got {found}")
    scores_F = importance_F.detach().double().cpu()
    if not torch.isfinite(scores_F).all():
        bad = int((~torch.isfinite(scores_F)).sum())
        raise ValueError(f"importance has {bad} scores that are NaN or infinite")
    return scores_F


def neuron_order_from_importance(importance_F: Tensor, shared: int, num_experts: int) -> Tensor:
    """The paper's way (section 3.2): the most important neurons are shared, the rest dealt evenly.

    The S best-scored neurons form the shared expert. The others, by falling score, are dealt to
    the experts in snake order (0..E-1, then E-1..0, ...), so experts have the same size and nearly
    the same total importance. Ties go to the lower neuron index.

    Args:
        importance_F: one score a neuron, e.g. the Taylor metric of eq. 6 summed over its weights.
        shared: S. num_experts: E.

    Returns:
        LongTensor[F] on the CPU, new position -> dense neuron.
    """
    scores_F = _check_scores(importance_F)
    size = _check_split(scores_F.numel(), shared, num_experts)
    ranked_F = scores_F.argsort(descending=True, stable=True)
    rounds_HE = ranked_F[shared:].view(size, num_experts).clone()
    rounds_HE[1::2] = rounds_HE[1::2].flip(1)
    return torch.cat([ranked_F[:shared], rounds_HE.t().reshape(-1)])


def random_neuron_order(hidden: int, shared: int, num_experts: int, generator=None) -> Tensor:
    """A random split: the baseline of the paper's Table 5. LongTensor[F]."""
    _check_split(hidden, shared, num_experts)
    return torch.randperm(hidden, generator=generator)


def coactivation_neuron_order(
    importance_F: Tensor, activation_nF: Tensor, shared: int, num_experts: int, iterations: int = 10
) -> Tensor:
    """Shared neurons by importance, experts by co-activation (beyond the paper).

    Routed neurons are clustered by the direction of their activation magnitudes over calibration
    tokens (balanced spherical k-means: neurons with the clearest preference choose first, a full
    expert takes no more), so neurons that fire together share an expert.

    Args:
        importance_F: as for `neuron_order_from_importance`, which also gives the starting clusters.
        activation_nF: activations of the dense FFN on n tokens, after the non-linearity.

    Returns:
        LongTensor[F]; neurons of one expert stay in falling importance.
    """
    start_F = neuron_order_from_importance(importance_F, shared, num_experts)
    if activation_nF.ndim != 2 or activation_nF.shape[1] != start_F.numel():
        raise ValueError(
            f"activation must be [n, F={start_F.numel()}], got {tuple(activation_nF.shape)}"
        )
    size = (start_F.numel() - shared) // num_experts
    routed_R = start_F[shared:]
    profile_Rn = activation_nF.detach().cpu().float().abs().t()[routed_R]
    profile_Rn = torch.nn.functional.normalize(profile_Rn, dim=1)
    expert_R = torch.arange(num_experts).repeat_interleave(size)
    for _ in range(iterations):
        centre_En = torch.zeros(num_experts, profile_Rn.shape[1]).index_add_(
            0, expert_R, profile_Rn
        )
        similarity_RE = profile_Rn @ torch.nn.functional.normalize(centre_En, dim=1).t()
        updated_R = _balanced_assignment(similarity_RE, size)
        if torch.equal(updated_R, expert_R):
            break
        expert_R = updated_R
    score_F = importance_F.detach().double().cpu()
    by_score_R = score_F[routed_R].argsort(descending=True, stable=True)
    by_expert_R = by_score_R[expert_R[by_score_R].argsort(stable=True)]
    return torch.cat([start_F[:shared], routed_R[by_expert_R]])


def cluster_neuron_order(
    shared_score_F: Tensor, score_CF: Tensor, shared: int, num_experts: int, copies: bool = False
) -> Tensor:
    """Shared neurons by score, the others to the cluster of tokens that they serve most.

    Each of C clusters owns E / C experts; a neuron goes where the largest share of its score lies
    (clearest preference first, a full cluster takes no more).

    Args:
        shared_score_F: one score a neuron over all tokens. score_CF: over each cluster's tokens.
        copies: every cluster takes the neurons of its highest scores, whoever else has them; those
            that no cluster takes are left out.

    Returns:
        LongTensor[F]; the neurons of one cluster in falling score, dealt to its experts in turn.
    """
    scores_F = _check_scores(shared_score_F)
    size = _check_split(scores_F.numel(), shared, num_experts)
    clusters = len(score_CF)
    if not clusters or num_experts % clusters or score_CF.shape[1:] != scores_F.shape:
        raise ValueError(
            f"score is {tuple(score_CF.shape)}; expected [C, {scores_F.numel()}] with C clusters "
            f"that divide {num_experts} experts"
        )
    each = num_experts // clusters
    ranked_F = scores_F.argsort(descending=True, stable=True)
    routed_R = ranked_F[shared:]
    score_RC = score_CF.detach().double().cpu().t()[routed_R]
    if copies:
        best_CR = score_RC.t().argsort(dim=1, descending=True, stable=True)[:, : size * each]
        parts = [routed_R[best_R].view(size, each).t().reshape(-1) for best_R in best_CR]
        return torch.cat([ranked_F[:shared], *parts])
    share_RC = score_RC / score_RC.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cluster_R = _balanced_assignment(share_RC, size * each)
    parts = [routed_R[cluster_R == c].view(size, each).t().reshape(-1) for c in range(clusters)]
    return torch.cat([ranked_F[:shared], *parts])


def _balanced_assignment(similarity_RE: Tensor, capacity: int) -> Tensor:
    """Cluster of each row: clearest preference first, to the most similar cluster with room."""
    preference_RE = similarity_RE.argsort(dim=1, descending=True, stable=True)
    best_R2 = similarity_RE.topk(min(2, similarity_RE.shape[1]), dim=1).values
    rows = (best_R2[:, 0] - best_R2[:, -1]).argsort(descending=True, stable=True).tolist()
    room = [capacity] * similarity_RE.shape[1]
    choices, cluster_R = preference_RE.tolist(), [0] * len(rows)
    for row in rows:
        for cluster in choices[row]:
            if room[cluster]:
                room[cluster] -= 1
                cluster_R[row] = cluster
                break
    return torch.tensor(cluster_R)


def check_order(
    order_F: Tensor, hidden: int, name: str = "neuron_order", copies: bool = False
) -> Tensor:
    """`order_F` as int64 on the CPU if it is a permutation of 0..hidden-1, or with `copies` any
    choice of them; else an error."""
    if not isinstance(order_F, Tensor) or order_F.ndim != 1 or order_F.is_floating_point():
        found = (
            f"{order_F.dtype} {tuple(order_F.shape)}"
            if isinstance(order_F, Tensor)
            else type(order_F).__name__
        )
        raise ValueError(f"{name} must be an integer tensor [{hidden}], got {found}")
    order_F = order_F.detach().to("cpu", torch.int64)
    inside = order_F.numel() == hidden and bool(((order_F >= 0) & (order_F < hidden)).all())
    if not (inside and (copies or is_permutation(order_F))):
        raise ValueError(
            f"{name} must hold each of 0..{hidden - 1} once; got {order_F.numel()} entries, "
            f"{order_F.unique().numel()} of them different"
        )
    return order_F


def is_permutation(order_F: Tensor) -> bool:
    """Whether every neuron is there once."""
    ranks_F = torch.arange(order_F.numel(), device=order_F.device)
    return torch.equal(order_F.long().sort().values, ranks_F)


def check_orders(
    orders: Mapping[str, Tensor], widths: Mapping[str, int], copies: bool = False
) -> dict[str, Tensor]:
    """Every order by FFN name, checked; widths: F of the FFNs that may have one."""
    return {
        name: check_order(orders[name], width, f"neuron_order[{name!r}]", copies)
        for name, width in widths.items()
        if name in orders
    }


def inverse_order(order_F: Tensor) -> Tensor:
    """dense neuron -> new position: `order[inverse[i]] == i`. LongTensor[F]."""
    order_F = check_order(order_F, order_F.numel(), "order")
    return torch.empty_like(order_F).scatter_(0, order_F, torch.arange(order_F.numel()))


def permute_neurons(
    weight: Tensor, order_F: Tensor, dim: int, first: int = 0, stacks: int = 1
) -> Tensor:
    """A copy of `weight` whose neurons along `dim` lie in the given order.

    Args:
        weight: w1 [F, D] or b1 [F] with dim=0, w2 [D, F] with dim=1.
        order_F: new position -> old position.
        first: where the neurons begin along `dim`; FLUX's single-stream `proj_out` has D attention
            columns before them.
        stacks: 2 for a gated w1 [2F, D], whose two halves are permuted alike.
    """
    hidden = order_F.numel()
    if weight.shape[dim] != first + stacks * hidden:
        raise ValueError(
            f"weight {tuple(weight.shape)} has {weight.shape[dim]} entries along dim {dim}, "
            f"expected {first} + {stacks} x {hidden}"
        )
    order_F = order_F.to(weight.device, torch.int64)
    parts = [torch.arange(first, device=weight.device)]
    parts += [first + s * hidden + order_F for s in range(stacks)]
    return weight.detach().index_select(dim, torch.cat(parts))
