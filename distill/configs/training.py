"""The keys of one optimisation run and its processes, and which of them leave the result alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.configs.checked import check_choice, check_least, to_dict


@dataclass(frozen=True)
class TrainConfig:
    """One optimisation run: AdamW with warm-up, clipping and optionally EMA.

    What the result depends on:
        steps, batch_size (samples over all processes), lr: required. warmup: steps of linear
        warm-up. schedule: "cosine" (to zero) or "constant". router_lr_scale multiplies lr for
        routers. ema: decay of averaged weights, which are then the result; null for none.
        compute_dtype: "float32" or "bfloat16"; weights and their state stay in fp32 either way.
        optimizer: "adamw", or "adamw8bit" with both moments in 8 bits (torchao).

    What it does not depend on, beyond rounding (NEUTRAL):
        micro_batch: samples a process computes at once, null for all its share; fewer cost a
        second forward, which gathers the statistics that eqs. 9 and the balance loss need.
        gradient_checkpointing: recompute blocks in the backward pass. compile: torch.compile on
        the blocks. log_every: steps between log lines. save_every: between checkpoints, null for
        log_every. keep: checkpoints that stay. async_save: write them beside the next steps.
        max_bad_steps: how many steps in a row may be skipped for a loss or gradient that is not
        finite. preview_every: steps between samples drawn from fixed noise. loggers: "tensorboard",
        "wandb", beside log.jsonl.
    """

    steps: int
    batch_size: int
    lr: float
    warmup: int = 20
    schedule: str = "cosine"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    ema: float | None = None
    router_lr_scale: float = 1.0
    compute_dtype: str = "float32"
    optimizer: str = "adamw"
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 25
    save_every: int | None = None
    keep: int = 2
    async_save: bool = False
    max_bad_steps: int = 10
    preview_every: int | None = None
    loggers: list[str] = field(default_factory=list)

    def __post_init__(self):
        check_choice("train", "schedule", self.schedule, ("cosine", "constant"))
        check_choice("train", "compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        check_choice("train", "optimizer", self.optimizer, ("adamw", "adamw8bit"))
        for name in self.loggers:
            check_choice("train", "loggers", name, ("tensorboard", "wandb"))
        for least, names in (
            (0, "lr warmup weight_decay max_bad_steps clip"),
            (1, "steps batch_size micro_batch log_every save_every keep preview_every"),
        ):
            check_least(self, "train", **dict.fromkeys(names.split(), least))


def first_batch(before: Sequence[TrainConfig], batch_size: int) -> int:
    """Number of the first batch of `batch_size` samples that begins after all those that the runs
    `before`, one after another, have seen.
    """
    seen = 0
    for train in before:
        seen = (-(-seen // train.batch_size) + train.steps) * train.batch_size
    return -(-seen // batch_size)


# Keys of any section that may differ when a run is resumed.
NEUTRAL = frozenset(
    "micro_batch gradient_checkpointing compile log_every save_every keep async_save max_bad_steps "
    "preview_every loggers parallel out prefetch verify max_bad_shards importance_rows".split()
)


@dataclass(frozen=True)
class ParallelConfig:
    """Processes that `torchrun` starts: FSDP2 over `shard` of them, `replicate` times (HSDP).

    shard: null for all processes / replicate. timeout_minutes: how long one waits for another.
    """

    shard: int | None = None
    replicate: int = 1
    timeout_minutes: int = 30

    def __post_init__(self):
        check_least(self, "parallel", shard=1, replicate=1, timeout_minutes=1)


def settings(config: Any) -> dict[str, Any]:
    """What a run's result depends on: the configuration without its NEUTRAL keys."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in NEUTRAL}
        return [strip(v) for v in value] if isinstance(value, (list, tuple)) else value

    return strip(to_dict(config))
