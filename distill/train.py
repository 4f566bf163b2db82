"""The one training loop: every stage, comparator and the demo's teacher go through `train`.

It can be stopped at any moment and started again: state is saved at every log line, batches depend
on (seed, step) alone, so at most one logging interval is repeated and the result is the same bit
for bit. A finished run is recognised and returned at once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import checkpoint as ckpt
from distill.config import TrainConfig
from distill.errors import CheckpointError, TrainingError

Objective = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class FrozenSlice:
    """Part of a parameter that must not move: entries start..stop along dim."""

    name: str
    dim: int
    start: int
    stop: int


def learning_rate(config: TrainConfig, step: int) -> float:
    """Factor on lr at `step` (0-based): linear warm-up, then constant or a cosine to 0."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def make_optimizer(
    model: nn.Module, config: TrainConfig, frozen: Sequence[FrozenSlice] = ()
) -> torch.optim.AdamW:
    """AdamW with fresh state over the trainable parameters: routers, others, and partly frozen
    ones.

    A partly frozen parameter gets no weight decay from AdamW: its frozen slice has zero gradient,
    so Adam's own step is exactly zero there, but decay would move it (1.2% in 200 steps). The slice
    that trains is decayed by `decay_trained_slices`.
    """
    sliced = {f.name for f in frozen}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            # routers, biases and norms are not decayed
            router = "router" in name.split(".") or "mob_routers" in name
            decay = 0.0 if name in sliced or p.ndim < 2 or router else config.weight_decay
            groups.setdefault((router, decay), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": params,
                "weight_decay": decay,
                "scale": config.router_lr_scale if router else 1.0,
            }
            for (router, decay), params in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,  # a loop over so many small tensors costs more than the arithmetic
    )


@torch.no_grad()
def decay_trained_slices(
    params: dict[str, nn.Parameter], frozen: Sequence[FrozenSlice], lr: float, weight_decay: float
) -> None:
    """AdamW's decay, p *= 1 - lr * weight_decay, on the part of each matrix that is not frozen."""
    for f in frozen:
        p = params[f.name]
        if p.ndim < 2 or not weight_decay:
            continue
        for start, stop in ((0, f.start), (f.stop, p.shape[f.dim])):
            if stop > start:
                p.narrow(f.dim, start, stop - start).mul_(1 - lr * weight_decay)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


class Log:
    """JSON lines, one a logging interval; on resume, lines after the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = read_log(path) if path.exists() else []
        kept = [json.dumps(line) for line in lines if line["step"] <= step]
        ckpt.write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """All complete lines of a log; a last line cut short by a crash is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


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
) -> list[dict[str, Any]]:
    """Minimise `objective(step)["loss"]` over the model's trainable parameters, in place.

    Args:
        objective: gives the loss of batch number `step` and any parts to be logged, as scalars.
        folder: gets checkpoint.safetensors while running, model.safetensors when done, log.jsonl.
        run_id: fingerprint of everything the result depends on; another one's files are refused.
        label: what the progress bar says.
        frozen: parts of parameters that stay bitwise as they are; their gradient must be zero.

    Returns:
        The log's entries. The model then holds the result (the averaged weights if config.ema).
    """
    folder = ckpt.make_folder(folder)
    state_path, model_path, log_path = (
        folder / n for n in ("checkpoint.safetensors", "model.safetensors", "log.jsonl")
    )
    if model_path.exists():
        tensors, meta = ckpt.load_tensors(model_path)
        _check_run(meta, run_id, model_path)
        ckpt.load_state(model, tensors, model_path)
        return read_log(log_path)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise TrainingError(f"{label}: nothing to train, every parameter is frozen")
    optimizer = make_optimizer(model, config, frozen)
    average = {n: p.detach().clone() for n, p in params.items()} if config.ema else {}
    step = 0
    if state_path.exists():
        tensors, meta = ckpt.load_tensors(state_path)
        _check_run(meta, run_id, state_path)
        ckpt.load_state(model, ckpt.unpack("model", tensors), state_path)
        _load_optimizer(optimizer, ckpt.unpack("optimizer", tensors))
        for name, value in ckpt.unpack("average", tensors).items():
            average[name].copy_(value)
        ckpt.set_rng_state(ckpt.unpack("rng", tensors))
        step = meta["step"]
    log = Log(log_path, step)
    sums: dict[str, Tensor] = {}
    since, first = time.perf_counter(), step
    from tqdm import tqdm

    with tqdm(
        total=config.steps, initial=step, desc=label, unit="step", disable=not progress
    ) as bar:
        while step < config.steps:
            parts = objective(step)
            optimizer.zero_grad(set_to_none=True)
            parts["loss"].backward()
            parts["grad_norm"] = torch.nn.utils.clip_grad_norm_(
                params.values(), config.clip or math.inf
            )
            factor = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor * group["scale"]
            decay_trained_slices(params, frozen, config.lr * factor, config.weight_decay)
            optimizer.step()
            step += 1
            if average:
                weight = 1 - min(config.ema or 0.0, step / (step + 10))  # a short memory at first
                torch._foreach_lerp_(
                    list(average.values()), [p.detach() for p in params.values()], weight
                )
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + value.detach()
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                entry = {k: float(v) / (step - first) for k, v in sums.items()}
                if not all(map(math.isfinite, entry.values())):
                    raise TrainingError(
                        f"{label}: {entry} is not finite at step {step}; lower lr={config.lr}. "
                        f"The last good state is in {folder}"
                    )
                now = time.perf_counter()
                rate = (step - first) * config.batch_size / (now - since)
                log.write(
                    {"step": step, **entry, "lr": config.lr * factor, "samples_per_second": rate}
                )
                bar.set_postfix(loss=f"{entry['loss']:.4g}")
                if step < config.steps:
                    tensors = ckpt.pack("model", model.state_dict())
                    tensors |= ckpt.pack("optimizer", _optimizer_tensors(optimizer))
                    tensors |= ckpt.pack("average", average) | ckpt.pack("rng", ckpt.rng_state())
                    ckpt.save_tensors(state_path, tensors, {"run": run_id, "step": step})
                sums, since, first = {}, time.perf_counter(), step
    if average:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(average[name])
    model.zero_grad(set_to_none=True)
    ckpt.save_tensors(model_path, model.state_dict(), {"run": run_id, "step": step})
    state_path.unlink(missing_ok=True)
    return read_log(log_path)


def _check_run(meta: dict[str, Any], run_id: str, path: Path) -> None:
    if meta.get("run") != run_id:
        raise CheckpointError(
            f"checkpoint {path} belongs to a run with other settings "
            f"({meta.get('run')}, this is {run_id}); choose another output folder or remove it"
        )
