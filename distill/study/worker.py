"""A second process that trains one comparator while the demo trains a student.

Models this small keep one core busy, not two: a training step takes 0.12 s with one thread, with
two 0.09 s at best, and seconds when another process wants the core for which a thread spins. So on
a CPU the demo uses one thread and runs two trainings side by side. Nothing passes between them: the
worker leaves finished stages in the shared folder, where the demo finds them. If it fails, the demo
does its work.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError

if TYPE_CHECKING:
    from distill.study.comparators import Run


@contextmanager
def beside(run: Run, name: str) -> Iterator[None]:
    """Train comparator `name` in a worker during the block; waits for it at the end."""
    done = (run.folder / name / "distill" / "model.safetensors").exists()
    if done or not run.device.startswith("cpu") or len(_cores()) < 2:
        yield
        return
    from distill.configs.checked import to_dict

    task = {
        "config": to_dict(run.config),
        "seed": run.seed,
        "folder": str(run.folder),
        "name": name,
        "progress": run.progress,
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "distill.study.worker"],
        stdin=subprocess.PIPE,
        env={**os.environ, "TQDM_POSITION": "1"},  # its bar goes below the demo's
        text=True,
    )
    try:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(task))
        worker.stdin.close()
        yield
        worker.wait()
    finally:
        if worker.poll() is None:
            worker.terminate()
            worker.wait()


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def main() -> int:
    """Do the task on standard input; stopped by a signal, it leaves its last checkpoint."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    task = json.loads(sys.stdin.read())
    try:
        import torch

        from distill.configs.checked import from_dict
        from distill.study.comparators import start, train_moe, train_prune_depth, train_prune_mlp
        from distill.study.config import DemoConfig

        torch.set_num_threads(1)
        config = from_dict(DemoConfig, task["config"])
        run = start(config, task["seed"], "cpu", Path(task["folder"]), task["progress"])
        if task["name"] == "prune-mlp":
            train_prune_mlp(run)
        else:
            train_prune_depth(run, *train_moe(run))
    except KeyboardInterrupt:
        return 130
    except UserError:
        return 2  # the demo meets the same error and reports it
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
