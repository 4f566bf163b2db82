"""The dense teacher: a small FLUX trained on data that is built in, or a saved one."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2m_models.checkpoints.load import load_dense, load_flux
from d2m_models.conversion.flux import check_dense_flux
from distill import files as ckpt
from distill.configs.checked import to_dict
from distill.configs.sections import DataConfig, TeacherConfig, TeacherRun
from distill.configs.training import TrainConfig, settings
from distill.data.batch import held_out_batch
from distill.data.digits import ClassPrompts, Digits
from distill.data.sources import built_in
from distill.errors import CheckpointError, library_errors
from distill.importance import flow_matching_loss
from distill.loop.parallel import World
from distill.loop.train import Preview, train
from distill.sampling import Previews, evaluating

# Raise when the data, the model or the loss changes, so that cached teachers are retrained.
VERSION = 1
HELD_OUT = 256  # triples a split on which a teacher in training is judged


def cache_folder() -> Path:
    """$D2M_CACHE, or dense2moe in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("D2M_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense2moe"


def build_teacher(config: TeacherConfig, seed: int, data: type[ClassPrompts] = Digits) -> nn.Module:
    """A `FluxTransformer2DModel` for the tokens and prompts of `data`, initialised from `seed`
    whatever the global RNG is."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=data.channels,
            num_layers=config.num_layers,
            num_single_layers=config.num_single_layers,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=data.text_dim,
            pooled_projection_dim=data.pooled_dim,
            axes_dims_rope=tuple(config.rope),
        )


def train_dense(
    model: nn.Module, source: Any, config: TrainConfig, folder: Path, *, seed: int, run_id: str,
    progress: bool, preview: Preview | None = None, accept_changed: bool = False,
) -> nn.Module:  # fmt: skip
    """A dense model, trained by flow matching or found trained in `folder`; frozen, eval mode."""
    device = next(model.parameters()).device
    # on a CPU the backward of fused attention is 5 times slower in bf16 than that of its products
    slow = device.type == "cpu" and config.compute_dtype == "bfloat16"

    def objective(step: int) -> dict[str, Tensor]:
        batch = source.batch(seed, step, config.batch_size).to(device)
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            return {"loss": flow_matching_loss(model, batch)}

    train(model, objective, config, folder, run_id=run_id, label="teacher", progress=progress,
          preview=preview, accept_changed=accept_changed)  # fmt: skip
    return model.eval().requires_grad_(False)


def find_teacher(name: str) -> str:
    """The folder of a teacher that comes with the package, such as "icons", its weights compared
    with their SHA-256; any other name of a model as it is."""
    folder = Path(str(resources.files("distill") / "teachers" / name))
    if "/" in name or Path(name).exists() or not folder.is_dir():
        return name
    known = json.loads((folder / "training.json").read_text(encoding="utf-8"))["sha256"]
    weights = folder / "diffusion_pytorch_model.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != known:
        raise CheckpointError(f"{weights} is damaged: its SHA-256 is another; install again")
    return str(folder)


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
            teacher = load_dense(find_teacher(config.path), dtype=getattr(torch, config.dtype))
        if config.lora is not None:
            check_dense_flux(teacher, "teacher.path with teacher.lora")
            from d2m_models.checkpoints.lora_file import fuse_lora, read_lora

            fuse_lora(teacher, read_lora(config.lora, config.lora_scale))
        return teacher.to(device).eval().requires_grad_(False)
    assert config.train is not None
    run_id = ckpt.fingerprint(
        VERSION, settings(config), to_dict(data), seed, torch.device(device).type
    )
    source = built_in(data)
    return train_dense(
        build_teacher(config, seed, type(source)).to(device),
        source,
        config.train,
        cache_folder() / f"teacher-{run_id}",
        seed=seed,
        run_id=run_id,
        progress=progress,
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


def train_teacher(run: TeacherRun, device: str = "cpu", accept_changed: bool = False) -> Path:
    """`d2m teacher`: OUT/model, the trained model in fp16; OUT/training has checkpoints and log.

    Every `train.preview_every` steps OUT/previews gets samples, and OUT/held-out.jsonl the loss on
    fixed triples of the training data and of what it leaves out.
    """
    config, out, train_config = run.teacher, ckpt.make_folder(run.out), run.teacher.train
    assert train_config is not None
    source = built_in(run.data)
    model = build_teacher(config, run.seed, type(source))
    if run.start is not None:
        with library_errors():
            start = load_flux(find_teacher(run.start)).float()
            ckpt.load_state(model, start.state_dict(), run.start)
    splits = source.splits
    held = {s: held_out_batch(built_in(run.data, s), HELD_OUT, run.seed) for s in splits}
    draw = Previews(source, out / "previews", run.seed, World(), run.data, train_config)

    def check(model: nn.Module, step: int) -> None:
        row: dict[str, float] = {"step": step}
        with evaluating(model):
            for split, batch in held.items():
                losses = [float(flow_matching_loss(model, batch[i : i + 64].to(device)))
                          for i in range(0, HELD_OUT, 64)]  # fmt: skip
                row[split] = sum(losses) / len(losses)
        with (out / "held-out.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        draw(model, step)

    parts = (VERSION, settings(config), to_dict(run.data), run.seed, run.start)
    run_id = ckpt.fingerprint(*parts, torch.device(device).type)
    train_dense(model.to(device), source, train_config, out / "training", seed=run.seed,
                run_id=run_id, progress=True, preview=check,
                accept_changed=accept_changed)  # fmt: skip
    target = out / "model"
    if not target.exists():
        ckpt.write_folder(target, model.cpu().half().save_pretrained)
    return target
