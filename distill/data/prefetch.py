"""Batches read ahead in a background thread. Batches are pure functions of their arguments, so what
a run sees does not change."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from distill.data.batch import Batch


class Prefetch:
    """A source that computes the calls it expects next; everything else is the source's own.

    It expects the rows of a step to be asked for in the order in which those of the last step were
    (the parts of an accumulated batch), then the same of the next step.
    """

    def __init__(self, source: Any, depth: int = 2):
        self.source, self.depth = source, depth
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ready: dict[tuple[Any, ...], Future[Batch]] = {}
        self._run: tuple[Any, ...] = ()
        self._step, self._rows, self._pattern = -1, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def batch(
        self, seed: int, step: int, count: int, stream: str = "train", rows: slice | None = None
    ) -> Batch:
        """Exactly `source.batch(...)`; only training's batches are read ahead."""
        if stream != "train":
            return self.source.batch(seed, step, count, stream, rows)
        cut = None if rows is None else (rows.start, rows.stop, rows.step)
        run = (seed, count, stream)
        self._learn(run, step, cut)
        waiting = self._ready.pop((*run, step, cut), None)
        wanted = self._expected(step, cut)
        for other in [k for k in self._ready if k not in {(*run, *w) for w in wanted}]:
            self._ready.pop(other).cancel()
        if waiting is None:
            waiting = self._submit(run, step, cut)
        for ahead in wanted:
            if (*run, *ahead) not in self._ready:
                self._ready[(*run, *ahead)] = self._submit(run, *ahead)
        return waiting.result()

    def _learn(self, run: tuple[Any, ...], step: int, cut: Any) -> None:
        if run != self._run or step not in (self._step, self._step + 1):
            self._run, self._step, self._rows, self._pattern = run, step, [], []
        elif step == self._step + 1:
            self._step, self._pattern, self._rows = step, self._rows, []
        if cut not in self._rows:
            self._rows.append(cut)

    def _expected(self, step: int, cut: Any) -> list[tuple[int, Any]]:
        pattern = self._pattern or self._rows
        if cut not in pattern:
            return []
        calls, at = [], pattern.index(cut)
        for _ in range(self.depth):
            at += 1
            if at == len(pattern):
                at, step = 0, step + 1
            calls.append((step, pattern[at]))
        return calls

    def _submit(self, run: tuple[Any, ...], step: int, cut: Any) -> Future[Batch]:
        seed, count, stream = run
        rows = None if cut is None else slice(*cut)
        return self._pool.submit(self.source.batch, seed, step, count, stream, rows)

    def close(self) -> None:
        """Drop what was read ahead and end the thread."""
        self._pool.shutdown(cancel_futures=True)
