"""The teachers of `d2m ablate`: one trained on photographs, and one distilled from it to few steps.

Shapes: B samples, S image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import files as ckpt
from distill.configs.checked import to_dict
from distill.configs.sections import TeacherConfig
from distill.data.photos import Photos
from distill.importance import flow_matching_loss
from distill.loop.train import train
from distill.study.config import AblateConfig

VERSION = 1  # raise when an arm comes to mean something else, so that cached results are redone


def fingerprint(*parts: Any) -> str:
    """Of everything a model or a measurement depends on."""
    from distill.stages import VERSION as STAGES

    return ckpt.fingerprint(VERSION, STAGES, *parts)


def build(config: TeacherConfig, seed: int) -> nn.Module:
    """A dense FLUX for the photographs."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=Photos.channels,
            num_layers=config.num_layers,
            num_single_layers=config.num_single_layers,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=Photos.text_dim,
            pooled_projection_dim=Photos.pooled_dim,
            axes_dims_rope=tuple(config.rope),
        )


def train_teacher(config: AblateConfig, out: Path, progress: bool) -> nn.Module:
    """The dense teacher: one for all seeds, as the paper has one FLUX.1 [dev]."""
    assert config.teacher.train is not None
    teacher, source = build(config.teacher, 0), Photos("train")
    size = config.teacher.train.batch_size
    run_id = fingerprint(to_dict(config.teacher))

    def objective(step: int) -> dict[str, Tensor]:
        return {"loss": flow_matching_loss(teacher, source.batch(0, step, size))}

    folder = out / f"teacher-{run_id}"
    train(teacher, objective, config.teacher.train, folder, run_id=run_id, label="teacher",
          progress=progress)  # fmt: skip
    return teacher.eval().requires_grad_(False)


def train_hyper(config: AblateConfig, teacher: nn.Module, out: Path, progress: bool) -> nn.Module:
    """The teacher distilled to few steps: from x at grid[i] it goes in one step where the original
    goes in `substeps`.

        v*(x_t, t) = (x_t - x_s) / (t - s),    x_s = the teacher's Euler solution from t to s

    with s the next entry of the grid (0 behind the last): progressive distillation's target.
    """
    hyper = config.hyper
    student = build(config.teacher, 0)
    student.load_state_dict(teacher.state_dict())
    source = Photos("train", "grid", hyper.grid)
    ends = torch.tensor([*hyper.grid[1:], 0.0])
    grid = torch.tensor(hyper.grid)

    def objective(step: int) -> dict[str, Tensor]:
        batch = source.batch(0, step, hyper.train.batch_size)
        stop = ends[(batch.t[:, None] - grid).abs().argmin(1)]
        target = leap(teacher, batch.inputs(), stop, hyper.substeps)
        out = student(**batch.inputs()).sample
        return {"loss": (out - target).square().mean()}

    run_id = fingerprint("hyper", to_dict(config.teacher), to_dict(hyper))
    folder = out / f"hyper-{run_id}"
    train(student, objective, hyper.train, folder, run_id=run_id, label="hyper teacher",
          progress=progress)  # fmt: skip
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
