"""What the demo's YAML may say, beside the sections it shares with `d2m distill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.checked import check_least
from distill.config import DataConfig, StageConfig, TeacherConfig
from distill.errors import ConfigError


@dataclass(frozen=True)
class EvalConfig:
    """How models are judged: samples a class, Euler steps, held-out (x_t, t, c), timing."""

    per_class: int = 20
    sample_steps: int = 12
    held_out: int = 1188
    latency_batch: int = 64
    latency_rounds: int = 15

    def __post_init__(self):
        check_least(
            self,
            "evaluate",
            per_class=1,
            sample_steps=1,
            held_out=1,
            latency_batch=1,
            latency_rounds=1,
        )


@dataclass(frozen=True)
class DemoConfig:
    """`d2m demo`: one teacher, one MoE structure and MoB groupings on top of it.

    structure: fields of `FluxMoEConfig` without depth and mob. groups: "s" (and "m", "xs" for
    --full) -> fields of `MoBConfig`. lite: double blocks the FLUX.1-Lite-like comparator keeps.
    pruned_lr: learning rate of prune-mlp and lite; prune-depth has that of stage (c).
    """

    teacher: TeacherConfig
    structure: dict[str, Any]
    groups: dict[str, Any]
    lite: list[int]
    shared: StageConfig
    moe: StageConfig
    mob: StageConfig
    pruned_lr: float
    evaluate: EvalConfig = EvalConfig()
    data: DataConfig = DataConfig()
    importance_batches: int = 8
    calibration: int = 1024

    def __post_init__(self):
        missing = [name for name in ("m", "s", "xs") if name not in self.groups]
        if missing or set(self.groups) - {"m", "s", "xs"}:
            raise ConfigError(f"groups has the keys {sorted(self.groups)}; expected m, s and xs")
        for name in ("shared", "moe", "mob"):
            if getattr(self, name).stage != name:
                raise ConfigError(
                    f"{name}.stage is {getattr(self, name).stage!r}; expected {name!r}"
                )
