"""Results files of benchmarks/ (schema: benchmarks/README.md), read for tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def machine_label(name: str, results: Mapping[str, Any]) -> str:
    env = results["environment"]
    return env["device"] if env["device_type"] != "cpu" else f"CPU ({env['threads']} threads)"
