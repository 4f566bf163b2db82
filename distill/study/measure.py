"""Judging a model: relative error to the teacher, class accuracy, latency, use of experts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch, generator
from distill.data.digits import Digits
from distill.errors import UserError
from distill.sampling import evaluating, sample
from distill.study.config import EvalConfig


class Judge:
    """A support-vector classifier trained on the real training digits."""

    def __init__(self, digits: Digits):
        from sklearn.svm import SVC

        self.model = SVC(gamma=0.001).fit(digits.images.flatten(1).numpy(), digits.labels.numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images [n, 8, 8], grey levels 0..16, that are read as their label."""
        return float(self.model.score(images.flatten(1).numpy(), labels.numpy()))


def held_out_batch(digits: Digits, count: int, seed: int) -> Batch:
    """`count` triples (x_t, t, c) from test images, t spread evenly over (0, 1)."""
    batch = digits.batch(seed, 0, count, "test")
    t = (torch.arange(count) + 0.5) / count
    return replace(batch, t=t[torch.randperm(count, generator=generator(seed, "test", 1))])


def predict(model: nn.Module, batch: Batch, chunk: int = 256) -> Tensor:
    """The model's velocity for every row of the batch, on the CPU in fp32."""
    device = next(model.parameters()).device
    outputs = []
    with evaluating(model):
        for start in range(0, len(batch), chunk):
            rows = slice(start, start + chunk)
            part = batch[rows].to(device)
            outputs.append(model(**part.inputs()).sample.float().cpu())
    return torch.cat(outputs)


def relative_mse(teacher_out: Tensor, student_out: Tensor) -> float:
    """||student - teacher||^2 / ||teacher||^2 over all held-out elements."""
    difference = (student_out.double() - teacher_out.double()).square().sum()
    return float(difference / teacher_out.double().square().sum())


def measure_latency(models: Mapping[str, nn.Module], batch: Batch, rounds: int) -> dict[str, float]:
    """Median seconds of one forward; models take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 2):  # two to warm up
        for name, model in models.items():
            device = next(model.parameters()).device
            inputs = {k: v.to(device) for k, v in batch.inputs().items()}
            with evaluating(model):
                _synchronize(device)
                start = time.perf_counter()
                model(**inputs)
                _synchronize(device)
                if round_ >= 2:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SelectionCounts:
    """How often each expert of some layers is selected, by timestep, prompt, token (Fig. 6)."""

    def __init__(self, layers: list[str], noise: Batch, steps: int, text_tokens: int):
        self.layers, self.labels, self.steps = layers, noise.labels, steps
        self.text_tokens = text_tokens
        self.counts: dict[str, Tensor] = {}

    def __call__(self, step: int, aux: Any) -> None:
        for layer in self.layers:
            routing = aux.routing[layer]
            experts = routing.probs.shape[1]
            # tokens of one sample are consecutive rows
            chosen = torch.nn.functional.one_hot(routing.ids.long(), experts).sum(1).cpu().double()
            chosen = chosen.view(len(self.labels), -1, experts)
            tokens = chosen.shape[1]
            for kind, rows, value in (
                ("timestep", self.steps, chosen.sum((0, 1))),
                (
                    "prompt",
                    10,
                    torch.zeros(10, experts).double().index_add_(0, self.labels, chosen.sum(1)),
                ),
                ("token", tokens, chosen.sum(0)),
            ):
                table = self.counts.setdefault(
                    f"{layer}/{kind}", torch.zeros(rows, experts).double()
                )
                if kind == "timestep":
                    table[step] += value
                else:
                    table += value

    def frequencies(self) -> dict[str, Tensor]:
        """Each row's counts as shares that add up to 1. Keys "<layer>/<timestep|prompt|token>"."""
        return {k: (c / c.sum(1, keepdim=True)).float() for k, c in self.counts.items()}


class BlockCounts:
    """How often each block of every MoB group runs, by timestep and prompt."""

    def __init__(self, labels: Tensor, steps: int):
        self.labels, self.steps = labels, steps
        self.counts: dict[str, Tensor] = {}

    def __call__(self, step: int, aux: Any) -> None:
        for group, mob in aux.mob.items():
            blocks = mob.probs.shape[1]
            chosen = torch.nn.functional.one_hot(mob.ids.long(), blocks).sum(1).cpu().double()
            by_step = self.counts.setdefault(
                f"{group}/timestep", torch.zeros(self.steps, blocks).double()
            )
            by_prompt = self.counts.setdefault(f"{group}/prompt", torch.zeros(10, blocks).double())
            by_step[step] += chosen.sum(0)
            by_prompt.index_add_(0, self.labels, chosen)

    frequencies = SelectionCounts.frequencies


def judge_samples(
    model: nn.Module,
    judge: Judge,
    digits: Digits,
    noise: Batch,
    config: EvalConfig,
    hooks: list[Any] | None = None,
) -> tuple[float, Tensor]:
    """(class accuracy, images [B, 8, 8] in 0..1) of the model's samples from the given noise."""

    def on_step(step: int, aux: Any) -> None:
        for hook in hooks or []:
            hook(step, aux)

    latents = sample(
        model,
        noise,
        config.sample_steps,
        on_step if hooks else None,
        chunk=len(noise) if hooks else 256,
    )
    images = digits.to_images(latents)
    return judge.accuracy(images * 16, noise.labels), images


def sample_digits(model: nn.Module, path: Path, steps: int, per_class: int, seed: int) -> float:
    """Write a grid of samples as a PNG; returns the share the classifier reads as their prompt."""
    from distill.study.measure import Judge, judge_samples
    from distill.study.pictures import samples_png

    _check_digits(model)
    digits = Digits("train")
    noise = digits.noise_batch(seed, per_class)
    config = EvalConfig(per_class=per_class, sample_steps=steps)
    accuracy, images = judge_samples(model, Judge(digits), digits, noise, config)
    prompts = [str(d) for d in range(Digits.num_classes)]
    samples_png(
        path, {"samples": (f"{accuracy:.0%} read right", images)}, prompts, min(per_class, 4)
    )
    return accuracy


def _check_digits(model: nn.Module) -> None:
    have = tuple(
        model.config[k] for k in ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    )
    want = (Digits.channels, Digits.text_dim, Digits.pooled_dim)
    if have != want:
        raise UserError(
            f"the model takes (channels, text, pooled) = {have}, digits are {want}; for FLUX "
            "models use diffusers' FluxPipeline(transformer=...)"
        )
