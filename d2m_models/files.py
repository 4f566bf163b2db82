"""Files and folders that are complete or not there at all, and a folder that one run writes.

What is written goes by a temporary name in the same folder, is flushed to disk and then renamed:
whoever looks sees the old or the new, never a mixture, whenever the process is killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path


class Refused(ValueError):
    """What is there is not to be written over, or somebody else is writing it."""


def temporary(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear_temporary(folder: Path) -> None:
    """Removes what a killed process has left half-written."""
    for path in folder.glob(".*.tmp"):
        remove(path)


def flush(path: Path) -> None:
    """A file to the disk itself; of a folder the names in it, where the system can."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():
        fd = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def publish(tmp: Path, path: Path) -> None:
    """Flushes `tmp`, a folder with all that is in it, and names it `path`, over an older file or an
    empty folder."""
    for part in (*sorted(tmp.rglob("*")), tmp):
        flush(part)
    if path.is_dir():
        path.rmdir()
    os.replace(tmp, path)
    flush(path.parent)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary path)`, then its flushing and naming; on failure nothing remains."""
    tmp = temporary(path)
    try:
        tmp.touch()
        mode = tmp.stat().st_mode & 0o777
        write(tmp)
        tmp.chmod(mode)  # safetensors makes private files
        publish(tmp, path)
    finally:
        with suppress(OSError):
            tmp.unlink()


def write_text(path: Path, text: str) -> None:
    """Atomic `Path.write_text`."""
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: object) -> None:
    """Indented JSON."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def check_new(path: Path) -> None:
    """Refuses a folder that is neither absent nor empty, and a file."""
    if path.is_file():
        raise Refused(f"{path} is a file; expected a folder that does not exist yet")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Refused(f"{path} already exists and is not empty; choose another folder or remove it")


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """`write_atomic` for a new folder."""
    check_new(path)
    tmp = temporary(path)
    remove(tmp)
    try:
        tmp.mkdir(parents=True)
        write(tmp)
        for file in tmp.rglob("*"):
            if file.is_file():
                file.chmod(tmp.stat().st_mode & 0o666)  # safetensors makes private files
        publish(tmp, path)
    finally:
        remove(tmp)


@contextmanager
def locked(folder: Path, who: str = "run") -> Iterator[None]:
    """Keeps a second run out of the folder, and clears away what a killed one has left there."""
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    with open(folder / ".lock", "w") if fcntl else nullcontext() as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(f"another {who} is writing {folder}; wait for it") from None
        clear_temporary(folder)
        yield
