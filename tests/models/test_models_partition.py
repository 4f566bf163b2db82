"""Neuron orders: who is shared, how the rest is dealt, and that permuting changes nothing."""

import pytest
import torch
from torch.nn import functional as F

from d2m_models.partition import (
    check_order,
    cluster_neuron_order,
    coactivation_neuron_order,
    inverse_order,
    is_permutation,
    neuron_order_from_importance,
    permute_neurons,
    random_neuron_order,
)


def test_best_neurons_are_shared_and_the_rest_dealt_evenly():
    score = torch.rand(1200, generator=torch.Generator().manual_seed(0))
    order = neuron_order_from_importance(score, 200, 10)
    assert torch.equal(order.sort().values, torch.arange(1200))
    assert score[order[:200]].min() >= score[order[200:]].max()
    totals = score[order[200:]].view(10, 100).sum(1)
    assert (totals.max() - totals.min()) / totals.mean() < 0.005
    # plain round-robin would leave expert 0 visibly richer than the last
    ranked = score.sort(descending=True).values[200:].view(100, 10).sum(0)
    assert ranked.max() - ranked.min() > 3 * (totals.max() - totals.min())


def test_ties_go_to_the_lower_neuron():
    order = neuron_order_from_importance(torch.ones(8), 2, 2)
    assert order.tolist() == [0, 1, 2, 5, 6, 3, 4, 7]


def test_random_order_is_a_permutation_and_seeded():
    draw = [random_neuron_order(64, 16, 4, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert torch.equal(draw[0].sort().values, torch.arange(64))


def test_coactivation_finds_planted_clusters():
    g = torch.Generator().manual_seed(0)
    shared, experts, size = 8, 4, 16
    member = torch.arange(experts).repeat_interleave(size)[torch.randperm(64, generator=g)]
    group_on = (torch.rand(500, experts, generator=g) < 0.3).float()
    routed = group_on[:, member] * torch.rand(500, 64, generator=g) + 0.01
    activation = torch.cat([torch.rand(500, shared, generator=g), routed], dim=1)
    importance = torch.cat([torch.full((shared,), 9.0), torch.rand(64, generator=g)])
    order = coactivation_neuron_order(importance, activation, shared, experts)
    assert torch.equal(order.sort().values, torch.arange(72))
    assert set(order[:shared].tolist()) == set(range(shared))
    clusters = member[order[shared:] - shared].view(experts, size)
    assert (clusters == clusters[:, :1]).all()


@pytest.mark.parametrize("gated", [False, True])
def test_permuted_ffn_computes_the_same(gated):
    g = torch.Generator().manual_seed(0)
    w1 = torch.randn(24 * (1 + gated), 8, generator=g, dtype=torch.float64)
    w2 = torch.randn(8, 5 + 24, generator=g, dtype=torch.float64)
    x = torch.randn(3, 8, generator=g, dtype=torch.float64)
    order = torch.randperm(24, generator=g)

    def ffn(w1, w2):
        z = x @ w1.T
        h = z[:, :24] * F.silu(z[:, 24:]) if gated else F.silu(z)
        return h @ w2[:, 5:].T

    p1 = permute_neurons(w1, order, 0, stacks=1 + gated)
    p2 = permute_neurons(w2, order, 1, first=5)
    assert torch.equal(p2[:, :5], w2[:, :5])
    torch.testing.assert_close(ffn(p1, p2), ffn(w1, w2))
    assert torch.equal(permute_neurons(p1, inverse_order(order), 0, stacks=1 + gated), w1)
    assert torch.equal(permute_neurons(p2, inverse_order(order), 1, first=5), w2)


def test_clusters_share_out_neurons_or_hold_copies():
    shared_score = torch.tensor([9.0, 1, 1, 1, 1])  # neuron 0 is shared
    score = torch.tensor([[9.0, 4, 3, 2, 1], [9, 4, 1, 3, 2]])
    order = cluster_neuron_order(shared_score, score, 1, 2)
    assert order.tolist() == [0, 1, 2, 3, 4]  # each once
    order = cluster_neuron_order(shared_score, score, 1, 2, copies=True)
    assert order.tolist() == [0, 1, 2, 1, 3]  # both clusters want 1, none wants 4 most
    assert not is_permutation(order) and torch.equal(check_order(order, 5, copies=True), order)
    with pytest.raises(ValueError, match="once"):
        check_order(order, 5)
    # a cluster's neurons are dealt to its experts in turn
    score = torch.tensor([[0.0, 5, 4, 3, 2, 1, 1, 1, 1], [0.0, 1, 1, 1, 1, 2, 3, 4, 5]])
    order = cluster_neuron_order(score.sum(0) + torch.eye(9)[0] * 99, score, 1, 4, copies=True)
    assert order.tolist() == [0, 1, 3, 2, 4, 8, 6, 7, 5]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: neuron_order_from_importance(torch.rand(4, 2), 1, 1), "importance"),
        (lambda: neuron_order_from_importance(torch.full((4,), torch.nan), 1, 1), "NaN"),
        (lambda: neuron_order_from_importance(torch.rand(10), 1, 2), "divide"),
        (lambda: neuron_order_from_importance(torch.rand(10), -1, 2), "shared"),
        (lambda: coactivation_neuron_order(torch.rand(8), torch.rand(3, 9), 2, 2), "activation"),
        (lambda: check_order(torch.tensor([0, 0, 1]), 3), "once"),
        (lambda: check_order(torch.rand(3), 3), "integer"),
        (lambda: check_order(torch.tensor([0, 0, 3]), 3, copies=True), "each of 0..2"),
        (lambda: permute_neurons(torch.rand(4, 4), torch.arange(3), 0), "4"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
