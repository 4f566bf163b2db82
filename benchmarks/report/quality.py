"""The other half of Table 1: what `d2m evaluate` scored, joined to the table of costs.

Copies of models' scores.json, under any name, lie in the folder scores/ beside the results files.
"""

from __future__ import annotations

from pathlib import Path

from report.read import Table

from distill.evaluate.paper import QUALITY, TABLE1
from distill.evaluate.scores import cell, number, read_scores


def with_quality(table: Table, folder: Path | str) -> Table:
    """`tables.table1` with the paper's quality columns and ours, where there are scores of a
    model with the row's structure and steps; without any, the table as it is."""
    scores = [read_scores(path) for path in sorted((Path(folder) / "scores").glob("*.json"))]
    if not scores:
        return table
    header, rows = table
    header = [
        *header,
        *(f"{who}: {name}" for name in QUALITY.values() for who in ("paper", "ours")),
    ]
    joined = []
    for paper, row in zip(TABLE1, rows, strict=True):
        ours = [
            s["columns"]
            for s in scores
            if (s["model"]["preset"], s["model"]["steps"]) == (paper.preset, paper.nfe)
        ]
        cells = []
        for column, published in zip(QUALITY, paper.quality, strict=True):
            found = [cell(columns[column]) for columns in ours if column in columns]
            cells += [number(published), "; ".join(found)]
        joined.append([*row, *cells])  # fmt: skip
    return header, joined
