"""The `d2m` command. Heavy imports happen inside the commands, so that `d2m --help` is quick."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from d2m_models import commands as models
from distill import calibrate
from distill import commands as distilling
from distill.device import add_device
from distill.errors import UserError, library_errors
from distill.evaluate import commands as evaluating
from distill.prepare import commands as prepare
from distill.study import commands as study
from distill.survey import commands as surveying

EXTRAS = {"prepare": "data", "evaluate": "evaluate"}  # what a command needs; the others: demo


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(
        prog="d2m",
        description="Turn a dense diffusion transformer into a Mixture of Experts and Blocks.",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    study.add_commands(commands)  # demo, ablate, report
    distilling.add_commands(commands)  # distill, teacher, sample
    surveying.add_command(commands)
    evaluating.add_commands(commands)
    add_device(prepare.add_command(commands))
    models.add_commands(commands)  # convert, inspect, diff, push
    calibrate.extend(commands.choices["convert"])
    return top


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
        with library_errors() if args.run.__module__.startswith("d2m_models") else nullcontext():
            args.run(args)
    except UserError as err:
        print(f"d2m: error: {err}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as err:
        if (err.name or "").split(".")[0] in ("d2m_kernels", "d2m_models", "distill"):
            raise
        print(
            f"d2m: error: the package {err.name!r} is missing; pip install "
            f"'dense2moe[{EXTRAS.get(args.command, 'demo')}]' brings it",
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
