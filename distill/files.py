"""Checkpoints: one safetensors file each, either complete or not there at all.

A file is written under a temporary name in the same folder, flushed to disk, then renamed over the
old one: whoever reads sees the old or the new checkpoint, never a mixture. Nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.errors import CheckpointError, UserError

FORMAT = "dense2moe-1"


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-able settings; only a run with the same one continues a checkpoint."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_folder(path: Path | str) -> Path:
    """Create a folder (and its parents) and check that files can be written into it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as err:
        raise UserError(f"cannot write into the folder {path}: {err.strerror or err}") from err
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename durable (where folders cannot be opened, the rename alone must do)."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _settle(file: Path, mode: int) -> None:
    """Flush a new file to disk; usual permissions (safetensors makes private files)."""
    file.chmod(mode & ~_umask())
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """`write(temporary path)`, flush to disk, rename to `path`; on failure nothing remains."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(tmp)
        _settle(tmp, 0o666)
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except OSError as err:
        raise UserError(f"cannot write {path}: {err.strerror or err}") from err
    finally:
        with suppress(OSError):
            tmp.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Atomic `Path.write_text`."""
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_folder(path: Path | str, write: Callable[[Path], None]) -> None:
    """`write_atomic` for a folder; `path` must not exist or be empty."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path} already exists and is not empty; choose another folder or remove it"
        )
    make_folder(path.parent)
    tmp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        write(tmp)
        for file in tmp.rglob("*"):
            if file.is_file():
                _settle(file, 0o666)
        tmp.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        if path.exists():
            path.rmdir()
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except OSError as err:
        raise UserError(f"cannot write {path}: {err.strerror or err}") from err
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None
) -> None:
    """Write named tensors and JSON-able metadata as one safetensors file, atomically."""
    from safetensors.torch import save_file

    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "meta": json.dumps(dict(meta or {}))}

    def write(tmp: Path) -> None:
        try:
            save_file(flat, tmp, metadata=header)
        except (
            Exception
        ) as err:  # safetensors has its own error type for a full disk or a missing folder
            raise UserError(f"cannot write {path}: {err}") from err

    write_atomic(path, write)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, metadata)."""
    return _load(Path(path), tensors=True)


def load_meta(path: Path | str) -> dict[str, Any]:
    """The metadata alone."""
    return _load(Path(path), tensors=False)[1]


def _load(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys() if tensors else ()
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


def load_state(module: torch.nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """`module.load_state_dict`, with an error that says which file does not fit and where."""
    own = module.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [
        f"{k}: {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"checkpoint {source} does not fit this model: missing {missing[:3]}, "
            f"unknown {unknown[:3]}, wrong shapes {wrong[:3]}"
        )
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
