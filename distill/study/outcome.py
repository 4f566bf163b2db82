"""What `d2m demo` measures of its models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import held_out_batch
from distill.data.icons import Icons, whole_prompt
from distill.data.sources import built_in
from distill.evaluate import fidelity
from distill.loop.train import read_log
from distill.sampling import sample
from distill.study import measure as ev
from distill.study.comparators import Context
from distill.study.patterns import Choices, two_layers


@dataclass
class Outcome:
    """All models with what was measured of them, and tensors for the report."""

    models: dict[str, nn.Module]
    rows: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def measure(context: Context, models: dict[str, nn.Module]) -> Outcome:
    """Fill the table: accounts, relative MSE on held-out icons, words read, latency."""
    from d2m_models import account, moe_layers

    config, seed, icons = context.config.evaluate, context.seed, context.source
    held_out = held_out_batch(built_in(context.config.data, "test"), config.held_out, seed)
    # training icons that are evenly spread, after the report's own prompts
    picks = torch.linspace(0, len(icons) - 1, config.judged).long().tolist()
    asked = [whole_prompt(p) for p in config.prompts]
    prompts = [*asked, *(" ".join(icons.names[i]) for i in picks)]
    noise, shown = icons.asked(prompts, seed), len(asked)
    target, judge = ev.predict(context.teacher, held_out), ev.Judge(icons)
    seconds = ev.measure_latency(models, held_out[: config.latency_batch], config.latency_rounds)
    layers = two_layers(list(moe_layers(models["moe"])))
    experts = Choices(len(noise), layers)
    rows, tensors = {}, {}
    for name, model in models.items():
        hook = experts if name == "moe" else None
        drawn = sample(model, noise, config.sample_steps, hook, len(noise), config.guidance)
        images = icons.to_images(drawn)
        counts = account(model, image_tokens=Icons.image_tokens, text_tokens=Icons.text_tokens)
        rows[name] = {
            "total_params": counts.total_params,
            "activated_params": counts.activated_params,
            "flops": counts.flops,
            "step_seconds": seconds[name],
            "latency_ratio": seconds[name] / seconds["teacher"],
            "rel_mse": ev.relative_mse(target, ev.predict(model, held_out)),
            "words": mean(judge.score(images, prompts)),
            **fidelity.pixels(images, tensors.get("drawn/teacher", images)),
            **ev.expert_use(model, held_out[:64]),
        }
        tensors[f"drawn/{name}"] = images
    real = {" ".join(name): i for i, name in enumerate(icons.names)}
    known = [real.get(p, -1) for p in asked]
    tensors["real"] = (
        icons.to_images(icons.latents[known]) * torch.tensor(known).ge(0)[:, None, None]
    )
    for layer in layers:
        ids = experts.of(layer, Icons.image_tokens)[:, :shown, :, 0]  # the first choice
        tensors[f"experts/{layer}"] = ids.to(torch.uint8)
    for name in models:
        if name != "teacher":
            tensors[f"curve/{name}"] = curve(context.folder / name)
    words = mean(judge.score(icons.to_images(icons.latents[picks]), prompts[shown:]))
    meta = {
        "prompts": list(config.prompts),
        "notes": (
            "Activated parameters are those one token meets. FLOPs are of one image. Step: one "
            f"forward of {config.latency_batch} images, median of {config.latency_rounds}, the "
            "models taking turns. Relative MSE: ||student - teacher||² / ||teacher||² over "
            f"{config.held_out} (x_t, t, prompt) of icons that no training saw. Words: share of "
            f"the words of {len(prompts)} prompts found among those of the 5 real icons that a "
            f"drawing is most like; of real icons {words:.0%}. PSNR (dB) and SSIM: to what the "
            f"teacher drew from the same noise, guidance {config.guidance:g}, "
            f"{config.sample_steps} steps; equal images have {fidelity.HIGHEST_PSNR:.0f} dB."
        ),
    }
    return Outcome(models, rows, tensors, meta)


def curve(folder: Path) -> Tensor:
    """[n, 2]: step and output distillation loss of a model's own training."""
    entries = [e for log in sorted(folder.glob("*/log.jsonl")) for e in read_log(log)]
    lines = [[e["step"], e.get("distill", e["loss"])] for e in entries]
    return torch.tensor(lines, dtype=torch.float64).reshape(-1, 2)
