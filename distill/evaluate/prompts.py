"""Prompts as text, JSONL, or in each benchmark's own file format."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import UserError

# Known by name: what the hub holds as (repository, file), or where to get the file.
NAMES: dict[str, tuple[str, str] | str] = {
    "mjhq-30k": ("playgroundai/MJHQ-30K", "meta_data.json"),
    "geneval": "prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval",
    "dpg": "dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA",
    "t2i-compbench": "the folder examples/dataset of github.com/Karine-Huang/T2I-CompBench",
}
# T2I-CompBench's categories, as its files are called: color_val.txt, 3d_spatial_val.txt, ...
CATEGORIES = ("color", "shape", "texture", "3d_spatial", "non_spatial", "spatial", "complex",
              "numeracy")  # fmt: skip
# Images a prompt that each benchmark is published with.
IMAGES = {"geneval": 4, "dpg": 4, "t2i-compbench": 10}


@dataclass(frozen=True)
class Prompt:
    """One prompt and what its benchmark says of it.

    kind: "plain", "mjhq", "geneval", "dpg" or "t2i-compbench". group: the task or category over
    which the benchmark averages first. meta: GenEval's "include" and "exclude"; DPG's "questions"
    {id: (question, ids of its parents)}; of T2I-CompBench, in a JSONL file, what takes the place
    of a parser: "phrases", "objects" and "counts" (see compbench.py).
    """

    text: str
    kind: str = "plain"
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, a folder of T2I-CompBench's text files, or a name in `NAMES`.

    Raises:
        UserError: it is not there, has another format, or no prompts; says which file and line.
    """
    path = Path(source)
    if not path.exists():
        path = _by_name(str(source))
    files = [path]
    if path.is_dir():
        found = sorted(path.glob("*_val.txt")) or sorted(path.glob("*.txt"))
        files = [file for file in found if _category(file) is not None]
    readers = {".txt": _lines, ".jsonl": _jsonl, ".json": _mjhq, ".csv": _dpg}
    prompts: list[Prompt] = []
    for file in files:
        if file.suffix not in readers:
            raise UserError(f"prompts {file}: expected one of {', '.join(readers)}, or a folder")
        try:
            prompts += readers[file.suffix](file)
        except OSError as err:
            raise UserError(f"cannot read prompts {file}: {err.strerror or err}") from err
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise UserError(
                f"prompts {file}: {type(err).__name__} {err}; expected text with a prompt a line, "
                "JSONL with the key 'prompt', GenEval's metadata JSONL, DPG's CSV, or MJHQ's JSON"
            ) from err
    if not prompts:
        raise UserError(f"prompts {source}: there are none")
    return prompts[:limit]


def _by_name(name: str) -> Path:
    place = NAMES.get(name)
    if place is None:
        raise UserError(f"prompts {name!r}: no such file, and no name of {sorted(NAMES)}")
    if isinstance(place, str):
        raise UserError(f"prompts {name!r}: download {place} and say --prompts FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(*place, repo_type="dataset"))
    except Exception as err:  # the hub's client raises many kinds
        raise UserError(
            f"prompts {name!r}: cannot get {place[1]} of the data set {place[0]} from the hub "
            f"({type(err).__name__}); download it and say --prompts FILE"
        ) from err


def _category(file: Path) -> str | None:
    named = (name for name in CATEGORIES if f"{file.stem}_".startswith(f"{name}_"))
    return next(named, None)


def _lines(file: Path) -> Iterator[Prompt]:
    category = _category(file)
    kind = "plain" if category is None else "t2i-compbench"
    for line in file.read_text(encoding="utf-8").splitlines():
        if text := line.strip():
            yield Prompt(text, kind, category)


def _jsonl(file: Path) -> Iterator[Prompt]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f"line {number} has no text under 'prompt'")
        kind, group = "plain", None
        if "include" in entry:
            kind, group = "geneval", entry["tag"]
        elif (group := entry.get("category")) in CATEGORIES:
            kind = "t2i-compbench"
        yield Prompt(entry["prompt"], kind, group, entry)


def _mjhq(file: Path) -> Iterator[Prompt]:
    for entry in json.loads(file.read_text(encoding="utf-8")).values():
        yield Prompt(entry["prompt"], "mjhq", entry["category"])


def _dpg(file: Path) -> Iterator[Prompt]:
    """Rows of one item_id are the questions of one prompt; parent 0 means none."""
    found: dict[str, Prompt] = {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if not row["proposition_id"].strip().isdigit():
                continue  # a second heading, as the published file has
            prompt = found.setdefault(row["item_id"], Prompt(row["text"], "dpg", None, {
                "questions": {}}))  # fmt: skip
            parents = [int(p) for p in row["dependency"].split(",") if int(p)]
            question = row["question_natural_language"]
            prompt.meta["questions"][int(row["proposition_id"])] = (question, parents)
    yield from found.values()
