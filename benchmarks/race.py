"""Timing that survives a noisy machine: all contenders in turn, round after round, in one process.

A ratio is the median over rounds of (contender / baseline in the same round), so that a machine
that slows down for a second slows both sides of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


@dataclass
class Race:
    """Seconds of every contender in every round."""

    times: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratio(self, name: str, baseline: str) -> float:
        pairs = zip(self.times[name], self.times[baseline], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def spread(self, name: str, baseline: str) -> tuple[float, float]:
        """First and third quartile of the ratio."""
        pairs = list(zip(self.times[name], self.times[baseline], strict=True))
        ratios = sorted(a / b for a, b in pairs)
        return ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]


def race_with(benchmark, name: str, contenders: dict[str, Callable], rounds: int, device):
    """Lets pytest-benchmark time `contenders[name]`; the others run in its setup, every round."""
    times = {other: [] for other in contenders}
    for contender in contenders.values():
        seconds(contender, device)

    def others():
        for other, contender in contenders.items():
            if other != name:
                times[other].append(seconds(contender, device))

    def ours():
        times[name].append(seconds(contenders[name], device))

    benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
    return Race(times)


def describe(benchmark, *, shape: str, gflop: float, gbyte: float, race: Race, name: str, **more):
    """What the JSON of a benchmark carries beside its times."""
    median = race.median(name)
    benchmark.extra_info.update(
        shape=shape,
        gflop=round(gflop, 4),
        gbyte=round(gbyte, 5),
        gflop_per_s=round(gflop / median, 2),
        gbyte_per_s=round(gbyte / median, 3),
        **more,
    )
