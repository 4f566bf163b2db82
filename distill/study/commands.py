"""The commands `d2m demo`, `d2m ablate` and `d2m report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distill.device import add_device, one_thread, pick_device
from distill.errors import UserError


def add_commands(commands: Any) -> None:
    """Adds `demo`, `ablate` and `report` to the parser of `d2m`."""
    demo = commands.add_parser(
        "demo", help="convert, distil and compare a model that draws icons; writes a report"
    )
    demo.add_argument("--out", default="d2m-demo", help="output folder (default: %(default)s)")
    demo.add_argument(
        "--quick", action="store_true", help="the same in under a minute, less well trained"
    )
    demo.add_argument(
        "--prompt", action="append", default=[], metavar="WORDS",
        help="draw this, such as 'folder star', instead of the built-in prompts; may be repeated",
    )  # fmt: skip
    demo.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: 0)")
    add_device(demo)
    demo.set_defaults(run=run_demo)

    ablate = commands.add_parser(
        "ablate", help="re-test the paper's claims on a small real teacher, over several seeds"
    )
    ablate.add_argument(
        "--recipes", action="store_true",
        help="compare starts and trainings of MoE, MoB and pruned models instead",
    )  # fmt: skip
    ablate.add_argument(
        "--full", action="store_true", help="with --recipes: all lengths and seeds (hours)"
    )
    ablate.add_argument("--out", default="d2m-ablate", help="output folder (default: %(default)s)")
    ablate.add_argument("--quick", action="store_true", help="one seed, few steps, no verdicts")
    ablate.add_argument(
        "--results", metavar="FILE", help="write claims.json there too, and the page beside it"
    )
    ablate.add_argument(
        "--workers", type=int, default=2, help="processes of one thread (default: %(default)s)"
    )
    ablate.add_argument(
        "--so-far", action="store_true", help="train nothing, judge by what has been measured"
    )
    ablate.add_argument("--config", metavar="YAML", help="instead of the built-in ablate.yaml")
    ablate.set_defaults(run=run_ablate)

    report = commands.add_parser("report", help="pictures, page and tables from a run's results")
    report.add_argument("out", metavar="OUT", help="folder of a `d2m demo` or `d2m ablate`")
    report.set_defaults(run=run_report)


def run_demo(args: argparse.Namespace) -> None:
    from distill.files import make_folder

    make_folder(args.out)  # before anything that takes time
    device = pick_device(args.device)
    one_thread()
    from distill.study.demo import run_demo as demo

    page = demo(args.out, quick=args.quick, prompts=args.prompt, seed=args.seed, device=device)
    print(f"\nreport: {page.resolve()}")


def run_ablate(args: argparse.Namespace) -> None:
    from distill.files import make_folder

    make_folder(args.out)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; expected at least 1")
    if args.quick and args.config:
        raise UserError("--quick and --config exclude each other")
    one_thread()
    from distill.configs.checked import load_config

    if args.recipes:
        from distill.study.config import RecipeConfig
        from distill.study.recipes import run_recipes

        if args.quick or args.so_far:
            raise UserError("--recipes goes without --quick and --so-far")
        own = load_config(RecipeConfig, args.config) if args.config else None
        page = run_recipes(args.out, own, full=args.full, results=args.results,
                           workers=args.workers)  # fmt: skip
        print(f"\nreport: {page.resolve()}")
        return
    from distill.study.ablate import run_ablate as ablate
    from distill.study.config import AblateConfig

    config = load_config(AblateConfig, args.config) if args.config else None
    page = ablate(
        args.out,
        quick=args.quick,
        config=config,
        results=args.results,
        workers=args.workers,
        so_far=args.so_far,
    )
    print(f"\nreport: {page.resolve()}")


def run_report(args: argparse.Namespace) -> None:
    from distill.study import ablate_page, demo_page

    ablate = (Path(args.out) / "ablate.safetensors").exists()
    print(f"wrote {(ablate_page if ablate else demo_page).render(args.out)}")
