"""Images of a model from its own diffusers pipeline, one PNG each, resumable and sharded.

FOLDER/images/PROMPT-IMAGE.png, FOLDER/latents/PROMPT-IMAGE.safetensors (the latents at `MOMENTS`
of the way), settings.json (what the images depend on) and model.json (what the model is).

An image's noise is drawn on the CPU from the seed, the prompt's number and the image's: the same
for every model, whatever the batch, the device and the number of processes.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import files as ckpt
from distill.errors import CheckpointError, UserError, library_errors
from distill.evaluate.prompts import Prompt
from distill.evaluate.statistics import key_of
from distill.loop.parallel import World

MOMENTS = (0.25, 0.5, 0.75, 1.0)  # shares of the steps after which latents are kept


@dataclass(frozen=True)
class Settings:
    """What images depend on beside the prompts. None: the pipeline's own default.

    images: a prompt. size: side in pixels. base: pipeline of a MODEL that is a transformer alone.
    """

    model: str
    base: str | None = None
    images: int = 1
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    seed: int = 0
    dtype: str | None = None


def image_path(folder: Path, key: str) -> Path:
    return folder / "images" / f"{key}.png"


def latents_path(folder: Path, key: str) -> Path:
    return folder / "latents" / f"{key}.safetensors"


def keys_of(prompts: Sequence[Prompt], images: int) -> list[str]:
    return [key_of(p, i) for p in range(len(prompts)) for i in range(images)]


def noise(seed: int, key: str) -> torch.Generator:
    """The generator that draws an image's noise, on the CPU."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def read_model(folder: Path) -> dict[str, Any]:
    """model.json of an evaluation's folder."""
    try:
        return json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"cannot read {folder / 'model.json'} ({err}); expected the folder of `d2m evaluate`"
        ) from err


def generate(
    folder: Path,
    prompts: Sequence[Prompt],
    settings: Settings,
    world: World,
    batch: int = 1,
    offload: str | None = None,
    latents: bool = True,
    progress: bool = True,
) -> None:
    """Make the images that are not there yet; every process makes a share of them.

    latents: keep them at `MOMENTS`, which is 2 MB an image of FLUX at 1024 x 1024.

    Raises:
        UserError: the folder's images were made with other settings or from other prompts.
    """
    if world.main:
        _claim(folder, prompts, settings)
    world.barrier()
    keys = keys_of(prompts, settings.images)
    missing = [key for key in keys if not image_path(folder, key).exists()]
    world.barrier()  # nobody writes before all have looked
    if not missing and (folder / "model.json").exists():
        return
    from d2m_models.checkpoints.pipelines import load_pipeline

    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    with library_errors():
        pipe = load_pipeline(
            settings.model, settings.base, dtype=dtype, device=str(world.device), offload=offload
        )
    pipe.set_progress_bar_config(disable=True)
    facts = describe(pipe, settings)
    seconds = []
    for part, took in _batches(pipe, prompts, missing[world.rank :: world.size], settings, batch,
                               folder, latents, progress and world.main, world.size):  # fmt: skip
        seconds.append(took / part)
    del pipe
    gc.collect()  # hooks tie a pipeline in circles; a teacher or a judge wants its memory
    world.barrier()
    if world.main:
        if seconds:
            facts |= {"image_seconds": statistics.median(seconds), "batch": batch}
        ckpt.write_text(folder / "model.json", json.dumps(facts, indent=2) + "\n")
    world.barrier()


def _claim(folder: Path, prompts: Sequence[Prompt], settings: Settings) -> None:
    text = [prompt.text for prompt in prompts]
    now = {**asdict(settings), "prompts": len(text), "prompts_hash": ckpt.fingerprint(text)}
    path = ckpt.make_folder(folder) / "settings.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    changed = [f"{k}: {old.get(k)!r} -> {v!r}" for k, v in now.items() if old.get(k) != v]
    if changed:
        raise UserError(
            f"{folder} holds images of other settings ({'; '.join(changed)}); choose another "
            "folder or remove it"
        )
    ckpt.make_folder(folder / "images")
    ckpt.make_folder(folder / "latents")
    for part in (folder, folder / "images", folder / "latents"):
        ckpt.files.clear_temporary(part)
    ckpt.write_text(path, json.dumps(now, indent=2) + "\n")


def describe(pipe: Any, settings: Settings) -> dict[str, Any]:
    """What the model is and costs, as far as the pipeline and `d2m_models.account` can tell."""
    default = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    facts = {"model": settings.model, "pipeline": type(pipe).__name__, "preset": None,
             "steps": settings.steps or default}  # fmt: skip
    model = getattr(pipe, "transformer", None)
    if model is None or not type(model).__name__.startswith("Flux"):
        return facts
    from d2m_models import PRESETS, FluxMoEConfig, account

    try:
        counts = account(model, settings.size or 1024, settings.size or 1024)
    except (TypeError, ValueError):  # a FLUX that account does not know
        return facts
    dense = FluxMoEConfig(moe=None, dense_double_blocks=(), num_layers=model.config.num_layers,
                          num_single_layers=model.config.num_single_layers)  # fmt: skip
    structure = getattr(model, "d2m_config", dense)
    known = {"flux-dense": FluxMoEConfig(moe=None, dense_double_blocks=()), **PRESETS}
    wide = model.config.num_attention_heads * model.config.attention_head_dim == 3072
    facts["preset"] = next((n for n, c in known.items() if wide and c == structure), None)
    costs = {k: getattr(counts, k) for k in ("total_params", "activated_params",
                                             "activated_params_paper", "flops")}  # fmt: skip
    return facts | costs


def _batches(
    pipe: Any, prompts: Sequence[Prompt], keys: Sequence[str], settings: Settings, batch: int,
    folder: Path, latents: bool, progress: bool, processes: int,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """Makes the images of `keys`; (images, seconds) after every batch."""
    from tqdm import tqdm

    size = {"height": settings.size, "width": settings.size}
    options = {**size, "guidance_scale": settings.guidance, "num_inference_steps": settings.steps}
    options = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(pipe.__call__).parameters
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
    with tqdm(total=len(keys) * processes, unit="image", disable=not progress) as bar:
        for start in range(0, len(keys), batch):
            part = keys[start : start + batch]
            kept: list[Tensor] = []
            if latents and "callback_on_step_end" in known:
                options["callback_on_step_end"] = _keeper(kept)
            begun = time.perf_counter()
            with torch.no_grad():
                images = pipe(
                    prompt=[prompts[int(key.split("-")[0])].text for key in part],
                    generator=[noise(settings.seed, key) for key in part],
                    **options,
                ).images
            took = time.perf_counter() - begun
            for i, key in enumerate(part):
                _save(folder, key, images[i], [step[i] for step in kept])
            bar.update(len(part) * processes)
            yield len(part), took


def _keeper(kept: list[Tensor]) -> Any:
    """A callback that keeps the latents at `MOMENTS`."""

    def keep(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        count = pipe.num_timesteps
        if step + 1 in [max(1, round(moment * count)) for moment in MOMENTS]:
            kept.append(values["latents"].detach().cpu())
        return values

    return keep


def _save(folder: Path, key: str, image: Any, latents: list[Tensor]) -> None:
    """The image comes last: where it is, all is."""
    if latents:
        ckpt.save_plain(latents_path(folder, key), {"latents": torch.stack(latents).half()})
    ckpt.write_atomic(image_path(folder, key), lambda tmp: image.save(tmp, format="PNG"))
