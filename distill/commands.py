"""The commands `d2m distill` and `d2m sample`."""

from __future__ import annotations

import argparse
import os
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

    survey = commands.add_parser(
        "survey", help="is this dense model worth converting, and how? no training"
    )
    survey.add_argument("model", metavar="MODEL", help="folder or hub name of a dense FLUX")
    survey.add_argument(
        "--calibrate", required=True, metavar="DATA",
        help="digits, photos or icons, which are built in, or a folder of `d2m prepare`",
    )  # fmt: skip
    survey.add_argument("--out", default="d2m-survey", help="folder (default: %(default)s)")
    survey.add_argument(
        "--budget", type=float, default=1.75,
        help="activated FFN neurons a width, on average, for the suggestion (default: %(default)s)",
    )  # fmt: skip
    survey.add_argument("--samples", type=int, default=256, help="images (default: %(default)s)")
    survey.add_argument("--rows", type=int, default=32, help="at once (default: %(default)s)")
    survey.add_argument("--tokens", type=int, help="kept of each FFN (default: 48 x width)")
    survey.add_argument("--text-encoders", help="for shards without embeddings: a FLUX folder")
    survey.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    survey.add_argument("--seed", type=int, default=0)
    add_device(survey)
    survey.set_defaults(run=run_survey)

    sample = commands.add_parser("sample", help="draw digits from a distilled model into a PNG")
    sample.add_argument("model", metavar="MODEL", help="folder of a saved model")
    sample.add_argument("--out", default="samples.png", help="PNG to write (default: %(default)s)")
    sample.add_argument("--steps", type=int, default=12, help="Euler steps (default: %(default)s)")
    sample.add_argument(
        "--per-class", type=int, default=2, help="samples a digit (default: %(default)s)"
    )
    sample.add_argument("--top-k", help="experts a token uses: a number or 'dense'")
    sample.add_argument("--seed", type=int, default=0)
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
        print(render(plan(config, gpus, args.size), gpus, args.tflops))
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


def run_survey(args: argparse.Namespace) -> None:
    from distill.configs.sections import DataConfig, TeacherConfig
    from distill.data.sources import open_source
    from distill.survey.page import describe, write_page
    from distill.survey.run import suggest, survey, verdict
    from distill.teacher import load_teacher

    device = pick_device(args.device)
    built_in = args.calibrate in ("digits", "photos", "icons")
    data = (
        DataConfig(name=args.calibrate) if built_in
        else DataConfig("shards", folder=args.calibrate, text_encoders=args.text_encoders)
    )  # fmt: skip
    model = load_teacher(TeacherConfig(path=args.model, dtype=args.dtype), data, args.seed, device)
    about = {"model": args.model, "data": args.calibrate, "dtype": args.dtype}
    with library_errors():
        content = survey(
            model, open_source(data, model, device), args.out, about=about, samples=args.samples,
            rows=args.rows, tokens=args.tokens, seed=args.seed,
        )  # fmt: skip
    best = suggest(content, args.budget)
    page = write_page(args.out, content, best)
    print(f"{verdict(content, best)}\nsuggested for r_a {args.budget:g}: {describe(best)}")
    print(f"wrote {page}")


def run_sample(args: argparse.Namespace) -> None:
    from distill.files import make_folder

    make_folder(Path(args.out).parent)
    from d2m_models.checkpoints.load import load_model
    from distill.study.measure import sample_digits

    device = pick_device(args.device)
    with library_errors():
        model = load_model(args.model).to(device)
    if args.top_k is not None:
        from d2m_models import set_top_k

        with library_errors():
            set_top_k(model, int(args.top_k) if args.top_k.isdigit() else args.top_k)
    if args.steps < 1 or args.per_class < 1:
        raise UserError("--steps and --per-class must be at least 1")
    accuracy = sample_digits(model, Path(args.out), args.steps, args.per_class, args.seed)
    print(f"wrote {args.out}; the classifier reads {accuracy:.1%} as their prompt")
