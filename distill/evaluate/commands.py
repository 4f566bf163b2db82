"""The command `d2m evaluate`."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from distill.device import add_device, pick_device
from distill.errors import UserError

HELP = "images of a model, judged as the paper judges, and how near they are to its teacher's"


def add_commands(commands: Any) -> None:
    """Adds `evaluate` to the parser of `d2m`."""
    p = commands.add_parser("evaluate", help=HELP, description=HELP)
    p.add_argument("model", metavar="MODEL", nargs="?", help="pipeline or transformer to judge")
    p.add_argument("--against", metavar="TEACHER", help="a model, or the OUT of its evaluation")
    p.add_argument("--base", help="pipeline whose other parts a MODEL that is a transformer takes")
    p.add_argument("--metrics", default="fidelity", help="with commas between: fidelity, clip, "
        "image-reward, mps, geneval, dpg, t2i-compbench (default: %(default)s)")  # fmt: skip
    p.add_argument("--prompts", metavar="FILE|NAME", help="text, JSONL, a benchmark's own file, or "
        "mjhq-30k, geneval, dpg, t2i-compbench")  # fmt: skip
    p.add_argument("--out", default="d2m-evaluate", help="folder (default: %(default)s)")
    p.add_argument("--images", type=int, help="a prompt (default: as the benchmark is published: "
        "GenEval and DPG 4, T2I-CompBench 10, else 1)")  # fmt: skip
    p.add_argument("--limit", type=int, help="only the first prompts")
    p.add_argument("--batch", type=int, default=1, help="images at once (default: %(default)s)")
    p.add_argument("--steps", type=int, help="default: the pipeline's")
    p.add_argument("--guidance", type=float, help="default: the pipeline's")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    p.add_argument("--size", type=int, help="side in pixels (default: the pipeline's)")
    dtypes = ("float32", "bfloat16", "float16")
    p.add_argument("--dtype", choices=dtypes, help="default: as the model is saved")
    offloads = ("model", "sequential", "group")
    p.add_argument("--offload", choices=offloads, help="parts wait in host memory for their turn")
    p.add_argument("--judge", action="append", default=[], metavar="METRIC.ROLE=NAME",
        help="a local folder or hub name[@revision] instead of the published one")  # fmt: skip
    p.add_argument("--compare", nargs="+", metavar="OUT",
        help="only set evaluations side by side in the paper's columns")  # fmt: skip
    add_device(p)
    p.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> None:
    from distill.files import make_folder

    out = make_folder(args.out)
    if args.compare:
        return _compare(args.compare, out)
    for name in ("model", "prompts"):
        if getattr(args, name) is None:
            raise UserError(f"{'MODEL' if name == 'model' else '--prompts'} is missing")
    for name, value in vars(args).items():
        counts = ("images", "limit", "batch", "steps", "size")
        if name in counts and value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1")
    from distill.configs.training import ParallelConfig
    from distill.evaluate.generate import Settings
    from distill.evaluate.prompts import IMAGES, read_prompts
    from distill.evaluate.run import evaluate
    from distill.evaluate.scores import read_scores, table
    from distill.files import locked
    from distill.loop.parallel import start_world, stop_world

    prompts = read_prompts(args.prompts, args.limit)
    settings = Settings(args.model, args.base, args.images or IMAGES.get(prompts[0].kind, 1),
                        args.steps, args.guidance, args.size, args.seed, args.dtype)  # fmt: skip
    size = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = ParallelConfig(shard=1, replicate=size, timeout_minutes=24 * 60)
    world = start_world(parallel, pick_device(args.device))
    try:
        metrics = [name for name in args.metrics.split(",") if name]
        with locked(out, "`d2m evaluate`") if world.main else nullcontext():
            page = evaluate(out, settings, prompts, metrics, world, against=args.against,
                            judges=args.judge, batch=args.batch, offload=args.offload)  # fmt: skip
    finally:
        stop_world(world)
    if world.main:
        scores = read_scores(out)
        for why in scores["failed"].values():
            print(f"not computed: {why}")
        _print(*table([scores]))
        print(f"wrote {page}")


def _compare(folders: list[str], out: Path) -> None:
    from distill.evaluate.page import write_comparison
    from distill.evaluate.scores import differences, label, read_scores, same_images, table

    all_scores = [read_scores(folder) for folder in folders]
    places = {
        f"{i}: {label(scores)}": Path(folder)
        for i, (folder, scores) in enumerate(zip(folders, all_scores, strict=True), 1)
        if same_images(scores, all_scores[0])
    }
    page = write_comparison(out, all_scores, places, all_scores[0]["texts"])
    _print(*table(all_scores))
    _print(*differences(all_scores))
    print(f"wrote {page}")


def _print(header: list[str], rows: list[list[str]]) -> None:
    """The columns that have an entry, a line a row."""
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[line[i] for i in keep] for line in (header, *rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())
