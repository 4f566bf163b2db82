"""Worker processes that share out a list of tasks, and end when the command ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any


def _start_worker(pids: Any) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    pids.put(os.getpid())


class Workers:
    """`count` processes of one thread each, or this process for one. `work` does one task."""

    def __init__(self, count: int, work: Callable[[dict], dict]):
        self.count, self.work, self.pool = count, work, None

    def __enter__(self) -> Workers:
        if self.count > 1:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            os.environ.setdefault("OMP_NUM_THREADS", "1")  # before a worker loads torch
            context = multiprocessing.get_context("spawn")
            self.pids = context.Queue()
            self.pool = ProcessPoolExecutor(
                self.count, mp_context=context, initializer=_start_worker, initargs=(self.pids,)
            )
        return self

    def __exit__(self, kind: Any, err: Any, trace: Any) -> None:
        if self.pool is None:
            return
        if kind is not None:  # what they do is cached at every log line: stop at once
            from contextlib import suppress
            from queue import Empty

            with suppress(Empty):
                for _ in range(self.count):
                    with suppress(ProcessLookupError):
                        os.kill(self.pids.get(timeout=1), signal.SIGTERM)
        self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, jobs: Sequence[dict], label: str, progress: bool) -> list[dict]:
        """All jobs' values, in order, with a bar."""
        from tqdm import tqdm

        with tqdm(total=len(jobs), desc=label, unit="model", disable=not progress) as bar:
            if self.pool is None:
                done = []
                for job in jobs:
                    done.append(self.work(job))
                    bar.update()
                return done
            from concurrent.futures import as_completed

            futures = [self.pool.submit(self.work, job) for job in jobs]
            for future in as_completed(futures):
                future.result()
                bar.update()
            return [future.result() for future in futures]
