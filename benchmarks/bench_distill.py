"""Distillation: samples a second and peak memory of each stage, on digits and on a FLUX block.

The digits teacher is untrained here: its weights change neither the work nor the memory.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import flux_models
from harness.counting import peak_bytes
from harness.needs import skip_without

STAGES = ("shared", "moe", "mob")


@pytest.fixture(scope="module")
def digits_run(session):
    """Teacher, student and data of the built-in digits.yaml, its teacher's training left out."""
    skip_without(session, ("diffusers", "safetensors", "sklearn", "yaml", "tqdm"),
                 [f"digits/{stage}" for stage in STAGES])  # fmt: skip
    from distill.configs.checked import load_config
    from distill.configs.sections import DistillConfig
    from distill.data.digits import Digits
    from distill.pipeline import student_structure
    from distill.students import make_student, measure_importance
    from distill.teacher import build_teacher, modulation_inputs

    config = load_config(DistillConfig, "digits.yaml")
    teacher = build_teacher(config.teacher, 0).to(session.device).eval().requires_grad_(False)
    digits = Digits("train", config.data.timesteps)
    structure = student_structure(config, teacher)
    importance = measure_importance(teacher, digits, 1, 0)
    temb = modulation_inputs(teacher, digits, 64, 0)
    student = make_student(teacher, structure, importance, temb, 0)
    return config, teacher, student, digits, structure


@pytest.mark.parametrize("stage", STAGES)
def test_stage(bench, digits_run, stage):
    from d2m_models.config import group_names
    from distill.loop.train import make_optimizer
    from distill.stages import Distillation, prepare_stage
    from distill.students import group_blocks

    config, teacher, model, digits, structure = digits_run
    settings = next(s for s in config.stages if s.stage == stage)
    if stage == "mob":
        model = group_blocks(model, structure.mob, 0)
    frozen = prepare_stage(model, stage)
    features = list(group_names(model.d2m_config)) if stage == "mob" else None
    size = settings.train.batch_size
    objective = Distillation(teacher, model, digits, settings.loss, size, 0, 0, features)
    optimizer = make_optimizer(model, settings.train, frozen)
    batches = itertools.count()
    measure(bench, f"digits/{stage}", optimizer, lambda: objective(next(batches))["loss"], size,
            {"stage": stage, "config": "digits.yaml"}, torch.float32)  # fmt: skip


def test_block_step(bench):
    """One FLUX-sized MoE double block learns to imitate the dense one: a training step."""
    if bench.device.type != "cuda" and bench.size != "tiny":
        pytest.skip("a FLUX-sized training step is measured on a GPU")
    skip_without(bench.session, ["diffusers"], ["flux-double-block"])
    image, text = (16, 8) if bench.size == "tiny" else (4096, 512)
    kwargs, wide, narrow = flux_models.block_inputs(bench.size, image, text, bench.device)
    dense, moe = flux_models.block_pair("double", bench.size, bench.device)
    moe.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-5, fused=True)

    def loss():
        with torch.no_grad():
            target = dense(temb=wide, **kwargs)
        out = moe(temb=narrow, **kwargs)
        return sum((a - b).float().square().mean() for a, b in zip(out, target, strict=True))

    measure(bench, "flux-double-block", optimizer, loss, 1,
            {"stage": "one double block", "image_tokens": image, "text_tokens": text},
            torch.bfloat16)  # fmt: skip


def measure(bench, name, optimizer, loss_of_a_batch, batch, what, dtype):
    """Seconds and peak memory of training steps of `batch` samples."""
    losses = []

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of_a_batch()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    race = bench.race({"step": step}, "step", bench.rounds(8, 3), budget=bench.seconds(2, 10))
    peak = peak_bytes(step, bench.device)
    assert torch.stack(losses).isfinite().all()
    seconds = race.median("step")
    bench.add(
        "distillation",
        name,
        {
            **what,
            "batch": batch,
            "seconds": race.to_json(),
            "samples_per_second": batch / seconds,
            "peak_bytes": peak,
            "backend": bench.backend(dtype),
        },
        line=f"distillation {name}: {batch / seconds:.1f} samples/s, "
        f"peak {peak / 2**20:.0f} MiB beyond the weights",
    )
