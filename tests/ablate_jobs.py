"""Tasks for the tests of `distill.ablate_workers`: what a spawned process can import quickly."""

from __future__ import annotations

import time


def double(job: dict) -> dict:
    """Twice `value`, after `wait` seconds."""
    time.sleep(job.get("wait", 0))
    return {"value": 2 * job["value"]}
