"""Verdicts on claims: the rule, the file claims.json, and the table of it in docs/claims.md.

The rule. A claim says that one measured value, `low`, is lower than another, `high`: the error of
the method said to be better, or what chance gives. Both are measured under the same seeds, and seed
s gives the paired effect

    d_s = ln(high_s / low_s)    "log", for errors: positive if the claim is right, in any unit
    d_s = high_s - low_s        "linear", for the rest

With mean m, standard deviation sd and standard error se = sd / sqrt(n) over n seeds and t the 95%
quantile of Student's t with n - 1 degrees of freedom (2.92 for three seeds; a one-sided t-test at
5% in either direction):

    holds           m >  t se
    does not hold   m < -t se
    undecided       otherwise, always with fewer than two seeds or a value that is not finite
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from distill.errors import CheckpointError

SCHEMA = "dense2moe-claims/1"
VERDICTS = ("holds", "does not hold", "undecided")
LEVEL = 0.95
RULE = (
    "Paired over seeds; effect = ln(high / low) or high - low, positive as claimed; "
    "holds if its mean exceeds t standard errors, t the 95% quantile of Student's t (2.92 for "
    "three seeds), does not hold if it is as far below zero, else undecided."
)


def effects(low: Sequence[float], high: Sequence[float], scale: str) -> list[float]:
    """d_s of every seed; scale "log" or "linear". NaN where an error is not positive."""
    if scale not in ("log", "linear"):
        raise ValueError(f"scale is {scale!r}; expected 'log' or 'linear'")
    if len(low) != len(high):
        raise ValueError(f"{len(low)} and {len(high)} values cannot be paired")
    pairs = list(zip(low, high, strict=True))
    if scale == "linear":
        return [b - a for a, b in pairs]
    return [math.log(b / a) if a > 0 and b > 0 else math.nan for a, b in pairs]


def critical(n: int) -> float:
    """The 95% quantile of Student's t for n paired values."""
    from scipy.stats import t

    return float(t.ppf(LEVEL, n - 1))


def verdict(values: Sequence[float]) -> str:
    """One of VERDICTS for the effects of all seeds; equal effects decide unless they are zero."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return "undecided"
    centre, error = mean(values), stdev(values) / math.sqrt(len(values))
    if abs(centre) <= critical(len(values)) * error or centre == 0:
        return "undecided"
    return "holds" if centre > 0 else "does not hold"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as a comparison of two measured values.

    claim: what is said. source: where. low, high: names of measured values,
    "comparator" or "comparator:value" (default value: rel_mse). scale: see `effects`.
    """

    claim: str
    source: str
    low: str
    high: str
    scale: str = "log"


def judge(claim: Claim, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """One entry of claims.json from rows[seed][comparator][value]."""
    seeds = list(rows)
    found = {name: [value_of(rows[s], name) for s in seeds] for name in (claim.low, claim.high)}
    values = effects(found[claim.low], found[claim.high], claim.scale)
    known = bool(values) and all(map(math.isfinite, values))
    return {
        "claim": claim.claim,
        "source": claim.source,
        "verdict": verdict(values),
        "mean": mean(values) if known else None,
        "spread": stdev(values) if known and len(values) > 1 else None,
        "scale": claim.scale,
        "low": claim.low,
        "high": claim.high,
        "arms": {name: [_finite(v) for v in numbers] for name, numbers in found.items()},
    }


def value_of(row: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """The value "comparator" or "comparator:value" of one seed; NaN if it was not measured."""
    comparator, _, value = name.partition(":")
    return float(row.get(comparator, {}).get(value or "rel_mse", math.nan))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def read(path: Path | str) -> dict[str, Any]:
    """claims.json; what is none is refused: every entry has a verdict and its numbers."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise CheckpointError(f"cannot read {path}: {err}") from err
    if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
        raise CheckpointError(f"expected a file of schema {SCHEMA!r}, written by `d2m ablate`")
    for key in ("complete", "seeds", "environment", "rule", "claims"):
        if key not in content:
            raise CheckpointError(f"claims.json lacks the key {key!r}")
    for entry in content["claims"]:
        missing = {"claim", "source", "verdict", "mean", "spread", "arms"} - set(entry)
        if missing or entry["verdict"] not in VERDICTS:
            raise CheckpointError(
                f"claims.json: entry {entry.get('claim')!r} lacks {sorted(missing)} or has a "
                f"verdict other than {VERDICTS}"
            )
    return content


def effect_text(entry: Mapping[str, Any]) -> str:
    """The effect for people: a ratio of errors with its spread as a factor, or a difference."""
    if entry["mean"] is None:
        return "not measured"
    spread = entry["spread"]
    if entry["scale"] == "log":
        tail = "" if spread is None else f" (×/÷ {math.exp(spread):.2f})"
        return f"{math.exp(entry['mean']):.2f}×{tail}"
    return f"{entry['mean']:+.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: verdict, claim, source, effect."""
    header = ["verdict", "claim", "paper", "ratio of errors, or difference"]
    rows = [[c["verdict"], c["claim"], c["source"], effect_text(c)] for c in content["claims"]]
    return header, rows
