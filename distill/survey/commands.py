"""The command `d2m survey`."""

from __future__ import annotations

import argparse
from typing import Any

from distill.device import add_device, pick_device
from distill.errors import library_errors


def add_command(commands: Any) -> None:
    """Adds `survey` to the parser of `d2m`."""
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


def run_survey(args: argparse.Namespace) -> None:
    from d2m_models.conversion.flux import check_dense_flux
    from distill.configs.sections import DataConfig, TeacherConfig
    from distill.data.sources import BUILT_IN, open_source
    from distill.survey.page import describe, write_page
    from distill.survey.run import suggest, survey, verdict
    from distill.teacher import load_teacher

    device = pick_device(args.device)
    data = (
        DataConfig(name=args.calibrate) if args.calibrate in BUILT_IN
        else DataConfig("shards", folder=args.calibrate, text_encoders=args.text_encoders)
    )  # fmt: skip
    model = load_teacher(TeacherConfig(path=args.model, dtype=args.dtype), data, args.seed, device)
    about = {"model": args.model, "data": args.calibrate, "dtype": args.dtype}
    with library_errors():
        check_dense_flux(model, "MODEL")
        content = survey(
            model, open_source(data, model, device), args.out, about=about, samples=args.samples,
            rows=args.rows, tokens=args.tokens, seed=args.seed,
        )  # fmt: skip
    best = suggest(content, args.budget)
    page = write_page(args.out, content, best)
    print(f"{verdict(content, best)}\nsuggested for r_a {args.budget:g}: {describe(best)}")
    print(f"wrote {page}")
