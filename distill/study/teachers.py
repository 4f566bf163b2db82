"""The teachers of `d2m ablate`: one trained on photographs, and one distilled from it to few steps.

Shapes: B samples, S image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import files as ckpt
from distill import stages
from distill.configs.checked import to_dict
from distill.data.photos import Photos
from distill.loop.train import train
from distill.sampling import sample
from distill.study.config import AblateConfig
from distill.study.measure import Bench, relative_mse
from distill.teacher import build_teacher, train_dense

VERSION = 1  # raise when a result comes to mean something else, so that cached ones are redone


def fingerprint(*parts: Any) -> str:
    """Of everything a model or a measurement depends on."""
    return ckpt.fingerprint(VERSION, stages.VERSION, *parts)


class Teachers:
    """Both teachers and what they answer, each made when it is first asked for.

    teacher: the dense one, the same for all seeds, as the paper has one FLUX.1 [dev]. hyper: the
    step-distilled one. bench, hyper_bench: their answers on held-out data. reference: the dense
    one's samples from the bench's noise in many steps.
    """

    def __init__(self, config: AblateConfig, out: Path):
        self.config, self.out = config, out

    @cached_property
    def teacher(self) -> nn.Module:
        config = self.config.teacher
        assert config.train is not None
        model, run_id = build_teacher(config, 0, Photos), fingerprint(to_dict(config))
        folder = self.out / f"teacher-{run_id}"
        return train_dense(model, Photos("train"), config.train, folder, seed=0, run_id=run_id,
                           progress=False)  # fmt: skip

    @cached_property
    def hyper(self) -> nn.Module:
        return train_hyper(self.config, self.teacher, self.out)

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.teacher, self.config.evaluate)

    @cached_property
    def hyper_bench(self) -> Bench:
        return Bench(self.hyper, self.config.evaluate, self.config.hyper.grid)

    @cached_property
    def reference(self) -> Tensor:
        return sample(self.teacher, self.bench.noise, self.config.evaluate.reference_steps)

    def few_steps(self, model: nn.Module) -> dict[str, float]:
        """Distance of the model's samples, in as few steps as `hyper` takes and in as many as the
        reference, to the reference."""
        few, many = len(self.config.hyper.grid), self.config.evaluate.reference_steps
        return {
            name: relative_mse(self.reference, sample(model, self.bench.noise, steps))
            for name, steps in (("few_steps", few), ("many_steps", many))
        }


def train_hyper(config: AblateConfig, teacher: nn.Module, out: Path) -> nn.Module:
    """The teacher distilled to few steps: from x at grid[i] it goes in one step where the original
    goes in `substeps`.

        v*(x_t, t) = (x_t - x_s) / (t - s),    x_s = the teacher's Euler solution from t to s

    with s the next entry of the grid (0 behind the last): progressive distillation's target.
    """
    hyper = config.hyper
    student = build_teacher(config.teacher, 0, Photos)
    student.load_state_dict(teacher.state_dict())
    source = Photos("train", "grid", hyper.grid)
    grid, ends = torch.tensor(hyper.grid), torch.tensor([*hyper.grid[1:], 0.0])

    def objective(step: int) -> dict[str, Tensor]:
        batch = source.batch(0, step, hyper.train.batch_size)
        stop = ends[(batch.t[:, None] - grid).abs().argmin(1)]
        target = leap(teacher, batch.inputs(), stop, hyper.substeps)
        return {"loss": (student(**batch.inputs()).sample - target).square().mean()}

    run_id = fingerprint("hyper", to_dict(config.teacher), to_dict(hyper))
    train(student, objective, hyper.train, out / f"hyper-{run_id}", run_id=run_id,
          label="hyper teacher", progress=False)  # fmt: skip
    return student.eval().requires_grad_(False)


@torch.no_grad()
def leap(teacher: nn.Module, inputs: Mapping[str, Tensor], stop: Tensor, substeps: int) -> Tensor:
    """The constant velocity that leads from x_t to where `substeps` Euler steps of the teacher lead
    at time `stop` [B]."""
    start, t = inputs["hidden_states"], inputs["timestep"]
    x, h = start, (t - stop) / substeps
    for i in range(substeps):
        v = teacher(**{**inputs, "hidden_states": x, "timestep": t - i * h}).sample
        x = x - h[:, None, None] * v
    return (start - x) / (t - stop)[:, None, None]
