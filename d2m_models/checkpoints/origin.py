"""What a model was made of and how: `origin` in its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2m_models.checkpoints.places import may_be_hub_name


def base_pipeline(source: str | Path, subfolder: str | None = None) -> str:
    """The pipeline whose transformer `source` is: a hub id as it is given, else the folder that has
    model_index.json, and `source` itself, folder or single file, where there is none."""
    local = Path(source).expanduser()
    if not local.is_dir():
        return str(local.resolve() if local.is_file() else source)
    folder = (local / subfolder if subfolder else local).resolve()
    pipelines = [p for p in (folder, folder.parent) if (p / "model_index.json").is_file()]
    return str(pipelines[0] if pipelines else folder)


def read_origin(folder: Path) -> dict[str, Any]:
    """`origin` of a saved model's configuration; empty where it has none."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("origin")
    except (OSError, ValueError, AttributeError):
        found = None
    return dict(found or {})


def is_hub_id(base: str | None) -> bool:
    """Whether "owner/name" is meant, and no folder of this machine."""
    return base is not None and may_be_hub_name(base) and not Path(base).expanduser().exists()
