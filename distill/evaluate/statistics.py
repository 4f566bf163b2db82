"""Means with 95% bootstrap intervals, over prompts: images of one prompt are no independent draws.

A value per image has the key "PROMPT-IMAGE" (`key_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

RESAMPLES = 2000


def key_of(prompt: int, image: int) -> str:
    return f"{prompt:05d}-{image}"


def prompt_of(key: str) -> int:
    return int(key.split("-")[0])


def summarise(
    values: Mapping[str, float], groups: Mapping[int, str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Mean of the groups' means over prompts, its interval, and how many images there are.

    Args:
        values: a number an image. groups: prompt -> its group, where the benchmark averages over
            those first (GenEval's tasks, T2I-CompBench's categories); None: one group.
    """
    prompts: dict[str, dict[int, list[float]]] = {}
    for key, value in values.items():
        number = prompt_of(key)
        group = "" if groups is None else groups[number]
        prompts.setdefault(group, {}).setdefault(number, []).append(float(value))
    units = {g: np.array([np.mean(v) for v in p.values()]) for g, p in sorted(prompts.items())}
    means = {group: float(unit.mean()) for group, unit in units.items()}
    rng = np.random.default_rng(seed)
    draws = [
        np.mean([unit[rng.integers(len(unit), size=len(unit))].mean() for unit in units.values()])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    result = {"mean": float(np.mean(list(means.values()))), "interval": [float(low), float(high)],
              "images": len(values), "prompts": sum(map(len, units.values()))}  # fmt: skip
    return result if groups is None else {**result, "groups": means}


def paired(
    ours: Mapping[str, float], theirs: Mapping[str, float], groups: Mapping[int, str] | None = None
) -> dict[str, Any] | None:
    """`summarise` of ours - theirs on the images that both have, from the same prompt and noise."""
    both = {key: ours[key] - theirs[key] for key in ours if key in theirs}
    return summarise(both, groups) if both else None
