"""The dense teacher: a small FLUX trained on real digits and cached, or a saved one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import checkpoint as ckpt
from distill.checked import to_dict
from distill.config import DataConfig, TeacherConfig
from distill.data import Digits
from distill.errors import CheckpointError, UserError
from distill.importance import flow_matching_loss
from distill.train import train
from distill.train_config import settings

VERSION = (
    1  # raise when the data, the model or the loss changes, so that cached teachers are retrained
)


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
        teacher = load_flux(config.path, dtype=getattr(torch, config.dtype))
        if config.lora is not None:
            from d2m_models.fuse import fuse_lora, read_lora

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

        train(
            teacher,
            objective,
            config.train,
            folder,
            run_id=run_id,
            label="teacher",
            progress=progress,
        )
    return teacher.to(device).eval().requires_grad_(False)


def load_flux(
    path: Path | str, subfolder: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A dense `FluxTransformer2DModel` from a folder, a pipeline's folder or a hub name."""
    from diffusers import FluxTransformer2DModel

    local = Path(path)
    if subfolder is None and (local / "model_index.json").is_file():
        subfolder = "transformer"
    folder = local / subfolder if subfolder else local
    looks_local = (
        local.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1
    )
    if looks_local and not (folder / "config.json").is_file():
        state = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {state}; expected the folder of a saved FluxTransformer2DModel")
    refuse_pickles(folder)
    try:
        return FluxTransformer2DModel.from_pretrained(
            path, subfolder=subfolder, torch_dtype=dtype, use_safetensors=True
        )
    except Exception as err:  # diffusers, safetensors and the hub client raise many kinds
        raise CheckpointError(
            f"cannot load a FLUX transformer from {folder}: {' '.join(str(err).split())}"
        ) from err


def refuse_pickles(folder: Path) -> None:
    """An error that says so where a folder's weights are in a pickle, which may hold any code."""
    files = sorted(f.name for f in folder.glob("diffusion_pytorch_model*"))
    if any(".bin" in f for f in files) and not any(".safetensors" in f for f in files):
        raise UserError(
            f"{folder} holds pickles ({files[0]}); only safetensors are read: load it with "
            "diffusers where you trust it, and save it again"
        )


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
