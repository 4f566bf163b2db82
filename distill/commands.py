"""The commands `d2m distill` and `d2m sample`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from distill.device import add_device, one_thread, pick_device
from distill.errors import UserError, library_errors


def add_commands(commands: Any) -> None:
    """Adds `distill`, `teacher` and `sample` to the parser of `d2m`."""
    distil = commands.add_parser("distill", help="distil a student as a YAML file says; resumable")
    distil.add_argument("config", metavar="CONFIG.yaml", help="e.g. digits.yaml, which is built in")
    distil.add_argument("--out", help="output folder instead of the configuration's")
    distil.add_argument("--seed", type=int, help="instead of the configuration's")
    distil.add_argument(
        "--accept-changed-config", action="store_true",
        help="go on with a run that was begun with other settings",
    )  # fmt: skip
    distil.add_argument(
        "--plan", action="store_true",
        help="print memory a GPU, FLOPs a sample and time, and load nothing",
    )  # fmt: skip
    distil.add_argument("--gpus", type=int, help="--plan: how many (default: as parallel says)")
    distil.add_argument(
        "--size", type=int, default=1024, help="--plan: images' side (default: %(default)s)"
    )
    distil.add_argument(
        "--tflops", type=float, default=400,
        help="--plan: what a GPU really does, in TFLOP/s (default: %(default)s)",
    )  # fmt: skip
    add_device(distil)
    distil.set_defaults(run=run_distill)

    teacher = commands.add_parser("teacher", help="train a small dense FLUX; resumable")
    teacher.add_argument("config", metavar="CONFIG.yaml", help="e.g. icons.yaml, which is built in")
    teacher.add_argument("--out", help="output folder instead of the configuration's")
    teacher.add_argument(
        "--accept-changed-config", action="store_true",
        help="go on with a run that was begun with other settings",
    )  # fmt: skip
    add_device(teacher)
    teacher.set_defaults(run=run_teacher)

    _add_sample(commands)


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample", help="draw images of a prompt into a PNG",
    )  # fmt: skip
    sample.add_argument(
        "model", metavar="MODEL", help="folder or hub id of a saved model, or 'icons'"
    )
    sample.add_argument("prompt", metavar="PROMPT", nargs="?", help="none for models of digits")
    sample.add_argument("-o", "--out", default="samples.png", help="PNG (default: %(default)s)")
    sample.add_argument("--steps", type=int, help="default: the pipeline's own; 20 for icons")
    sample.add_argument("--top-k", help="experts a token uses: a number or 'dense'")
    sample.add_argument("--seed", type=int, default=0)
    prompt = sample.add_argument_group("with a PROMPT")
    prompt.add_argument(
        "--base", help="folder or hub id of the pipeline whose other parts are used (default: the "
        "one that MODEL was made of)",
    )  # fmt: skip
    prompt.add_argument("--guidance", type=float, help="scale (default: the pipeline's own)")
    prompt.add_argument("--size", metavar="N or HxW", help="pixels (default: the pipeline's own)")
    prompt.add_argument("--frames", type=int, help="of a video (default: the pipeline's own)")
    prompt.add_argument("--batch", type=int, help="images; seeds go up by one (default: 1)")
    prompt.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: as saved"
    )
    prompt.add_argument(
        "--offload", choices=["model", "sequential", "group"],
        help="parts wait in host memory: one part, one layer, or block by block on the GPU",
    )  # fmt: skip
    prompt.add_argument("--compile", action="store_true", help="torch.compile on the blocks")
    add_device(sample)
    sample.set_defaults(run=run_sample)


def run_distill(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from distill.configs.checked import load_config
    from distill.configs.sections import DistillConfig

    config = load_config(DistillConfig, args.config)
    if args.out is not None:
        config = replace(config, out=args.out)
    if args.seed is not None:
        config = replace(config, seed=args.seed)
    if args.plan:
        from distill.plan.memory import plan, render

        if args.tflops <= 0 or (args.gpus or 1) < 1 or args.size < 16 or args.size % 16:
            raise UserError(
                f"--tflops is {args.tflops}, --gpus {args.gpus}, --size {args.size}; expected "
                "positive numbers, the size a multiple of 16"
            )
        gpus = args.gpus or (config.parallel.shard or 1) * config.parallel.replicate
        plans = plan(config, gpus, args.size, lambda text: print(text, file=sys.stderr))
        print(render(plans, gpus, args.tflops))
        return
    from distill.files import make_folder

    make_folder(config.out)
    from distill.pipeline import distill

    device = pick_device(args.device)
    one_thread()
    with library_errors():
        folder = distill(config, device, accept_changed=args.accept_changed_config)
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {folder}")


def run_teacher(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from distill.configs.checked import load_config
    from distill.configs.sections import TeacherRun
    from distill.teacher import train_teacher

    config = load_config(TeacherRun, args.config)
    if args.out is not None:
        config = replace(config, out=args.out)
    device = pick_device(args.device)
    with library_errors():
        print(f"wrote {train_teacher(config, device, args.accept_changed_config)}")


def run_sample(args: argparse.Namespace) -> None:
    from distill.files import make_folder

    for name in ("steps", "batch", "frames"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    make_folder(Path(args.out).parent)
    device = pick_device(args.device)
    if not _is_built_in(args.model):
        if args.prompt is None:
            raise UserError(f"{args.model} wants a PROMPT: d2m sample MODEL PROMPT")
        from distill.prompts import sample_prompt

        with library_errors():
            print("wrote " + ", ".join(map(str, sample_prompt(args, device))))
        return
    for name in ("base", "size", "frames", "dtype", "offload", "compile"):
        if getattr(args, name):
            raise UserError(f"--{name} is for models of a pipeline; this one draws icons or digits")
    from d2m_models import set_top_k
    from d2m_models.checkpoints.load import load_model
    from distill.study.draw import draw
    from distill.teacher import find_teacher

    with library_errors():
        model = load_model(find_teacher(args.model)).float().to(device)
        if args.top_k is not None:
            set_top_k(model, int(args.top_k) if args.top_k.isdigit() else args.top_k)
    prompts = [] if args.prompt is None else [args.prompt]
    draw(model, prompts, Path(args.out), steps=args.steps, count=args.batch or 2,
         guidance=args.guidance, seed=args.seed)  # fmt: skip
    print(f"wrote {args.out}")


def _is_built_in(name: str) -> bool:
    """Whether MODEL is a folder (or name) of a model of icons or digits."""
    from distill.study.draw import kind_of
    from distill.teacher import find_teacher

    file = Path(find_teacher(name)) / "config.json"
    try:
        return kind_of(json.loads(file.read_text(encoding="utf-8"))) is not None
    except (OSError, ValueError):
        return False  # a hub id, a pipeline's folder, or what loading it will explain
