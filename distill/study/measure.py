"""Judging a model: relative error to the teacher, samples, words read in icons, latency."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch, held_out_batch
from distill.data.icons import FONTS, Icons
from distill.data.photos import Photos
from distill.sampling import evaluating, sample


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


DEAD = 1e-3  # share of its layer's slots below which an expert counts as dead


def expert_use(model: nn.Module, batch: Batch) -> dict[str, float | None]:
    """dead: share of all experts that get less than DEAD of their layer's slots. busiest: mean over
    layers of the largest load, 1 = even. None for models without experts."""
    from d2m_models import moe_layers

    if not moe_layers(model):
        return {"dead": None, "busiest": None}
    with evaluating(model):
        routing = model(**batch.inputs(), output_aux=True).aux.routing
    share_LE = torch.stack([r.offsets.diff().double().cpu() for r in routing.values()])
    share_LE /= share_LE.sum(1, keepdim=True)
    busiest = share_LE.amax(1) * share_LE.shape[1]
    return {"dead": float((share_LE < DEAD).double().mean()), "busiest": float(busiest.mean())}


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


# --- icons, read by their nearest neighbours --------------------------------------------------


class Judge:
    """Reads words in icons: those of the real training icons that look most alike.

    Likeness is the cosine of histograms of oriented gradients (8 directions in cells of 4x4
    pixels). Of the words of held-out icons it finds 0.55, of other icons' words 0.03.
    """

    NEAREST = 5
    SILENT = frozenset({*FONTS, "outline"})  # words that name no thing

    def __init__(self, icons: Icons):
        self.names = icons.names
        self.features = self._features(icons.to_images(icons.latents))

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """For each image [n, 32, 32] the share of its prompt's words that are among the words of
        the nearest training icons."""
        near = (self._features(images) @ self.features.T).topk(self.NEAREST, dim=1).indices
        found = []
        for rows, prompt in zip(near.tolist(), prompts, strict=True):
            asked = set(prompt.split()) - self.SILENT
            seen = {word for i in rows for word in self.names[i]}
            found.append(len(asked & seen) / max(len(asked), 1))
        return found

    @staticmethod
    def _features(images_nHW: Tensor) -> Tensor:
        across = torch.nn.functional.pad(images_nHW[:, :, 2:] - images_nHW[:, :, :-2], (1, 1))
        down = torch.nn.functional.pad(images_nHW[:, 2:] - images_nHW[:, :-2], (0, 0, 1, 1))
        direction = (torch.atan2(down, across) % math.pi / math.pi * 8).long().clamp(max=7)
        strength = (across.square() + down.square()).sqrt()
        n, H, W = images_nHW.shape
        maps = strength.new_zeros(n, 8, H, W).scatter_(1, direction[:, None], strength[:, None])
        cells = torch.nn.functional.avg_pool2d(maps, 4).flatten(1)
        return torch.nn.functional.normalize(cells, dim=1)


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
