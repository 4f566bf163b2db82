"""Sampling from pure noise with diffusers' flow-matching Euler scheduler, also while a student
trains: previews, always from the same noise and prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import files as ckpt
from distill.configs.sections import DataConfig
from distill.configs.training import TrainConfig
from distill.data.batch import Batch, flux_shift
from distill.loop.parallel import World
from distill.loop.step import autocast

StepHook = Callable[[int, Any], None]
PROMPT = ("encoder_hidden_states", "pooled_projections")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval mode and no gradients inside; the training mode is put back afterwards."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def sample(
    model: nn.Module,
    noise: Batch,
    steps: int | Sequence[float],
    on_step: StepHook | None = None,
    chunk: int = 256,
    guidance: float = 1.0,
) -> Tensor:
    """Integrate dx/dt = v(x, t, c) from t = 1 to 0 in `steps` Euler steps: latents [B, S, C].

    Args:
        steps: how many, equally wide; or the noise levels t themselves, falling, 0 left out.
        noise: batch whose `noise` is the start and whose prompts condition it
            (`Digits.noise_batch`); the same for all models that are compared.
        on_step: called as on_step(i, aux) with every step's routing (converted models only).
        chunk: samples per forward.
        guidance: w of v(empty) + w (v(prompt) - v(empty)), for models that were also trained on the
            empty prompt, which is zeros, as that of the icons. Routing is that of the prompt.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    device = next(model.parameters()).device
    # 1, 1 - 1/n, ..., 1/n; the scheduler appends 0
    levels = [1 - i / steps for i in range(steps)] if isinstance(steps, int) else list(steps)
    done = []
    with evaluating(model):
        for start in range(0, len(noise), chunk):
            rows = slice(start, start + chunk)
            scheduler = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(sigmas=levels, device=device)
            part = noise[rows].to(device)
            x, fixed = part.noise, part.inputs()
            if on_step is not None:
                fixed["output_aux"] = True
            for i, t in enumerate(scheduler.timesteps):
                now = {"hidden_states": x, "timestep": (t / 1000).expand(len(x)).to(x.dtype)}
                out = model(**{**fixed, **now})
                if on_step is not None:
                    on_step(i, out.aux)
                v = out.sample
                if guidance != 1:
                    empty = {name: torch.zeros_like(fixed[name]) for name in PROMPT}
                    free = model(**{**fixed, **empty, **now}).sample
                    v = free + guidance * (v - free)
                # x stays in its own precision, also where autocast computes the velocity in bf16
                x = scheduler.step(v.to(x.dtype), t, x, return_dict=False)[0]
            done.append(x.float().cpu())
    return torch.cat(done)


def noise_levels(data: DataConfig, image_tokens: int, steps: int) -> list[float]:
    """The levels t at which samples are drawn, falling: those the model is trained for.

    grid: the grid itself, however many levels it has. flux-shift: e^mu / (e^mu + 1/t - 1) of equal
    steps, as FLUX's pipeline takes them for this many image tokens. Else equal steps.
    """
    if data.timesteps == "grid":
        assert data.timestep_grid is not None
        return sorted(set(data.timestep_grid), reverse=True)
    levels = [1 - i / steps for i in range(steps)]
    if data.timesteps != "flux-shift":
        return levels
    shift = math.exp(flux_shift(image_tokens))
    return [shift / (shift + 1 / t - 1) for t in levels]


@dataclass(frozen=True)
class Previews:
    """Called with (model, step): writes FOLDER/step-0000123.png, or .safetensors with the latents
    where the source cannot turn latents into images.

    Args:
        source: batches; `noise_batch` and `to_images` or `decode` are used if it has them.
        data: says which noise levels the model knows. train: says what it computes in.
        count: pictures. steps: of Euler's method, unless there is a grid of noise levels.
    """

    source: Any
    folder: Path
    seed: int
    world: World
    data: DataConfig
    train: TrainConfig
    count: int = 10
    steps: int = 12

    def noise(self) -> Batch:
        if hasattr(self.source, "noise_batch"):
            return self.source.noise_batch(self.seed, 1)
        batch = self.source.batch(self.seed, 0, self.count, "sample")
        return replace(batch, t=torch.ones_like(batch.t))

    def __call__(self, model: nn.Module, step: int) -> None:
        noise = self.noise()
        levels = noise_levels(self.data, noise.noise.shape[1], self.steps)
        with autocast(self.train, self.world.device):
            latents = sample(model, noise, levels)  # sharded: every rank takes part
        if not self.world.main:
            return
        path = ckpt.make_folder(self.folder) / f"step-{step:07d}.png"
        images = None
        if hasattr(self.source, "to_images"):
            images = self.source.to_images(latents).clamp(0, 1)
        elif hasattr(self.source, "decode"):
            images = self.source.decode(latents, noise.img_ids)
        if images is None:
            ckpt.save_tensors(path.with_suffix(".safetensors"), {"latents": latents})
            return
        if images.ndim == 3:  # grey [B, H, W]; else RGB [B, H, W, 3]
            images = images[..., None].expand(-1, -1, -1, 3)
        from matplotlib.image import imsave

        row = torch.cat(list(images), dim=1)  # [H, B W, 3]
        ckpt.write_atomic(path, lambda tmp: imsave(tmp, row.numpy(), format="png"))
