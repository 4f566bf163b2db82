"""How evenly the Triton kernels' tiles fill a GPU, by the simulation in harness/schedule.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from harness.schedule import GPUS, STAGES, TOKENS, utilisation

GOAL = 0.93
# What whole waves allow where they cannot reach it: few tiles, or equal ones that no order helps.
LESS = {
    ("up", "1536 H100"): 0.86, ("up", "1536 A100"): 0.76, ("up", "4608 H100"): 0.88,
    ("up", "4608 A100"): 0.89, ("up", "4096+512 H100"): 0.87, ("up", "4096+512 A100"): 0.89,
    ("down", "1536 H100"): 0.85, ("down", "1536 A100"): 0.88, ("down", "1536 H20"): 0.90,
    ("down", "4608 H100"): 0.92,
    ("down_combine", "1536 H100"): 0.54, ("down_combine", "1536 A100"): 0.66,
    ("down_combine", "1536 H20"): 0.91, ("down_combine", "4608 H100"): 0.81,
    ("down_combine", "4608 H20"): 0.91, ("down_combine", "4096+512 H100"): 0.81,
    ("down_combine", "4096+512 H20"): 0.91, ("act_bwd", "1536 H100"): 0.87,
    ("act_bwd", "1536 A100"): 0.85, ("act_bwd", "4608 H100"): 0.91, ("dx", "1536 H100"): 0.85,
    ("dx", "1536 H20"): 0.90, ("dx", "4608 H100"): 0.92, ("dx_combine", "1536 H100"): 0.54,
    ("dx_combine", "1536 A100"): 0.88, ("dx_combine", "1536 H20"): 0.91,
    ("dx_combine", "4608 H100"): 0.81, ("dx_combine", "4608 H20"): 0.91,
    ("dx_combine", "4096+512 H100"): 0.81, ("dx_combine", "4096+512 H20"): 0.91,
}  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("streams", TOKENS, ids=lambda s: "+".join(map(str, s)))
@pytest.mark.parametrize("stage", STAGES)
def test_the_multiprocessors_are_busy(stage, streams, gpu):
    drawn, rounds = utilisation(stage, streams, gpu), utilisation(stage, streams, gpu, False)
    assert drawn >= LESS.get((stage, f"{'+'.join(map(str, streams))} {gpu}"), GOAL)
    assert drawn >= rounds - 0.005
