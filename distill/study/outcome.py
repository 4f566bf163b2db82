"""What `d2m demo` measures of the comparators of one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill import files as ckpt
from distill.data.batch import held_out_batch
from distill.data.digits import Digits
from distill.evaluate import fidelity
from distill.loop.train import read_log
from distill.study import measure as ev
from distill.study.comparators import Context
from distill.study.patterns import Choices, two_layers


@dataclass
class Outcome:
    """All models of one seed with what was measured of them, and tensors for the report."""

    models: dict[str, nn.Module]
    rows: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def kind_of(name: str) -> str:
    return {"moe-l": "moe", "lite": "prune-depth"}.get(
        name, "mob" if name.startswith("mob") else name
    )


def measure(context: Context, models: dict[str, nn.Module]) -> Outcome:
    """Fill the table: accounts, relative MSE on held-out data, class accuracy, latency."""
    from d2m_models import account

    config, seed, test = context.config.evaluate, context.seed, Digits("test")
    held_out = held_out_batch(test, config.held_out, seed)
    noise = test.noise_batch(seed, config.per_class)
    target = ev.predict(context.teacher, held_out)
    judge = ev.Judge(context.source)
    seconds = ev.measure_latency(
        models, held_out_batch(test, config.latency_batch, seed), config.latency_rounds
    )
    layers, groups = report_layers(models["moe-l"], models["mob-s"])
    experts, blocks = Choices(len(noise), layers), Choices(len(noise), groups)
    rows, tensors = {}, {}
    for name, model in models.items():
        hook = {"moe-l": experts, "mob-s": blocks}.get(name)
        accuracy, images = ev.judge_samples(model, judge, test, noise, config, hook)
        counts = account(model, image_tokens=Digits.image_tokens, text_tokens=Digits.text_tokens)
        rows[name] = {
            "kind": kind_of(name),
            "total_params": counts.total_params,
            "activated_params": counts.activated_params,
            "flops": counts.flops,
            "step_seconds": seconds[name],
            "latency_ratio": seconds[name] / seconds["teacher"],
            "rel_mse": ev.relative_mse(target, ev.predict(model, held_out)),
            "class_accuracy": accuracy,
            **fidelity.pixels(images, tensors.get("samples/teacher", images)),
        }
        tensors[f"samples/{name}"] = images
    for layer in layers:
        tensors |= ckpt.pack(f"experts/{layer}", experts.frequencies(layer, noise.labels))
    for group in groups:
        tables = blocks.frequencies(group, noise.labels)
        del tables["token"]  # a sample's tokens go through the same block
        tensors |= ckpt.pack(f"blocks/{group}", tables)
    curves = stage_curves(context, models)
    tensors |= {f"curve/{m}/{s}": t for m, stages in curves.items() for s, t in stages.items()}
    real = judge.accuracy(test.images, test.labels)
    meta = {
        "prompts": [str(d) for d in range(Digits.num_classes)],
        "curves": {m: list(stages) for m, stages in curves.items()},
        "layers": layers,
        "groups": groups,
        "text_tokens": Digits.text_tokens,
        "notes": (
            "Activated parameters are those one token meets. FLOPs are of one image. Step: one "
            f"forward of {config.latency_batch} images, median of {config.latency_rounds}, the "
            "models taking turns. Relative MSE: ||student - teacher||² / ||teacher||² over "
            f"{config.held_out} held-out (x_t, t, prompt). Class accuracy: share of {len(noise)} "
            "samples that a classifier trained on the real digits reads as their prompt; it reads "
            f"{real:.1%} of real test digits. PSNR (dB) and SSIM: means of the same samples to the "
            "teacher's from the same noise, as `d2m evaluate` computes them; equal images have "
            f"{fidelity.HIGHEST_PSNR:.0f} dB."
        ),
    }
    return Outcome(models, rows, tensors, meta)


def report_layers(moe: nn.Module, mob: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Captions for experts.png: an image-branch layer, a single-block layer, every group."""
    from d2m_models import moe_layers
    from d2m_models.config import group_names

    layers = {}
    for name in two_layers(list(moe_layers(moe))):
        prefix, number, *_ = name.split(".")
        single = prefix.startswith("single")
        layers[name] = f"Single block {number}" if single else f"Double block {number}, image"
    groups = {}
    for group, blocks in group_names(mob.d2m_config).items():
        ends = [b.split(".")[1] for b in (blocks[0], blocks[-1])]
        groups[group] = f"{'D' if '.double.' in group else 'S'}{ends[0]}-{ends[1]}"
    return layers, groups


def stage_curves(context: Context, models: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Log lines [n, 3] of step, L_distill, L_balance, by model and stage; a mob model's and
    prune-depth's begin with moe-l's stages."""
    letters = {"shared": "(a) shared", "moe": "(b) MoE", "mob": "(c) MoB", "distill": "distill"}
    stages = {"teacher": (), "moe": ("shared", "moe"), "mob": ("mob",)}
    curves: dict[str, dict[str, Tensor]] = {}
    for name in models:
        curve: dict[str, Tensor] = {}
        if name.startswith("mob") or name == "prune-depth":
            for stage, table in curves["moe-l"].items():
                # only its last step, no values: the curve starts behind it
                curve[stage] = table[-1:].clone()
                curve[stage][:, 1:] = float("nan")
        for stage in stages.get(kind_of(name), ("distill",)):
            entries = read_log(context.folder / name / stage / "log.jsonl")
            lines = [[e["step"], e.get("distill", e["loss"]), e.get("balance", 0.0)]
                     for e in entries]  # fmt: skip
            curve[letters[stage]] = torch.tensor(lines, dtype=torch.float64).reshape(-1, 3)
        if curve:
            curves[name] = curve
    return curves
