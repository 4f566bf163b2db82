"""Checkpoints: one safetensors file each, either complete or not there at all (`d2m_models.files`).

Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2m_models import files
from distill.errors import CheckpointError, UserError

FORMAT = "dense2moe-1"


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-able settings; only a run with the same one continues a checkpoint."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """What the disk refuses, or `d2m_models.files`, becomes a UserError."""
    try:
        yield
    except OSError as err:
        raise UserError(f"cannot {what}: {err.strerror or err}") from err
    except files.Refused as err:
        raise UserError(str(err)) from err


def make_folder(path: Path | str) -> Path:
    """Create a folder (and its parents) and check that files can be written into it."""
    path = Path(path)
    with user_errors(f"write into the folder {path}"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


@contextmanager
def locked(folder: Path, who: str) -> Iterator[None]:
    """See `d2m_models.files.locked`."""
    with ExitStack() as stack:
        with user_errors(f"write into the folder {folder}"):
            stack.enter_context(files.locked(folder, who))
        yield


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """See `d2m_models.files.write_atomic`."""
    with user_errors(f"write {path}"):
        files.write_atomic(Path(path), write)


def write_text(path: Path | str, text: str) -> None:
    """Atomic `Path.write_text`."""
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_folder(path: Path | str, write: Callable[[Path], None]) -> None:
    """`write_atomic` for a folder; `path` must not exist or be empty."""
    with user_errors(f"write {path}"):
        files.write_folder(Path(path), write)


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None
) -> None:
    """Write named tensors and JSON-able metadata as one safetensors file, atomically."""
    header = {"format": FORMAT, "meta": json.dumps(dict(meta or {}))}
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_plain(path, flat, header)


def save_plain(
    path: Path | str, tensors: dict[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Without a header the file's bytes depend on the tensors alone: several keys of metadata
    would come in any order."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(tmp: Path) -> None:
        try:
            save_file(tensors, tmp, metadata=header)
        except SafetensorError as err:  # of a full disk or a missing folder
            raise OSError(str(err)) from err

    write_atomic(path, write)


def load_meta(path: Path | str) -> dict[str, Any]:
    """The metadata alone."""
    return load_tensors(path, only_meta=True)[1]


def load_tensors(
    path: Path | str, only_meta: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, metadata)."""
    path = Path(path)
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = () if only_meta else file.keys()
            found = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            f"checkpoint {path} is truncated or no safetensors file ({err}); remove it"
        ) from err
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {header.get('format')!r}; this version reads {FORMAT!r}"
        )
    return found, json.loads(header["meta"])


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prefix every name, so that several groups share one file."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The group that `pack` put under `prefix`."""
    start = f"{prefix}/"
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def check_fit(own: Mapping[str, Any], found: Mapping[str, Any], source: Path | str) -> None:
    """A CheckpointError unless both have tensors of the same names and shapes."""
    missing, unknown = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    wrong = [
        f"{name}: {tuple(found[name])} for {tuple(shape)}"
        for name, shape in own.items()
        if name in found and found[name] != shape
    ]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"checkpoint {source} does not fit this model: missing {missing[:3]}, "
            f"unknown {unknown[:3]}, wrong shapes {wrong[:3]}"
        )


def load_state(module: torch.nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """`module.load_state_dict`, with an error that says which file does not fit and where."""
    own, found = ({n: t.shape for n, t in s.items()} for s in (module.state_dict(), state))
    check_fit(own, found, source)
    module.load_state_dict(dict(state))


def rng_state() -> dict[str, Tensor]:
    """The global random streams of torch, Python and numpy, as tensors (batches have generators of
    their own).
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    _, words, normal = random.getstate()  # normal: the second of a pair of draws, if it waits
    state["python"] = torch.tensor(words)
    state["python/normal"] = torch.tensor([] if normal is None else [normal], dtype=torch.float64)
    kind, keys, position, waits, normal = np.random.get_state()
    if kind == "MT19937":  # numpy's own, unless somebody has put another in its place
        state["numpy"] = torch.tensor([*keys.tolist(), position, waits])
        state["numpy/normal"] = torch.tensor([normal], dtype=torch.float64)
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Streams that the state does not have, as older ones, go on as they are."""
    torch.set_rng_state(state["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda{i}"], i)
    if "python" in state:
        normal = state["python/normal"].tolist()
        random.setstate((3, tuple(state["python"].tolist()), normal[0] if normal else None))
    if "numpy" in state:
        *keys, position, waits = state["numpy"].tolist()
        normal = state["numpy/normal"].item()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), position, waits, normal))
