"""The order of samples as a closed formula of (seed, epoch, index): nothing is stored or shuffled.

Samples live in buckets of one resolution each, n_b samples in bucket b. A bucket's stream is one
permutation of it after another, one an epoch, cut into global batches of B: batch k of bucket b is
positions kB .. kB + B - 1, and position p is entry p mod n_b of epoch p div n_b. Epoch e of the run
has those batches whose first position is in epoch e,

    k = ceil(e n_b / B) .. ceil((e + 1) n_b / B) - 1   of every bucket b,

N_b in number, in even turns: the i-th of them is due at (2i + 1) / (2 N_b) of the epoch. So before
epoch e begins, C(e) = sum_b ceil(e n_b / B) batches were given, and with them every sample at least
e times and, but for the last batch of each bucket, at most e times, whatever number of ranks shares
the batches. Within an epoch all buckets are equally far, to a few batches, whatever B is: a stage
with another B goes on where the one before stopped (with one bucket exactly).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

ROUNDS = 6


def key(*parts: int | str) -> int:
    """64 bits that are unrelated for unequal parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def permute(index: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Entries `index` [I] of a permutation of range(size): a Feistel network on 2h >= log2(size)
    bits; values outside the range walk on until they are inside.
    """
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    mask, x = np.uint64((1 << half) - 1), index.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        left, right = x[outside] >> np.uint64(half), x[outside] & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (_mix(right, key(seed, r)) & mask)
        x[outside] = (left << np.uint64(half)) | right
        outside = x >= size
    return x.astype(np.int64)


def _mix(x: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64's finaliser."""
    z = x + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _turn(numbers: Sequence[int], slot: int) -> tuple[int, int]:
    """(b, i) of the batch that is the slot-th to be due, where batch i of bucket b, of N_b =
    numbers[b] in all, is due at (2i + 1) / (2 N_b), and at the same time the first bucket's first.
    """

    def before(bucket: int, own: int) -> int:
        """How many are due before batch `own` of the bucket."""
        total = own
        for other, number in enumerate(numbers):
            if other != bucket:
                # (2j + 1) N_b < (2i + 1) N_c, or equal, if the other bucket comes first
                last = ((2 * own + 1) * number - (other > bucket)) // numbers[bucket]
                total += min((last + 1) // 2, number)
        return total

    for bucket, number in enumerate(numbers):
        own = bisect_left(range(number), slot, key=lambda i, b=bucket: before(b, i))
        if own < number and before(bucket, own) == slot:
            return bucket, own
    raise AssertionError("a slot lies beyond its epoch")


class BucketOrder:
    """Which samples global batch `step` holds, for buckets of `sizes` samples."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = list(sizes)

    def _begin(self, epoch: int, count: int) -> list[int]:
        """ceil(e n_b / B) of every bucket."""
        return [-(-epoch * n // count) for n in self.sizes]

    def batch(self, seed: int, step: int, count: int) -> tuple[int, int]:
        """(bucket, first position in its stream) of global batch `step` of `count` samples."""
        epoch = step * count // sum(self.sizes)  # at most one partial batch a bucket too late
        while sum(self._begin(epoch, count)) > step:
            epoch -= 1
        while sum(self._begin(epoch + 1, count)) <= step:
            epoch += 1
        begin, end = self._begin(epoch, count), self._begin(epoch + 1, count)
        numbers = [last - first for first, last in zip(begin, end, strict=True)]
        bucket, own = _turn(numbers, step - sum(begin))
        return bucket, (begin[bucket] + own) * count

    def samples(self, seed: int, bucket: int, positions: np.ndarray) -> np.ndarray:
        """Numbers 0 .. n_b - 1 of the samples at those positions [I] of the bucket's stream."""
        size = self.sizes[bucket]
        out = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(positions // size):
            here = positions // size == epoch
            own = key("samples", seed, bucket, int(epoch))
            out[here] = permute(positions[here] % size, size, own)
        return out
