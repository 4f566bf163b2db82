"""The dense teacher: a small FLUX trained on real digits and cached, or a saved one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.checkpoints.load import load_flux
from distill import files as ckpt
from distill.configs.checked import to_dict
from distill.configs.sections import DataConfig, TeacherConfig
from distill.configs.training import settings
from distill.data.digits import Digits
from distill.errors import library_errors
from distill.importance import flow_matching_loss
from distill.loop.train import train

# Raise when the data, the model or the loss changes, so that cached teachers are retrained.
VERSION = 1


def cache_folder() -> Path:
    """$D2M_CACHE, or dense2moe in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("D2M_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense2moe"


def build_teacher(config: TeacherConfig, seed: int) -> nn.Module:
    """A `FluxTransformer2DModel` for digits, initialised from `seed` whatever the global RNG is."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=Digits.channels,
            num_layers=config.num_layers,
            num_single_layers=config.num_single_layers,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=Digits.text_dim,
            pooled_projection_dim=Digits.pooled_dim,
            axes_dims_rope=tuple(config.rope),
        )


def load_teacher(
    config: TeacherConfig, data: DataConfig, seed: int, device: str = "cpu", progress: bool = True
) -> nn.Module:
    """The teacher, frozen and in eval mode: read from `config.path`, from the cache, or trained
    now.

    Training is resumable and its result is kept in `cache_folder()` under a name that depends on
    all its settings, so a second run starts at once.
    """
    if config.path is not None:
        with library_errors():
            teacher = load_flux(config.path, dtype=getattr(torch, config.dtype))
        if config.lora is not None:
            from d2m_models.checkpoints.lora_file import fuse_lora, read_lora

            fuse_lora(teacher, read_lora(config.lora, config.lora_scale))
    else:
        assert config.train is not None
        teacher = build_teacher(config, seed).to(device)
        digits = Digits("train", data.timesteps, data.timestep_grid)
        run_id = ckpt.fingerprint(
            VERSION, settings(config), to_dict(data), seed, torch.device(device).type
        )
        folder = cache_folder() / f"teacher-{run_id}"
        size = config.train.batch_size

        def objective(step: int) -> dict[str, Tensor]:
            return {"loss": flow_matching_loss(teacher, digits.batch(seed, step, size).to(device))}

        options = {"run_id": run_id, "label": "teacher", "progress": progress}
        train(teacher, objective, config.train, folder, **options)
    return teacher.to(device).eval().requires_grad_(False)


def modulation_inputs(teacher: nn.Module, source: Any, count: int, seed: int) -> Tensor:
    """temb [count, D] of random (t, guidance, prompt): calibration data for the AdaLN basis."""
    weight, kept = next(teacher.parameters()), []
    for start in range(0, count, 64):  # a prompt's T5 embedding takes 8 MB, its pooled one 3 KB
        rows = slice(start, min(start + 64, count))
        part = source.batch(seed, 0, count, "calibrate", rows)
        kept.append([v for v in (part.t, part.guidance, part.pooled) if v is not None])
    *times, pooled = (torch.cat(column).to(weight.device) for column in zip(*kept, strict=True))
    with torch.no_grad():
        temb = teacher.time_text_embed(*(v * 1000 for v in times), pooled.to(weight.dtype))
    return temb.float()
