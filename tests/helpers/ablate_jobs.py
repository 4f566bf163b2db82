"""For the tests of `d2m ablate`: its smallest setting, and tasks for `distill.study.workers`: what
a spawned process can import quickly."""

from __future__ import annotations

import time
from pathlib import Path

ONE = {"steps": 1, "batch_size": 4, "lr": 2e-3, "log_every": 5}
SMALL = {
    "teacher": {
        "num_layers": 2,
        "num_single_layers": 4,
        "heads": 2,
        "head_dim": 8,
        "rope": [4, 2, 2],
        "train": {**ONE, "steps": 2},
    },
    "structure": {"moe": {"top_k": 2}, "dense_double_blocks": []},
    "other": {
        "moe": {"shared_ratio": 0.5, "num_experts": 14, "top_k": 4},
        "dense_double_blocks": [],
    },
    "groups": {
        "shallow": {"double_groups": [[0, 1]]},
        "deep": {"double_groups": [[0, 1]], "single_groups": [[0, 1]]},
        "4x3": {"single_groups": [[0, 1], [2, 3]]},
        "2x6": {"single_groups": [[0, 1, 2, 3]], "active": 2},
        "1x12": {"single_groups": [[0, 1, 2, 3]], "active": 2},
    },
    "shared": {"stage": "shared", "train": ONE},
    "moe": {"stage": "moe", "train": ONE},
    "mob": {"stage": "mob", "train": ONE},
    "hyper": {"grid": [1.0, 0.5], "substeps": 2, "train": ONE},
    "search": {"rates": [2e-3]},
    "seeds": [0, 1],
    "evaluate": {"held_out": 16, "per_prompt": 2, "sample_steps": 2, "reference_steps": 3},
    "importance_batches": 1,
    "importance_samples": 4,
}


def double(job: dict) -> dict:
    """Twice `value`, after `wait` seconds; in the folder `marks` it leaves "begun" and "left"."""
    marks = Path(job["marks"]) if "marks" in job else None
    try:
        if marks:
            (marks / "begun").touch()
        time.sleep(job.get("wait", 0))
        return {"value": 2 * job["value"]}
    finally:
        if marks:
            (marks / "left").touch()


def fail(job: dict) -> dict:
    """What `double` does with a `value`; without one an error, once a task has begun in `marks`."""
    if "value" in job:
        return double(job)
    while not (Path(job["marks"]) / "begun").exists():
        time.sleep(0.05)
    raise KeyError("value")
