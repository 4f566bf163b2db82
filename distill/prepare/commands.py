"""The `d2m prepare` command: its options, and what it prints. Heavy imports happen when it runs."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any

from distill.errors import UserError

HELP = "turn images with captions into latent shards for training; resumable"
FORMATS = ("float16", "bfloat16", "float32")
READING = ("layout", "caption_column", "image_column", "split", "name", "streaming")


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Adds `prepare` to the parser of `d2m`; its --device is added by the caller."""
    from distill.prepare.captions import LAYOUTS

    p = commands.add_parser("prepare", help=HELP, description=HELP)
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of images, metadata table, .tar shards (a folder, a glob or "
        "name-{00000..00099}.tar), or Hugging Face dataset",
    )
    p.add_argument("out", metavar="OUT", nargs="?", help="folder to write, or to go on with")
    p.add_argument("--check", action="store_true", help="only verify SOURCE, a prepared folder")
    p.add_argument("--model", help="pipeline (folder, hub name) whose encoders are used")
    p.add_argument("--layout", choices=LAYOUTS, default="auto", help="default: %(default)s")
    p.add_argument("--caption-column", help="instead of the usual names")
    p.add_argument("--image-column", help="instead of the usual names")
    p.add_argument("--split", default="train", help="of a Hugging Face dataset (%(default)s)")
    p.add_argument("--name", help="configuration of a Hugging Face dataset")
    p.add_argument("--streaming", action="store_true", help="stream a Hugging Face dataset")
    p.add_argument(
        "--part",
        default="0/1",
        metavar="I/N",
        help="only every N-th item or .tar from the I-th on, for N machines; give each its own "
        "folder under one folder and train on that",
    )
    p.add_argument("--size", type=int, default=1024, help="side of the square bucket (%(default)s)")
    p.add_argument(
        "--max-aspect", type=float, default=2.0, help="longest bucket's ratio (%(default)s)"
    )
    p.add_argument(
        "--max-upscale",
        type=float,
        default=1.0,
        help="images that would have to be enlarged more are left out (%(default)s)",
    )
    p.add_argument(
        "--latents",
        choices=("mode", "sample"),
        default="mode",
        help="of the VAE's posterior (%(default)s)",
    )
    p.add_argument("--dtype", choices=FORMATS, default="float16", help="stored (%(default)s)")
    p.add_argument(
        "--precision", choices=FORMATS, default="float32", help="the VAE's (%(default)s)"
    )
    p.add_argument(
        "--text-embeddings",
        action="store_true",
        help="also store text embeddings, FLUX.1's of 4.2 MB a sample at 512 tokens; without it "
        "they are computed during training",
    )
    p.add_argument(
        "--max-sequence-length", type=int, default=512, help="T5 tokens a caption (%(default)s)"
    )
    p.add_argument(
        "--text-precision",
        choices=FORMATS,
        default="bfloat16",
        help="the text encoders' (%(default)s)",
    )
    p.add_argument("--shard-mb", type=float, default=256.0, help="largest shard (%(default)s)")
    p.add_argument(
        "--batch", type=int, default=8, help="images the VAE takes at once (%(default)s)"
    )
    p.add_argument(
        "--workers",
        type=int,
        default=4,
        help="threads that decode, with --ray processes on the cluster (%(default)s)",
    )
    p.add_argument(
        "--ray",
        metavar="auto|ADDRESS",
        help="decode and encode on a Ray cluster; auto: the one of RAY_ADDRESS or of this machine, "
        "else a local one is started",
    )
    p.add_argument(
        "--max-bad",
        default="1%",
        help="unreadable images that are skipped: a number or a share (%(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, help="of --latents sample")
    p.set_defaults(run=run_prepare)
    return p


def run_prepare(args: argparse.Namespace) -> None:
    if args.check:
        _check(args.source if args.out is None else args.out)
        return
    for name, value in (("OUT", args.out), ("--model", args.model)):
        if value is None:
            raise UserError(f"{name} is missing; expected `d2m prepare SOURCE OUT --model FLUX`")
    part = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if not part or not int(part[1]) < int(part[2]):
        raise UserError(f"--part is {args.part!r}; expected I/N with 0 <= I < N")
    for name, least in (("shard_mb", 0), ("batch", 1), ("workers", 0), ("max_sequence_length", 1)):
        if not getattr(args, name) >= least:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {getattr(args, name)}; expected at least {least}")
    from distill.device import pick_device
    from distill.prepare.prepare import Settings, prepare

    given = vars(args) | {"length": args.max_sequence_length}
    manifest = prepare(
        args.source,
        args.out,
        args.model,
        Settings(**{field.name: given[field.name] for field in fields(Settings)}),
        device=pick_device(args.device),
        workers=args.workers,
        max_bad=args.max_bad,
        ray=args.ray,
        part=(int(part[1]), int(part[2])),
        **{name: given[name] for name in READING},
    )
    for name, bucket in manifest["buckets"].items():
        print(f"{name:>10}  {bucket['samples']:>9} samples")
    print(
        f"wrote {args.out}: {manifest['samples']} samples in {len(manifest['shards'])} shards; "
        f"{manifest['bad']} unreadable (bad.jsonl)"
    )
    for what, word in (("left_out", "left out"), ("warnings", "warned of")):
        for reason, entry in manifest.get(what, {}).items():
            print(f"{entry['count']} {word}: {reason}; the first: {', '.join(entry['first'])}")


def _check(folder: str) -> None:
    from distill.data.folder import read_manifest
    from distill.prepare.prepare import check

    wrong = check(folder, progress=True)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{folder}: {'; '.join(wrong[:5])}{more}")
    manifest = read_manifest(folder)
    print(f"{folder}: {len(manifest['shards'])} shards, {manifest['samples']} samples, all good")
