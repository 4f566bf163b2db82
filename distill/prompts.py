"""`d2m sample MODEL PROMPT`: images (or videos) of a prompt, through the model's own pipeline."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from distill import files as ckpt
from distill.errors import UserError


def sample_prompt(args: argparse.Namespace, device: str) -> list[Path]:
    """The PNGs written: --out, or with --batch N its name with -0 ... -(N - 1); a video is an
    animated PNG.

    Image i is drawn from the seed --seed + i, so it is the same whatever the batch.
    """
    size = image_size(args.size)
    import torch

    from d2m_models import set_top_k
    from d2m_models.checkpoints.pipelines import load_pipeline

    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipe = load_pipeline(args.model, args.base, dtype=dtype, device=device, offload=args.offload)
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    if args.top_k is not None:
        set_top_k(denoiser, int(args.top_k) if args.top_k.isdigit() else args.top_k)
    if args.compile:
        denoiser.compile_repeated_blocks()
    count = args.batch or 1
    options = {
        **size, "num_inference_steps": args.steps, "guidance_scale": args.guidance,
        "num_frames": args.frames,
        "generator": [torch.Generator().manual_seed(args.seed + i) for i in range(count)],
    }  # fmt: skip
    takes = inspect.signature(type(pipe).__call__).parameters
    many = next((n for n in takes if n in ("num_images_per_prompt", "num_videos_per_prompt")), None)
    if many is not None:
        options[many] = count
    if many == "num_videos_per_prompt":
        options["output_type"] = "pil"
    out = pipe(prompt=args.prompt, **_known(pipe, options))
    images = out.images if hasattr(out, "images") else out.frames
    out = Path(args.out)
    paths = [out] if count == 1 else [
        out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)
    ]  # fmt: skip
    for path, image in zip(paths, images, strict=True):
        first, *rest = image if isinstance(image, list) else [image]
        more = {"save_all": True, "append_images": rest, "duration": 62} if rest else {}
        ckpt.write_atomic(
            path, lambda tmp, first=first, more=more: first.save(tmp, format="png", **more)
        )
    return paths


def image_size(text: str | None) -> dict[str, int]:
    """ "1024" or "768x1360" (height x width) as a pipeline's arguments."""
    if text is None:
        return {}
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UserError(f"--size is {text!r}; expected a number of pixels, or HEIGHTxWIDTH")
    return {"height": int(sides[0]), "width": int(sides[-1])}


def _known(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those that are given; an error where the pipeline does not take one."""
    given = {name: value for name, value in options.items() if value is not None}
    takes = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in given if name not in takes]:
        raise UserError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    return given
