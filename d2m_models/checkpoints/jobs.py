"""A checkpoint written file by file by a job that can be killed at any point and run again.

Everything goes to TARGET.partial: complete files and progress.json, which names them and the job
they belong to. When all are there the folder is renamed to TARGET. So TARGET is either complete or
absent, and a second run repeats at most one file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2m_models.checkpoints.tasks import Task, made_tensors, progress_bar, specs_of
from d2m_models.checkpoints.tensor_files import write_file
from d2m_models.files import check_new, locked, publish, temporary, write_json

_SPARE = 64 << 20  # for indices, configs and the file system


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


def run_job(job: Job, target: Path, progress: bool = True) -> None:
    """Writes all files of the job, or those an earlier run left out, and renames the folder.

    Raises:
        ValueError: the target exists, the partial folder belongs to another job or is in use, or
            the disk is too small; nothing is lost then.
    """
    check_new(target)
    folder = target.with_name(target.name + ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            _run(job, folder, progress)
        publish(folder, target)
    except OSError as error:
        hint = "; free some" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        kept = "; choose another place"
        if (folder / "progress.json").is_file():
            kept = (
                f"{hint}. What is complete stays in {folder}, and the same command continues there"
            )
        raise ValueError(
            f"cannot write {target}: {error.strerror or error} ({error.filename or folder}){kept}"
        ) from error


def _run(job: Job, folder: Path, progress: bool) -> None:
    state_path = folder / "progress.json"
    digest = hashlib.sha256(json.dumps(job.settings, sort_keys=True).encode()).hexdigest()[:16]
    state = {"job": digest, "settings": job.settings, "done": {}, "report": {}}
    if state_path.is_file():
        found = json.loads(state_path.read_text(encoding="utf-8"))
        if found["job"] != state["job"]:
            raise ValueError(
                f"{folder} was begun with other settings or another source "
                f"({difference(found['settings'], state['settings'])}); repeat that command, or "
                f"remove the folder"
            )
        state = found
    job.report.update(state["report"])
    todo = {
        name: tasks
        for name, tasks in job.files.items()
        if not (folder / name).is_file()
        or (folder / name).stat().st_size != state["done"].get(name)
    }
    total, left = (
        sum(task.nbytes for tasks in files.values() for task in tasks)
        for files in (job.files, todo)
    )
    free = shutil.disk_usage(folder).free
    if free < left + _SPARE:
        raise ValueError(
            f"not enough disk space for {folder}: {left / 1e9:.2f} GB are to be written, "
            f"{free / 1e9:.2f} GB are free"
        )
    write_json(state_path, state)
    job.prepare(folder)

    def complete(path: Path, report: dict[str, Any]) -> None:
        publish(temporary(path), path)
        state["done"][path.name] = path.stat().st_size
        state["report"] = report
        write_json(state_path, state)

    pending: Future | None = None  # one file is flushed while the next is made
    with (
        progress_bar(total, total - left, progress) as advance,
        ThreadPoolExecutor(1) as background,
    ):
        for name, tasks in todo.items():
            write_file(temporary(folder / name), specs_of(tasks), made_tensors(tasks, advance))
            if pending is not None:
                pending.result()
            pending = background.submit(complete, folder / name, dict(job.report))
        if pending is not None:
            pending.result()
    job.finish(folder)
    state_path.unlink()
    (folder / ".lock").unlink(missing_ok=True)


def difference(old: Any, new: Any) -> str:
    """The keys in which two settings differ."""
    names = sorted(set(old) | set(new))
    changed = [n for n in names if json.dumps(old.get(n)) != json.dumps(new.get(n))]
    return f"different: {', '.join(changed)}"
