"""The `d2m` command. Heavy imports happen inside the commands, so that `d2m --help` is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from d2m_models.commands import add_commands
from distill import prepare_command
from distill.errors import UserError


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(
        prog="d2m",
        description="Turn a dense diffusion transformer into a Mixture of Experts and Blocks.",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="train, convert, distil, compare on real digits; writes a report"
    )
    demo.add_argument("--out", default="d2m-demo", help="output folder (default: %(default)s)")
    demo.add_argument(
        "--quick", action="store_true", help="the same in under a minute, less well trained"
    )
    demo.add_argument("--full", action="store_true", help="also M, XS and Lite, over three seeds")
    demo.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: 0)")
    _device(demo)
    demo.set_defaults(run=run_demo)

    distil = commands.add_parser("distill", help="distil a student as a YAML file says; resumable")
    distil.add_argument("config", metavar="CONFIG.yaml", help="e.g. digits.yaml, which is built in")
    distil.add_argument("--out", help="output folder instead of the configuration's")
    distil.add_argument("--seed", type=int, help="instead of the configuration's")
    distil.add_argument(
        "--accept-changed-config",
        action="store_true",
        help="go on with a run that was begun with other settings",
    )
    distil.add_argument(
        "--plan",
        action="store_true",
        help="print memory a GPU, FLOPs a sample and time, and load nothing",
    )
    distil.add_argument("--gpus", type=int, help="--plan: how many (default: as parallel says)")
    distil.add_argument(
        "--size", type=int, default=1024, help="--plan: images' side (default: %(default)s)"
    )
    distil.add_argument(
        "--tflops",
        type=float,
        default=400,
        help="--plan: what a GPU really does, in TFLOP/s (default: %(default)s)",
    )
    _device(distil)
    distil.set_defaults(run=run_distill)

    _device(prepare_command.add_command(commands))

    sample = commands.add_parser("sample", help="draw digits from a distilled model into a PNG")
    sample.add_argument("model", metavar="MODEL", help="folder of a saved model")
    sample.add_argument("--out", default="samples.png", help="PNG to write (default: %(default)s)")
    sample.add_argument("--steps", type=int, default=12, help="Euler steps (default: %(default)s)")
    sample.add_argument(
        "--per-class", type=int, default=2, help="samples a digit (default: %(default)s)"
    )
    sample.add_argument("--top-k", help="experts a token uses: a number or 'dense'")
    sample.add_argument("--seed", type=int, default=0)
    _device(sample)
    sample.set_defaults(run=run_sample)

    ablate = commands.add_parser(
        "ablate", help="re-test the paper's claims on a small real teacher, over several seeds"
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

    add_commands(commands)  # convert, inspect, diff

    report = commands.add_parser("report", help="pictures, page and tables from a run's results")
    report.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        default="benchmarks/results",
        help="folder of `d2m demo`, `d2m ablate` or benchmark results (default: %(default)s)",
    )
    report.add_argument(
        "--readme",
        metavar="FILE",
        nargs="?",
        const="README.md",
        help="instead of a page: the benchmark tables between FILE's markers "
        "<!-- begin:NAME --> and <!-- end:NAME --> (default: README.md)",
    )
    report.add_argument("--check", action="store_true", help="with --readme: fail if it is stale")
    report.set_defaults(run=run_report)
    return top


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there)"
    )


def pick_device(name: str) -> str:
    """ "auto" or a device that this machine has."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; expected 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; expected 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise UserError(
            f"--device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return name


