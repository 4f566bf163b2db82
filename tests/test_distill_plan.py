"""`d2m distill --plan` against what a run really takes, and the ready configurations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from distill.config import (  # noqa: E402
    DistillConfig,
    LossConfig,
    StageConfig,
    TrainConfig,
    load_config,
)
from distill.data import Digits  # noqa: E402
from distill.plan import plan  # noqa: E402
from distill.stages import group_blocks, make_student, run_stage  # noqa: E402
from distill.teacher import build_teacher  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def small(stage, **train):
    """The digits configuration with one stage of two steps."""
    config = load_config(DistillConfig, "digits.yaml")
    settings = {"steps": 2, "batch_size": 32, "lr": 1e-3, "log_every": 100, **train}
    return replace(config, stages=[StageConfig(stage, TrainConfig(**settings), LossConfig())])


def measured(config, folder):
    """Most bytes of tensors that are alive at once in two steps, by the allocator's own account."""
    from distill.pipeline import student_structure

    (stage,) = config.stages
    teacher = build_teacher(config.teacher, 0).eval().requires_grad_(False)
    structure = student_structure(config, teacher)
    zeros = {n: torch.zeros(m) for n, m in _widths(teacher).items()}
    temb = torch.randn(64, teacher.inner_dim)
    model = make_student(teacher, structure, zeros, temb, 0)
    if stage.stage == "mob":
        model = group_blocks(model, structure.mob, 0)
    source = Digits("train")
    own = sum(p.nbytes for m in (teacher, model) for p in m.parameters())
    options = {"seed": 0, "first": 0, "parent": "", "label": "", "progress": False}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run_stage(model, teacher, source, stage, folder, **options)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > own / 10
    return own + peak


def _widths(teacher):
    from distill.importance import ffn_linears

    return {name: up.out_features for name, (up, _, _) in ffn_linears(teacher).items()}


@pytest.mark.parametrize(
    ("stage", "train"),
    [
        ("moe", {}),
        ("moe", {"ema": 0.9, "gradient_checkpointing": True}),
        ("moe", {"micro_batch": 8, "ema": 0.9}),
        ("shared", {"compute_dtype": "bfloat16"}),
        ("mob", {"batch_size": 64}),
    ],
    ids=["moe", "checkpointing", "parts", "shared in bf16", "mob"],
)
def test_planned_memory_is_what_a_run_takes(tmp_path, stage, train):
    config = small(stage, **train)
    (planned,) = plan(config)
    really = measured(config, tmp_path)
    assert planned.memory.peak == pytest.approx(really, rel=0.1)
