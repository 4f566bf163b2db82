"""`d2m push`: a saved model or pipeline to the Hugging Face hub, with its model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from d2m_models.checkpoints.origin import is_hub_id, read_origin
from d2m_models.checkpoints.pipelines import part_of, read_index
from d2m_models.checkpoints.places import may_be_hub_name
from d2m_models.checkpoints.source import open_source
from d2m_models.flux import CLASS_CODE, FluxMoETransformer2DModel
from d2m_models.inspection.card import card


@dataclass(frozen=True)
class Upload:
    """name: in the repository. content: a file of this machine, or bytes made for the hub."""

    name: str
    content: Path | bytes

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def plan_push(model: str | Path, repository: str, base: str | None = None) -> list[Upload]:
    """What `push` uploads; needs no network.

    Paths of this machine are left out of config.json. A whole pipeline also gets the file without
    which diffusers refuses to load our class from the hub.

    Args:
        model: folder of a saved model or of a pipeline with one.
        repository: "owner/name". base: hub id of the base, where the model does not record one.
    """
    folder = Path(model).expanduser()
    if not may_be_hub_name(repository):
        raise ValueError(f"the repository is {repository!r}; expected owner/name")
    if base is not None and not is_hub_id(base):
        raise ValueError(f"base is {base!r}; expected a hub id (owner/name)")
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; expected the folder of a saved model")
    index = read_index(folder)
    part = "" if index is None else part_of(index, folder)
    source = open_source(folder, part or None)
    kind = FluxMoETransformer2DModel.__name__
    if source.config.get("_class_name") != kind:
        raise ValueError(
            f"{source.folder} holds the class {source.config.get('_class_name')}; expected {kind}"
        )
    origin = read_origin(source.folder)
    base = base or (origin.get("base") if is_hub_id(origin.get("base")) else None)
    origin = {**origin, "base": base} if base else {k: v for k, v in origin.items() if k != "base"}
    config = {k: v for k, v in source.config.items() if k != "_name_or_path"}
    made = {
        "README.md": card(source.folder, origin, repository),
        f"{part}/config.json".lstrip("/"): _json({**config, "origin": origin or None}),
    }
    if index is not None:
        made["model_index.json"] = _json({k: v for k, v in index.items() if k != "_name_or_path"})
        made[f"{part}/{index[part][0]}.py"] = CLASS_CODE
    found = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    }
    for name, file in found.items():  # diffusers writes down from where it has loaded each part
        if file.name == "config.json" and name not in made:
            own = json.loads(file.read_text(encoding="utf-8"))
            made[name] = _json({k: v for k, v in own.items() if k != "_name_or_path"})
    contents = {**found, **{name: text.encode() for name, text in made.items()}}
    return [Upload(name, content) for name, content in sorted(contents.items())]


def push(uploads: list[Upload], repository: str, private: bool = False) -> str:
    """One commit with all files, in a repository that is created if need be; its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [
        CommitOperationAdd(u.name, u.content if isinstance(u.content, bytes) else str(u.content))
        for u in uploads
    ]
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, files, commit_message="Upload with d2m push")
    except Exception as error:  # offline, not logged in, no right: the hub client raises many kinds
        raise ValueError(
            f"cannot push to {repository}: {' '.join(str(error).split())} (hf auth login logs in)"
        ) from error
    return str(url)


def _json(data: dict) -> str:
    return json.dumps(data, indent=2, sort_keys=True) + "\n"
