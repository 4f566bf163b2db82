"""What the benchmarks of single stages share: which shapes, and the record they leave."""

from __future__ import annotations

import pytest
from harness.shapes import NAMES, FFNShape, measured, named

all_shapes = pytest.mark.parametrize("name", NAMES)


def shape_for(name: str, bench) -> FFNShape:
    if not measured(name, bench.size, bench.device):
        pytest.skip(f"{name} is not in the {bench.size} set on {bench.device.type}")
    return named(name, bench.size)


def record(bench, stage: str, name: str, shape: FFNShape, race, gflop: float, gbyte: float,
           counts: dict) -> None:  # fmt: skip
    """One entry of "stages"; the first contender is ours, the others are peers."""
    ours, *others = race.times
    rates = bench.against_ceilings(race.median(ours), gflop, gbyte)
    ratios = {other: race.ratio(ours, other) for other in others}
    bench.add(
        "stages",
        f"{stage}/{name}/{shape.routing}",
        {
            "stage": stage,
            "name": name,
            "shape": shape.to_json(),
            "pass": "forward",
            "seconds": race.to_json(),
            "ratio_to": ratios,
            **rates,
            **counts,
            "backend": bench.backend(shape.dtype),
        },
        line=f"{stage:<18} {name:<11} {shape.routing:<9} {race.median(ours) * 1e6:>10.1f} us"
        f" {rates['tflops']:>8.3f} TFLOP/s {rates['gbps']:>8.1f} GB/s"
        f"  {rates['share_of_floor']:>5.0%} of the floor"
        + "".join(f"  {ratio:.2f} x {other}" for other, ratio in ratios.items()),
    )
