"""The one training loop: every stage, comparator and the demo's teacher go through `train`.

It can be stopped at any moment and started again: batches depend on (seed, step) alone, state is
saved every so many steps (`snapshots.py`) and on SIGTERM and SIGINT, so little is repeated and the
result is the same bit for bit. A finished run is recognised and returned at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import files as ckpt
from distill.configs.training import TrainConfig
from distill.errors import CheckpointError, ConfigError, TrainingError
from distill.loop import snapshots
from distill.loop.optimizer import (
    Average,
    FrozenSlice,
    clip_gradients,
    decay_trained_slices,
    gradient_norm,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    start_state,
)
from distill.loop.parallel import World, full_tensors
from distill.loop.progress import Report, read_log
from distill.loop.step import backward, dump_batch, sped_up

Objective = Callable[[int], dict[str, Tensor]]
Preview = Callable[[nn.Module, int], None]
RESULT = "model.safetensors"


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainConfig,
    folder: Path | str,
    *,
    run_id: str,
    label: str,
    frozen: Sequence[FrozenSlice] = (),
    progress: bool = True,
    world: World | None = None,
    accept_changed: bool = False,
    preview: Preview | None = None,
) -> list[dict[str, Any]]:
    """Minimise `objective(step)["loss"]` over the model's trainable parameters, in place.

    Args:
        model: whole, or sharded over the world's ranks (`parallel.shard_model`).
        objective: gives the loss of batch number `step` and any parts to be logged, as scalars; a
            `Distillation` is also computed in parts, by several ranks.
        folder: gets step-*/ while running, model.safetensors when done, log.jsonl.
        run_id: fingerprint of everything the result depends on; another one's files are refused
            unless `accept_changed`.
        label: what the progress bar says.
        frozen: parts of parameters that stay bitwise as they are; their gradient must be zero.
        preview: called with (model, step) every `config.preview_every` steps.

    Returns:
        The log's entries. The model then holds the result (the averaged weights if config.ema).
    """
    world = world or World(device=next(model.parameters()).device)
    folder = ckpt.make_folder(folder)
    path = folder / RESULT
    if path.exists():
        load_result(model, folder, run_id, accept_changed, world)
        return read_log(folder / "log.jsonl")
    loop = _Loop(model, objective, config, folder, run_id, label, frozen, world)
    loop.resume(accept_changed)
    with sped_up(model, config):
        loop.run(progress, preview)
    loop.average.apply()
    model.zero_grad(set_to_none=True)
    result = dict(full_tensors(model.state_dict(), world))
    if world.main:
        ckpt.save_tensors(path, result, {"run": run_id, "step": loop.step})
    loop.snapshots.clear()
    return read_log(folder / "log.jsonl")


def load_result(
    model: nn.Module,
    folder: Path | str,
    run_id: str,
    accept_changed: bool = False,
    world: World | None = None,
) -> None:
    """Check whose result is in the folder, on every rank of the world; alone, load it."""
    world, path = world or World(), Path(folder) / RESULT
    meta = ckpt.load_meta(path)
    _check_run(meta, run_id, path, accept_changed)
    if world.main and meta.get("run") != run_id:  # accepted: the next start is not to be refused
        ckpt.save_tensors(path, ckpt.load_tensors(path)[0], {**meta, "run": run_id})
    if world.main:  # killed between writing the result and removing these
        snapshots.clear(path.parent)
    if world.size == 1:
        ckpt.load_state(model, ckpt.load_tensors(path)[0], path)


class _Loop:
    """State of one run: what a checkpoint holds, and how a step changes it."""

    def __init__(self, model, objective, config, folder, run_id, label, frozen, world):
        self.model, self.objective, self.config, self.folder = model, objective, config, folder
        self.run_id, self.label, self.frozen, self.world = run_id, label, frozen, world
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise TrainingError(f"{label}: nothing to train, every parameter is frozen")
        if world.size > 1 and config.optimizer != "adamw":
            raise ConfigError(
                f"train.optimizer is {config.optimizer!r}; expected 'adamw' with several "
                "processes, over which its state is sharded"
            )
        self.optimizer = make_optimizer(model, config, frozen)
        self.average = Average(self.params, config.ema)
        self.snapshots = snapshots.Snapshots(folder, world, config.keep, not config.async_save)
        self.step = 0  # batches done, skipped ones included
        self.skipped = 0  # in all
        self.bad = 0  # in a row
        self.saved = -1
        self.report = Report(self)

    # --- checkpoints ---

    def tensors(self) -> dict[str, Tensor]:
        names = {id(p): n for n, p in self.params.items()}
        state = ckpt.pack("model", self.model.state_dict())
        state |= ckpt.pack("optimizer", optimizer_tensors(self.optimizer, names))
        return state | ckpt.pack("average", self.average.values)

    def save(self) -> None:
        if self.saved != self.step:
            meta = {"run": self.run_id, "skipped": self.skipped, "bad": self.bad}
            meta["interval"] = self.report.state()
            self.snapshots.save(self.step, self.tensors(), meta)
            self.saved = self.step

    def resume(self, accept_changed: bool) -> None:
        path = snapshots.newest(self.folder)
        if path is None:
            return
        meta = snapshots.read_meta(path)
        _check_run(meta, self.run_id, path, accept_changed)
        start_state(self.optimizer)
        snapshots.load(path, self.tensors(), self.world)
        self.step, self.skipped, self.bad = meta["step"], meta["skipped"], meta["bad"]
        self.saved = self.step
        self.report.load(meta["interval"])
        if self.world.main and meta.get("run") != self.run_id:
            snapshots.adopt(self.folder, self.run_id)

    # --- steps ---

    def run(self, progress: bool, preview: Preview | None) -> None:
        from tqdm import tqdm

        config, report = self.config, self.report
        report.open()
        bar = tqdm(
            total=config.steps * config.batch_size,
            initial=self.step * config.batch_size,
            desc=self.label,
            unit=" samples",
            unit_scale=True,
            disable=not (progress and self.world.main),
        )
        save_every = config.save_every or config.log_every
        with bar, _stop_signals() as stop:
            try:
                while self.step < config.steps:
                    self.advance()
                    bar.update(config.batch_size)
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        bar.set_postfix(report.write())
                    stopping, writing = self.world.anywhere(bool(stop), self.snapshots.writing())
                    if not writing:  # on no rank: what was written becomes a checkpoint
                        self.snapshots.settle()
                    drawing = config.preview_every and self.step % config.preview_every == 0
                    last = self.step == config.steps
                    # before the preview: what fails there is not to cost an interval
                    if stopping or (drawing if last else self.step % save_every == 0):
                        self.save()
                    if stopping:
                        self.snapshots.settle()
                    if preview and drawing:
                        preview(self.model, self.step)
                    if stopping:
                        raise KeyboardInterrupt
                self.snapshots.settle()
            finally:
                report.close()

    def advance(self) -> None:
        """One step; it is skipped, before anything changes, if its gradient is not finite."""
        config, step = self.config, self.step
        self.optimizer.zero_grad(set_to_none=True)
        parts, loads = backward(self.objective, step, config, self.world)
        params = list(self.params.values())
        for p in params:
            # None of a MoB block that no sample has chosen; sharded it is zero, as some rank may
            # have. AdamW moves what has a zero gradient and passes over what has none.
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        parts["grad_norm"] = gradient_norm(params)
        self.step += 1
        good = bool(torch.isfinite(parts["loss"] + parts["grad_norm"]))
        if any(self.world.anywhere(not good)):
            self._skip(step, parts)
            return
        self.bad = 0
        clip_gradients(params, parts["grad_norm"], config.clip)
        factor = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            set_rate(group, config.lr * factor * group["scale"])
        decay_trained_slices(self.params, self.frozen, config.lr * factor, config.weight_decay)
        self.optimizer.step()
        self.average.update(self.step)
        self.report.add(parts, loads, config.lr * factor)

    def _skip(self, step: int, parts: dict[str, Tensor]) -> None:
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        values = {k: float(v) for k, v in parts.items()}
        self.optimizer.zero_grad(set_to_none=True)
        self.report.say(f"{self.label}: step {step} skipped, not finite: {values}")
        if self.bad <= self.config.max_bad_steps:
            return
        dumped = dump_batch(self.objective, step, self.config, self.folder, self.world)
        self.save()
        self.snapshots.settle()
        raise TrainingError(
            f"{self.label}: loss or gradient not finite in {self.bad} steps in a row, the last of "
            f"them step {step}: {values}. {dumped} The weights before the first of them are in "
            f"{snapshots.newest(self.folder)}; lower lr={self.config.lr} or look into the data, "
            "then go on with --accept-changed-config"
        )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT fill; a second one interrupts at once."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return

    def on_signal(number: int, frame: Any) -> None:
        if got:
            raise KeyboardInterrupt
        got.append(number)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_run(meta: dict[str, Any], run_id: str, path: Path, accept_changed: bool) -> None:
    if meta.get("run") != run_id and not accept_changed:
        raise CheckpointError(
            f"checkpoint {path} belongs to a run with other settings "
            f"({meta.get('run')}, this is {run_id}); choose another output folder, remove it, or "
            "go on with --accept-changed-config"
        )
