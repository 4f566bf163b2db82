"""A checkpoint written file by file by a job that can be killed at any point and run again.

Everything goes to TARGET.partial: complete files (see `shards.write_file`) and progress.json, which
names them and the job they belong to. When all are there the folder is renamed to TARGET. So TARGET
is either complete or absent, and a second run repeats at most one file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m_models.checkpoints.tensor_files import (
    TensorSpec,
    commit_file,
    sync_folder,
    write_file,
    write_json,
)

_SPARE = 64 << 20  # for indices, configs and the file system
_DEPTH = 3  # tensors between reader and writer


@dataclass(frozen=True)
class Task:
    """Tensors to write, and how to make them of tensors to read.

    Args:
        outputs: what is written. sources: what is read (anything with `.read()` and `.nbytes`).
        make: list of tensors read -> list of tensors to write; runs in a thread of its own.
    """

    outputs: tuple[TensorSpec, ...]
    sources: tuple[Any, ...] = ()
    make: Callable[[list[Tensor]], list[Tensor]] = list

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


@dataclass
class Job:
    """What `run_job` writes.

    Attributes:
        files: file name -> its tasks. settings: JSON-able, what makes this job this job.
        prepare: called with the partial folder before the first task (also when resumed).
        finish: called with the partial folder after the last file.
        report: JSON-able numbers that tasks leave behind; survives a kill.
    """

    files: dict[str, Sequence[Task]]
    settings: Any
    prepare: Callable[[Path], None] = lambda folder: None
    finish: Callable[[Path], None] = lambda folder: None
    report: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def partial_folder(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def check_target(target: Path) -> None:
    """Raises unless the folder is absent or empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} already exists and is not empty; choose another folder")


def run_job(job: Job, target: Path, progress: bool = True) -> None:
    """Writes all files of the job, or those an earlier run left out, and renames the folder.

    Raises:
        ValueError: the target exists, the partial folder belongs to another job or is in use, or
            the disk is too small; nothing is lost then.
    """
    check_target(target)
    folder = partial_folder(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _run(job, folder, progress)
        if target.exists():
            target.rmdir()
        os.replace(folder, target)
        sync_folder(target.parent)
    except OSError as error:
        hint = "; free some" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ValueError(
            f"cannot write {error.filename or folder}: {error.strerror or error}{hint}. What is "
            f"complete stays in {folder}, and the same command continues there"
        ) from error


def _run(job: Job, folder: Path, progress: bool) -> None:
    state_path = folder / "progress.json"
    state = {"job": job.fingerprint(), "settings": job.settings, "done": {}, "report": {}}
    if state_path.is_file():
        found = json.loads(state_path.read_text(encoding="utf-8"))
        if found["job"] != state["job"]:
            raise ValueError(
                f"{folder} was begun with other settings or another source "
                f"({_difference(found['settings'], state['settings'])}); repeat that command, or "
                f"remove the folder"
            )
        state = found
    job.report.update(state["report"])
    for rest in folder.glob("*.tmp"):
        rest.unlink()
    done = {
        name
        for name, size in state["done"].items()
        if (folder / name).is_file() and (folder / name).stat().st_size == size
    }
    todo = {name: tasks for name, tasks in job.files.items() if name not in done}
    _check_disk(folder, sum(task.nbytes for tasks in todo.values() for task in tasks))
    write_json(state_path, state)
    job.prepare(folder)
    total, left = (
        sum(task.nbytes for tasks in files.values() for task in tasks)
        for files in (job.files, todo)
    )
    with progress_bar(total, total - left, progress) as advance:
        with ThreadPoolExecutor(1) as background:
            pending: Future | None = None
            for name, tasks in todo.items():
                specs = [spec for task in tasks for spec in task.outputs]
                write_file(folder / name, specs, made_tensors(tasks, advance), False)
                if pending is not None:
                    pending.result()
                report = dict(job.report)
                pending = background.submit(_complete, folder, name, state, report)
            if pending is not None:
                pending.result()
    job.finish(folder)
    state_path.unlink()
    (folder / ".lock").unlink(missing_ok=True)
    sync_folder(folder)


def _complete(folder: Path, name: str, state: dict[str, Any], report: dict[str, Any]) -> None:
    commit_file(folder / name)
    state["done"][name] = (folder / name).stat().st_size
    state["report"] = report
    write_json(folder / "progress.json", state)


def _difference(old: Any, new: Any) -> str:
    names = sorted(set(old) | set(new))
    changed = [n for n in names if json.dumps(old.get(n)) != json.dumps(new.get(n))]
    return f"different: {', '.join(changed)}"


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need + _SPARE:
        raise ValueError(
            f"not enough disk space for {folder}: {need / 1e9:.2f} GB are to be written, "
            f"{free / 1e9:.2f} GB are free"
        )


def made_tensors(tasks: Iterable[Task], advance: Callable[[int], None]) -> Iterator[Tensor]:
    """The tasks' tensors in order; reading, making and the caller's writing overlap."""
    reader, maker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    queue: deque[tuple[Task, Future]] = deque()

    # Fresh memory costs more than reading (page faults: 45 ms for 113 MB, ten times a fill), so
    # buffers go round: when a slot comes up again, its last task has been written.
    buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_DEPTH + 2)]

    def fill(slot: int, task: Task) -> list[Tensor]:
        sizes = [-(-source.nbytes // 64) * 64 for source in task.sources]
        if sum(sizes) > buffers[slot].numel():
            buffers[slot] = torch.empty(sum(sizes), dtype=torch.uint8)
        places = buffers[slot][: sum(sizes)].split(sizes)
        return [source.read(at) for source, at in zip(task.sources, places, strict=True)]

    def make(task: Task, read: Future) -> list[Tensor]:
        return task.make(read.result())

    def next_tensors() -> Iterator[Tensor]:
        task, made = queue.popleft()
        yield from made.result()
        advance(task.nbytes)

    try:
        for slot, task in zip(cycle(range(len(buffers))), tasks, strict=False):
            read = reader.submit(fill, slot, task)
            queue.append((task, maker.submit(make, task, read)))
            if len(queue) > _DEPTH:
                yield from next_tensors()
        while queue:
            yield from next_tensors()
    finally:
        for pool in (reader, maker):
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def progress_bar(total: int, done: int, show: bool):
    """A bar over bytes; gives the function that moves it."""
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=not show) as bar:
        yield bar.update


@contextmanager
def _locked(folder: Path):
    """Two runs in one folder would write into the same file."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing {folder}; wait for it") from None
        yield
