"""Judging a model: relative error to the teacher, samples, class accuracy, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch, held_out_batch
from distill.data.digits import Digits
from distill.data.photos import Photos
from distill.errors import UserError
from distill.sampling import StepHook, evaluating, sample
from distill.study.config import EvalConfig


def predict(model: nn.Module, batch: Batch, chunk: int = 256) -> Tensor:
    """The model's velocity for every row of the batch, on the CPU in fp32."""
    device = next(model.parameters()).device
    outputs = []
    with evaluating(model):
        for start in range(0, len(batch), chunk):
            part = batch[start : start + chunk].to(device)
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


# --- digits, read by a classifier -----------------------------------------------------------


class Judge:
    """A support-vector classifier trained on the real training digits."""

    def __init__(self, digits: Digits):
        from sklearn.svm import SVC

        self.model = SVC(gamma=0.001).fit(digits.images.flatten(1).numpy(), digits.labels.numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images [n, 8, 8], grey levels 0..16, that are read as their label."""
        return float(self.model.score(images.flatten(1).numpy(), labels.numpy()))


def judge_samples(
    model: nn.Module,
    judge: Judge,
    digits: Digits,
    noise: Batch,
    config: EvalConfig,
    hook: StepHook | None = None,
) -> tuple[float, Tensor]:
    """(class accuracy, images [B, 8, 8] in 0..1) of the model's samples from the given noise."""
    chunk = 256 if hook is None else len(noise)
    images = digits.to_images(sample(model, noise, config.sample_steps, hook, chunk))
    return judge.accuracy(images * 16, noise.labels), images


def sample_digits(model: nn.Module, path: Path, steps: int, per_class: int, seed: int) -> float:
    """Write a grid of samples as a PNG; returns the share the classifier reads as their prompt."""
    from distill.study.pictures import samples_png

    _check_digits(model)
    digits = Digits("train")
    noise = digits.noise_batch(seed, per_class)
    config = EvalConfig(per_class=per_class, sample_steps=steps)
    accuracy, images = judge_samples(model, Judge(digits), digits, noise, config)
    prompts = [str(d) for d in range(Digits.num_classes)]
    rows = {"samples": (f"{accuracy:.0%} read right", images)}
    samples_png(path, rows, prompts, min(per_class, 4))
    return accuracy


def _check_digits(model: nn.Module) -> None:
    have = tuple(
        model.config[k] for k in ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    )
    want = (Digits.channels, Digits.text_dim, Digits.pooled_dim)
    if have != want:
        raise UserError(
            f"the model takes (channels, text, pooled) = {have}, digits are {want}; for "
            "any other model give a prompt: d2m sample MODEL PROMPT"
        )


# --- photographs, beside the teacher's ------------------------------------------------------


class Bench:
    """A teacher's answers on test crops, the same for every comparator and seed.

    rel_mse: ||student - teacher||^2 / ||teacher||^2 on held-out triples; flow_loss: the mean
    squared error to the data's own velocity there; sample_mse: relative squared distance of the
    samples drawn in `steps` Euler steps to those the teacher draws from the same noise.
    """

    def __init__(self, teacher: nn.Module, evaluate: Any, grid: Sequence[float] | None = None):
        self.batch = held_out_batch(Photos("test"), evaluate.held_out, 0, grid)
        self.noise = Photos("test").noise_batch(0, evaluate.per_prompt)
        self.steps = evaluate.sample_steps if grid is None else len(grid)
        self.target = predict(teacher, self.batch, chunk=64)
        self.samples = sample(teacher, self.noise, self.steps)

    def rel_mse(self, model: nn.Module) -> float:
        return relative_mse(self.target, predict(model, self.batch, chunk=64))

    def measure(self, model: nn.Module, samples: bool = True) -> dict[str, float]:
        output = predict(model, self.batch, chunk=64)
        values = {
            "rel_mse": relative_mse(self.target, output),
            "flow_loss": float((output - self.batch.velocity).square().mean()),
        }
        if samples:
            drawn = sample(model, self.noise, self.steps)
            values["sample_mse"] = relative_mse(self.samples, drawn)
        return values

    def by_top_k(self, model: nn.Module, counts: Sequence[int]) -> dict[str, float]:
        """Relative MSE at every top_k, without any training; the configured one is put back."""
        from d2m_models import set_top_k

        values = {}
        for k in counts:
            set_top_k(model, k)
            values[f"top{k}"] = self.rel_mse(model)
        set_top_k(model, model.d2m_config.moe.top_k)
        return values
