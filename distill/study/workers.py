"""Processes that do tasks beside this one, and end when it does.

Models this small keep one core busy, not two: a training step takes 0.12 s with one thread, with
two 0.09 s at best, and seconds when another process wants the core for which a thread spins. So
every process has one thread, and several trainings run side by side. Nothing passes between them
but a task and its value, plain data both; what is trained lies in the task's own folder.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

Work = Callable[[dict], dict]


def _start(bars: int) -> None:
    """In a new process, before its first task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if bars:
        os.environ["TQDM_POSITION"] = str(bars)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_the_main_process() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(work: Work, task: dict) -> dict:
    """A task in a worker. SIGTERM ends it as Ctrl-C does: a training saves its state first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work(task)
    except KeyboardInterrupt:
        os._exit(130)  # an exception would only end the task, and the next one would begin
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Workers:
    """`count` processes that do tasks with `work`, a function of a module; with 0 of them this
    process does. Left by an exception, they stop at once.

    bars: how many progress bars of this process stand above theirs.
    """

    def __init__(self, count: int, work: Work, bars: int = 0):
        self.work, self.pool = work, None
        if count:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(count, spawn, _start, (bars,))

    def __enter__(self) -> Workers:
        self.others = set(multiprocessing.active_children())
        return self

    def __exit__(self, kind: Any, err: Any, trace: Any) -> None:
        if self.pool is None:
            return
        if kind is not None:
            for process in set(multiprocessing.active_children()) - self.others:
                process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Sequence[dict], label: str, progress: bool) -> list[dict]:
        """All tasks' values, in order, with a bar."""
        from tqdm import tqdm

        bar = {"total": len(tasks), "desc": label, "unit": "model", "disable": not progress}
        if self.pool is None:
            return list(tqdm(map(self.work, tasks), **bar))
        futures = [self.pool.submit(_do, self.work, task) for task in tasks]
        for future in tqdm(as_completed(futures), **bar):
            future.result()  # an error ends the command at once
        return [future.result() for future in futures]


@contextmanager
def beside(work: Work, task: dict) -> Iterator[None]:
    """Do one task in a process during the block; waits for it at the end.

    If it fails, so be it: who finds nothing in its folder does it again.
    """
    with Workers(1, work, bars=1) as workers:
        assert workers.pool is not None
        workers.pool.submit(_do, work, task)
        yield


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
