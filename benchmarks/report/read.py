"""Results files of benchmarks/ (schema: benchmarks/README.md), read for tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError

SCHEMA = "dense2moe-benchmarks/1"
Table = tuple[list[str], list[list[str]]]
Results = Mapping[str, Mapping[str, Any]]


def load_results(folder: Path | str) -> dict[str, dict[str, Any]]:
    """{file name without .json: content} of every results file in a folder, GPUs first."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as err:
            raise CheckpointError(f"cannot read {path}: {err}") from err
        if isinstance(content, dict) and content.get("schema") == SCHEMA:
            found[path.stem] = content
    return dict(sorted(found.items(), key=lambda kv: kv[1]["environment"]["device_type"] == "cpu"))


def ceilings_of(results: Mapping[str, Any], record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ceilings that the record's own run measured before it."""
    return results["runs"][record["run"]].get("ceilings") or results["ceilings"]


def run_ids(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    """{run: short id}: "cpu-1" is the earliest run of cpu.json."""
    return {run: f"{name}-{i}" for i, run in enumerate(sorted(results["runs"]), 1)}


def run_id(name: str, results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    return run_ids(name, results)[record["run"]]


def backend_of(results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The back-end that really ran; a composed model ran its blocks'."""
    if record.get("mode") == "composed":
        rows = [row for row in results["blocks"] if row["run"] == record["run"]]
        return ", ".join(sorted({row["backend"] for row in rows}))
    return record.get("backend", "")


def rows_of(
    all_results: Results, section: str
) -> Iterator[tuple[str, Mapping[str, Any], tuple[str, str, str]]]:
    """(machine, record, its last three cells in a table: back-end, config, run) of a section."""
    for name, results in all_results.items():
        for row in results[section]:
            yield machine_label(name, results), row, origin_cells(name, results, row)


def origin_cells(name: str, results: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    return backend_of(results, row), config_of(row), run_id(name, results, row)


def peer_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Layers of FLUX's width with balanced routing; forward first, most tokens first, in whatever
    order they were measured."""
    rows = [row for row in results["layers"]
            if row["shape"]["D"] == 3072 and row["shape"]["routing"] == "balanced"]  # fmt: skip
    return sorted(rows, key=lambda row: (row["pass"] != "forward", -row["shape"]["T"]))


def config_of(record: Mapping[str, Any]) -> str:
    """Tiles that a Triton back-end chose, "up 128x256x64w8s3, ..."; or a configuration's name."""
    config = record.get("config", "")
    if isinstance(config, str):
        return config
    return ", ".join(f"{stage} {tile}" for stage, tile in config.items())


def ran(name: str, results: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> str:
    """Which runs records come from and what ran in them: "run cpu-1, back-end cpu"."""
    records = list(records)
    ids = sorted({run_id(name, results, row) for row in records})
    backends = sorted({backend_of(results, row) for row in records} - {""})
    text = f"run{'s' if len(ids) > 1 else ''} {' and '.join(ids)}"
    return text + (f", back-end {' and '.join(backends)}" if backends else "")


def machine_label(name: str, results: Mapping[str, Any]) -> str:
    env = results["environment"]
    return env["device"] if env["device_type"] != "cpu" else f"CPU ({env['threads']} threads)"
