"""Every sample once an epoch, in an order that is a formula of (seed, epoch, index)."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.configs.training import TrainConfig, first_batch
from distill.data.order import BucketOrder, _turn, key, permute


@given(size=st.integers(1, 700), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, seed):
    out = permute(np.arange(size), size, seed)
    assert sorted(out.tolist()) == list(range(size))
    assert permute(np.array([size - 1]), size, seed)[0] == out[-1]  # any entry by itself


def test_permute_mixes():
    size = 4096
    first, second = (permute(np.arange(size), size, key("a", i)) for i in (0, 1))
    # A random permutation has one fixed point on average and no memory of the order.
    assert (first == np.arange(size)).sum() < 8 and (first == second).sum() < 8
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.06
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


def test_permute_of_a_huge_range_needs_no_memory():
    out = permute(np.array([0, 1, 10**12 - 1]), 10**12, 7)
    assert len(set(out.tolist())) == 3 and out.min() >= 0 and out.max() < 10**12


def _seen(order, seed, steps, count):
    """Counts of (bucket, sample) over the batches of `steps`."""
    seen = Counter()
    for step in steps:
        bucket, first = order.batch(seed, step, count)
        for n in order.samples(seed, bucket, first + np.arange(count)):
            seen[bucket, int(n)] += 1
    return seen


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    count=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_as_often_as_epochs(sizes, count, seed):
    order = BucketOrder(sizes)
    for epochs in (1, 3):
        steps = sum(-(-epochs * n // count) for n in sizes)
        seen = _seen(order, seed, range(steps), count)
        for bucket, n in enumerate(sizes):
            times = [seen[bucket, i] for i in range(n)]
            # all of each bucket's epochs, and of the next ones no more than one batch's rest
            assert min(times) >= epochs
            assert sum(times) == -(-epochs * n // count) * count


def test_where_batches_fit_it_is_exactly_once():
    order = BucketOrder([24, 8, 16])
    assert set(_seen(order, 5, range(12), 4).values()) == {1}
    assert set(_seen(order, 5, range(12, 24), 4).values()) == {1}


def test_order_depends_on_the_seed_and_the_epoch():
    order = BucketOrder([64, 64])

    def batches(seed, steps):
        found = (order.batch(seed, s, 8) for s in steps)
        return [(b, tuple(order.samples(seed, b, p + np.arange(8)))) for b, p in found]

    first = batches(0, range(16))
    assert first == batches(0, range(16))
    assert first != batches(1, range(16)) and first != batches(0, range(16, 32))
    assert sorted(b for b, _ in first) == [0] * 8 + [1] * 8
    assert [b for b, _ in first] != sorted(b for b, _ in first)  # buckets are interleaved


def test_any_step_at_once():
    order = BucketOrder([10**9, 3 * 10**8, 7])
    bucket, first = order.batch(0, 10**10, 256)
    assert first % 256 == 0 and bucket in (0, 1, 2)
    numbers = order.samples(0, bucket, first + np.arange(256))
    assert len(set(numbers.tolist())) == 256


def test_turns_are_even_by_hand():
    """Due: a at 1/8, 3/8, 5/8, 7/8, b at 1/4, 3/4, c at 1/2; where equal, the first bucket."""
    assert [_turn([4, 2, 1], slot) for slot in range(7)] == [
        (0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (0, 3)]  # fmt: skip
    assert [_turn([2, 0, 2], slot) for slot in range(4)] == [(0, 0), (2, 0), (0, 1), (2, 1)]


@given(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any))
@settings(max_examples=60, deadline=None)
def test_turns_are_those_of_a_sorted_list(numbers):
    due = [(Fraction(2 * i + 1, 2 * n), b, i) for b, n in enumerate(numbers) for i in range(n)]
    assert [_turn(numbers, s) for s in range(len(due))] == [(b, i) for _, b, i in sorted(due)]


@pytest.mark.parametrize("sizes", [[1000], [600, 300, 100]])
@pytest.mark.parametrize("counts", [(40, 20), (20, 40)])
def test_another_batch_size_goes_on_where_the_last_stopped(sizes, counts):
    """In the same epoch: no sample twice with one bucket, with several few (190 at random)."""
    order = BucketOrder(sizes)
    before, after = counts
    train = TrainConfig(steps=400 // before, batch_size=before, lr=1.0)
    first = first_batch([train], after)
    one = _seen(order, 0, range(train.steps), before)
    two = _seen(order, 0, range(first, first + 400 // after), after)
    again = sum((one & two).values())
    assert one.total() == two.total() == 400
    assert again == 0 if len(sizes) == 1 else again <= 40


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_a_batch(ranks):
    order, count = BucketOrder([31, 12]), 6
    seen = Counter()
    for step in range(6 + 2):
        bucket, first = order.batch(3, step, count)
        for rank in range(ranks):
            own = np.arange(count)[rank * count // ranks : (rank + 1) * count // ranks]
            seen.update((bucket, int(n)) for n in order.samples(3, bucket, first + own))
    assert seen == _seen(order, 3, range(8), count)
