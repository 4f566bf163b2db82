"""Sampling from pure noise with diffusers' flow-matching Euler scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.data import Batch

StepHook = Callable[[int, Any], None]


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
) -> Tensor:
    """Integrate dx/dt = v(x, t, c) from t = 1 to 0 in `steps` Euler steps: latents [B, S, C].

    Args:
        steps: how many, equally wide; or the noise levels t themselves, falling, 0 left out.
        noise: batch whose `noise` is the start and whose prompts condition it
            (`Digits.noise_batch`); the same for all models that are compared.
        on_step: called as on_step(i, aux) with every step's routing (converted models only).
        chunk: samples per forward.
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
            x = noise.noise[rows].to(device)
            fixed = {
                "encoder_hidden_states": noise.text[rows].to(device),
                "pooled_projections": noise.pooled[rows].to(device),
                "img_ids": noise.img_ids.to(device),
                "txt_ids": noise.txt_ids.to(device),
            }
            if noise.guidance is not None:
                fixed["guidance"] = noise.guidance[rows].to(device)
            if on_step is not None:
                fixed["output_aux"] = True
            for i, t in enumerate(scheduler.timesteps):
                out = model(
                    hidden_states=x, timestep=(t / 1000).expand(x.shape[0]).to(x.dtype), **fixed
                )
                if on_step is not None:
                    on_step(i, out.aux)
                # x stays in its own precision, also where autocast computes the velocity in bf16
                x = scheduler.step(out.sample.to(x.dtype), t, x, return_dict=False)[0]
            done.append(x.float().cpu())
    return torch.cat(done)
