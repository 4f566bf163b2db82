"""The results file: one JSON a machine, written after every measurement (schema: README.md here).

A record replaces the one with the same id, so that a second run of a part renews that part alone.
"""

from __future__ import annotations

import json
from pathlib import Path

SCHEMA = "dense2moe-benchmarks/1"
LISTS = ("stages", "layers", "blocks", "scaling", "distillation", "host", "skipped")


class Results:
    """An open results file; `path` None keeps everything in memory."""

    def __init__(self, path: Path | None, environment: dict):
        self.path = path
        self.content = load(path) if path is not None and path.exists() else empty()
        self.run = f"{environment['date']} {environment['commit']}"
        self.content["environment"] = environment
        self.content["runs"][self.run] = {**environment}

    def add(self, section: str, record_id: str, record: dict) -> None:
        """A record of a list section; also takes its earlier mention out of "skipped"."""
        rows = self.content[section]
        rows[:] = [row for row in rows if row["id"] != record_id]
        rows.append({"id": record_id, **record, "run": self.run})
        if section != "skipped":
            self._not_skipped(record_id)
        self.save()

    def set(self, section: str, key: str, record: dict) -> None:
        """One entry of a section: of "models"; also takes its mention out of "skipped"."""
        self.content[section][key] = {**record, "run": self.run}
        self._not_skipped(key)
        self.save()

    def _not_skipped(self, record_id: str) -> None:
        skipped = self.content["skipped"]
        skipped[:] = [row for row in skipped if row["id"] != record_id]

    def set_ceilings(self, ceilings: dict) -> None:
        """This run's ceilings. Shares in a record refer to those of its own run; the section of
        the same name is the latest run's."""
        self.content["runs"][self.run]["ceilings"] = ceilings
        self.content["ceilings"] = {**ceilings, "run": self.run}
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        used = {row.get("run") for section in LISTS for row in self.content[section]}
        used |= {row.get("run") for row in self.content["models"].values()}
        used |= {self.content["ceilings"].get("run"), self.run}
        self.content["runs"] = {k: v for k, v in self.content["runs"].items() if k in used}
        from d2m_models.files import write_text

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def empty() -> dict:
    sections = {section: [] for section in LISTS}
    return {"schema": SCHEMA, "environment": {}, "runs": {}, "ceilings": {}, "models": {},
            **sections}  # fmt: skip


def load(path: Path) -> dict:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}, expected {SCHEMA!r}")
    missing = [section for section in (*LISTS, "models") if section not in content]
    if missing:
        raise ValueError(f"{path} lacks the sections {', '.join(missing)}")
    return content
