"""The table of docs/models.md: every transformer of diffusers, and what became of it."""

from __future__ import annotations

import json
from pathlib import Path

from distill.families.registry import FAMILIES


def table(file: Path) -> tuple[list[str], list[list[str]]]:
    """From the rows that `benchmarks/every_dit.py` has written."""
    rows, known = [], {name for family in FAMILIES for name in family.transformers}
    for name, row in json.loads(file.read_text(encoding="utf-8"))["rows"].items():
        lists = row["mob"]
        served = [blocks for blocks, reason in lists.items() if not reason]
        rows.append(
            [
                name,
                str(row["converted"]),
                str(len(row["skipped"]) or ""),
                f"{row['error']:.0e}".replace("e-0", "e-").replace("0e+00", "0")
                if "error" in row
                else "",
                "yes" if served and len(served) == len(lists) else ", ".join(served) or "no",
                "yes" if name in known else "",
            ]
        )
    return ["class", "FFNs converted", "named", "recovery error", "MoB", "distil"], rows


def below(file: Path) -> str:
    """What stands under the table: totals, classes that were not tried, reasons."""
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = found["rows"]
    whole = sum(bool(row["converted"]) and not row["skipped"] for row in rows.values())
    left_out = "; ".join(f"{name}, {why}" for name, why in found["left_out"].items())
    return (
        f"diffusers {found['diffusers']}: of {len(rows)} classes {whole} convert whole. "
        f"Not tried: {left_out}."
    )
