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

# On a GPU a round is the median of several calls, each after the L2 cache was overwritten: in a
# model the weights of one layer are long gone when it is that layer's turn again.
FLUSH_BYTES = 256 << 20
ENOUGH_SECONDS = 0.02


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """One call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


class Clock:
    """Seconds of one call: wall clock on a CPU, events on the stream on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = None
        if device.type == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def once(self, function: Callable[[], object]) -> float:
        return seconds_of(function, self.device)

    def several(self, function: Callable[[], object], calls: int) -> float:
        """GPU: median of `calls` calls. A pause and the flushes let the host run ahead by 0.1 ms a
        call, so that its cost counts only beyond that (or where it waits for the GPU)."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(200_000 * calls)  # clock cycles
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e-3

    def calls_for(self, seconds: float) -> int:
        if self.device.type != "cuda":
            return 1
        return max(1, min(20, round(ENOUGH_SECONDS / max(seconds, 1e-6))))

    def round(self, function: Callable[[], object], calls: int) -> float:
        return self.several(function, calls) if self.device.type == "cuda" else self.once(function)


@dataclass
class Race:
    """Seconds of every contender in every round."""

    times: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratios(self, name: str, baseline: str) -> list[float]:
        pairs = zip(self.times[name], self.times[baseline], strict=True)
        return sorted(a / b for a, b in pairs)

    def ratio(self, name: str, baseline: str) -> float:
        return statistics.median(self.ratios(name, baseline))

    def spread(self, name: str, baseline: str) -> tuple[float, float]:
        """First and third quartile of the ratio."""
        return quartiles(self.ratios(name, baseline))

    def to_json(self) -> dict[str, dict]:
        return {name: summary(times) for name, times in self.times.items()}


def quartiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def summary(times: list[float]) -> dict:
    """Median, quartiles and every round, in seconds."""
    q1, q3 = quartiles(times)
    rounds = [float(f"{t:.5g}") for t in times]
    return {"median": statistics.median(rounds), "q1": float(f"{q1:.5g}"),
            "q3": float(f"{q3:.5g}"), "rounds": rounds}  # fmt: skip


def race(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    budget: float | None = None,
) -> Race:
    """Every contender once to warm up, then `rounds` rounds of all of them in turn.

    `budget`: seconds after which no further round starts (three are run in any case).
    """
    clock = Clock(device)
    calls = {}
    for name, function in contenders.items():
        clock.once(function)
        calls[name] = clock.calls_for(clock.once(function) if device.type == "cuda" else 1.0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds):
        if budget is not None and done >= 3 and time.perf_counter() - start > budget:
            break
        for name, function in contenders.items():
            times[name].append(clock.round(function, calls[name]))
    return Race(times)


def replay(benchmark, times: list[float]) -> None:
    """Gives measured rounds to pytest-benchmark, whose clock then shows exactly those seconds."""
    now, waiting = [0.0], list(times)

    def advance():
        now[0] += waiting.pop(0) if waiting else 0.0

    benchmark._timer = lambda: now[0]
    benchmark.pedantic(advance, rounds=len(times), iterations=1)