def one_thread() -> None:
    """One CPU thread, unless OMP_NUM_THREADS asks for more: digits models are too small for two."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def run_demo(args: argparse.Namespace) -> None:
    from distill.checkpoint import make_folder

    make_folder(args.out)  # before anything that takes time
    device = pick_device(args.device)
    one_thread()
    from distill.demo import run_demo as demo

    page = demo(args.out, quick=args.quick, full=args.full, seed=args.seed, device=device)
    print(f"\nreport: {page.resolve()}")


def run_ablate(args: argparse.Namespace) -> None:
    from distill.checkpoint import make_folder

    make_folder(args.out)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; expected at least 1")
    if args.quick and args.config:
        raise UserError("--quick and --config exclude each other")
    one_thread()
    from distill.ablate import run_ablate as ablate
    from distill.ablate_config import AblateConfig
    from distill.checked import load_config

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


def run_distill(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from distill.checked import load_config
    from distill.config import DistillConfig

    config = load_config(DistillConfig, args.config)
    if args.out is not None:
        config = replace(config, out=args.out)
    if args.seed is not None:
        config = replace(config, seed=args.seed)
    if args.plan:
        from distill.plan import plan, render

        if args.tflops <= 0 or (args.gpus or 1) < 1 or args.size < 16 or args.size % 16:
            raise UserError(
                f"--tflops is {args.tflops}, --gpus {args.gpus}, --size {args.size}; expected "
                "positive numbers, the size a multiple of 16"
            )
        gpus = args.gpus or (config.parallel.shard or 1) * config.parallel.replicate
        print(render(plan(config, gpus, args.size), gpus, args.tflops))
        return
    from distill.checkpoint import make_folder

    make_folder(config.out)
    from distill.pipeline import distill

    device = pick_device(args.device)
    one_thread()
    with _library_errors():
        folder = distill(config, device, accept_changed=args.accept_changed_config)
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {folder}")


def run_sample(args: argparse.Namespace) -> None:
    from distill.checkpoint import make_folder

    make_folder(Path(args.out).parent)
    from distill.pipeline import load_model, sample_digits

    model = load_model(args.model).to(pick_device(args.device))
    if args.top_k is not None:
        from d2m_models import set_top_k

        with _library_errors():
            set_top_k(model, int(args.top_k) if args.top_k.isdigit() else args.top_k)
    if args.steps < 1 or args.per_class < 1:
        raise UserError("--steps and --per-class must be at least 1")
    accuracy = sample_digits(model, Path(args.out), args.steps, args.per_class, args.seed)
    print(f"wrote {args.out}; the classifier reads {accuracy:.1%} as their prompt")


def run_report(args: argparse.Namespace) -> None:
    if args.readme is not None:
        from distill.bench_report import update_readme

        stale = update_readme(args.readme, args.out, check=args.check)
        if stale and args.check:
            raise UserError(f"{args.readme} is stale: run `d2m report --readme {args.readme}`")
        print(f"{'wrote' if stale else 'unchanged:'} {args.readme}")
        return
    from distill import ablate_page, bench_report, report
    from distill.bench_results import load_results

    if (Path(args.out) / "ablate.safetensors").exists():
        print(f"wrote {ablate_page.render(args.out)}")
        return
    if (Path(args.out) / "claims.html").exists():
        print(f"wrote {ablate_page.rewrite(Path(args.out) / 'claims.html')}")
    demo = (Path(args.out) / "results.json").exists()
    benchmarks = not demo and (args.out == "benchmarks/results" or load_results(args.out))
    print(f"wrote {(bench_report if benchmarks else report).render(args.out)}")


class _library_errors:
    """Argument errors of the libraries (which name the argument) become one-line user errors."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, err: Any, trace: Any) -> None:
        if isinstance(err, (ValueError, TypeError)) and not isinstance(err, UserError):
            raise UserError(" ".join(str(err).split())) from err


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 = success, 2 = a user's error (one line on stderr), 130 = interrupted."""
    top = parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):  # torchrun ... -m distill CONFIG.yaml
        argv.insert(0, "distill")
    args = top.parse_args(argv)
    if args.version:
        from d2m_kernels._version import __version__

        print(__version__)
        return 0
    if args.command is None:
        top.print_help()
        return 0
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as cleanly as on Ctrl-C
    except ValueError:  # not in the main thread
        previous = None
    try:
        with _library_errors() if args.run.__module__.startswith("d2m_models") else nullcontext():
            args.run(args)
    except UserError as err:
        print(f"d2m: error: {err}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as err:
        if (err.name or "").split(".")[0] in ("d2m_kernels", "d2m_models", "distill"):
            raise
        print(
            f"d2m: error: the package {err.name!r} is missing; pip install "
            f"'dense2moe[{'data' if args.command == 'prepare' else 'demo'}]' brings it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nd2m: interrupted; the same command continues where it was", file=sys.stderr)
        return 130
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
