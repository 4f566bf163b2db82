"""The commands `d2m convert`, `export`, `inspect`, `diff`, `push`: options, and what they print.

Everything heavy is imported when a command runs, so that `d2m --help` stays quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds them to an argparse sub-parser; each sets `run`."""
    _add_convert(commands)
    export = commands.add_parser("export", help="a model as one file in FLUX's layout, and back")
    export.add_argument("model", metavar="MODEL", help="folder, hub name or single file, any kind")
    export.add_argument("target", metavar="DST", help="new NAME.safetensors, or a new folder")
    export.add_argument(
        "--format", choices=["bfl", "diffusers"], required=True,
        help="bfl: one file in Black Forest Labs' layout; diffusers: a folder",
    )  # fmt: skip
    export.add_argument("--quiet", action="store_true", help="no bar")
    export.set_defaults(run=run_export)
    inspect = commands.add_parser("inspect", help="parameters and FLOPs of models and presets")
    inspect.add_argument(
        "models", metavar="MODEL_OR_PRESET", nargs="+",
        help="folder or hub name of a saved model (no weights are read), a preset, or 'presets'",
    )  # fmt: skip
    inspect.add_argument("--size", type=int, default=1024, help="image height and width in pixels")
    inspect.add_argument("--text-tokens", type=int, default=512)
    inspect.add_argument("--plot", metavar="PNG", help="activated parameters by module, as bars")
    inspect.set_defaults(run=run_inspect)
    diff = commands.add_parser("diff", help="relative error of a student, layer by layer")
    diff.add_argument("teacher", metavar="TEACHER", help="folder of the dense model")
    diff.add_argument("student", metavar="STUDENT", help="folder of the converted model")
    diff.add_argument("--batch", type=int, default=4, help="samples (default: %(default)s)")
    diff.add_argument("--image-tokens", type=int, default=64, help="a square (default: 64)")
    diff.add_argument("--text-tokens", type=int, default=16)
    diff.add_argument("--inputs", metavar="FILE", help="safetensors with the forward's arguments")
    diff.add_argument("--top-k", help="experts a token uses: a number or 'dense'")
    diff.add_argument("--seed", type=int, default=0)
    diff.add_argument("--plot", metavar="PNG")
    diff.set_defaults(run=run_diff)
    push = commands.add_parser("push", help="a saved model to the Hugging Face hub, with its card")
    push.add_argument("model", metavar="MODEL", help="folder of a converted model or a pipeline")
    push.add_argument("repository", metavar="OWNER/NAME")
    push.add_argument("--base", help="hub id of the base (default: as the model records it)")
    push.add_argument("--private", action="store_true", help="if the repository is new")
    push.add_argument(
        "--dry-run", action="store_true", help="print files and card; needs no network"
    )
    push.set_defaults(run=run_push)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert a saved FLUX transformer to MoE / MoB, or back",
        description="Reads and writes tensor by tensor (4 GB of memory are enough for FLUX.1). "
        "Interrupted, even killed, the same command goes on where it was.",
    )
    convert.add_argument(
        "source", metavar="SRC",
        help="folder or hub name of a FLUX transformer or pipeline, or BFL's single file of it",
    )  # fmt: skip
    convert.add_argument("target", metavar="DST", help="new folder")
    way = convert.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--preset", help="flux-moe-l, flux-moe-m, flux-moe-s, flux-moe-xs, hyper-flux-moe-l, ..."
    )
    way.add_argument("--structure", help="YAML or JSON file with the fields of FluxMoEConfig")
    way.add_argument(
        "--to-dense", action="store_true", help="SRC is a converted model: write the dense one"
    )
    convert.add_argument("--order", metavar="FILE", help="safetensors with a neuron order per FFN")
    convert.add_argument(
        "--adaln-calibration", metavar="FILE", help="safetensors with 'temb' [n, D] of real prompts"
    )
    convert.add_argument(
        "--keep-adaln", action="store_true", help="also keep the dense AdaLN, for --to-dense"
    )
    convert.add_argument("--adaln", metavar="FILE", help="with --to-dense: the dense AdaLN tensors")
    convert.add_argument("--lora", metavar="FILE", help="fuse this LoRA into the dense model first")
    convert.add_argument(
        "--lora-scale", type=float, help="default: 1, and 0.125 for hyper-* presets (Hyper-SD)"
    )
    convert.add_argument(
        "--verify", action="store_true",
        help="prove that DST is SRC, permuted; with a DST that exists already, only that",
    )  # fmt: skip
    convert.add_argument(
        "--subfolder", help="folder within SRC (a pipeline's 'transformer' is found itself)"
    )
    convert.add_argument("--variant", help="e.g. fp16, for *.fp16.safetensors")
    convert.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: as saved"
    )
    convert.add_argument("--seed", type=int, default=0, help="of the new routers (default: 0)")
    convert.add_argument("--quiet", action="store_true", help="no bar")
    convert.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> None:
    refused, other = ("adaln",), "--to-dense"
    if args.to_dense:
        refused = ("order", "adaln_calibration", "keep_adaln", "lora", "lora_scale", "verify",
                   "subfolder", "variant")  # fmt: skip
        other = "--preset or --structure"
    for name in refused:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with {other}")
    config = None if args.to_dense else structure_of(args)  # before the slow imports
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.to_dense:
        from d2m_models.checkpoints.restore import checkpoint_to_dense

        checkpoint_to_dense(
            args.source, args.target, adaln=args.adaln, dtype=dtype, progress=not args.quiet
        )
        print(f"wrote {args.target}, the dense model")
        return
    where = {"subfolder": args.subfolder, "variant": args.variant, "lora": args.lora}
    target = Path(args.target).expanduser()
    if not (args.verify and (target / "config.json").is_file()):
        _convert(args, config, where, dtype)
    if args.verify:
        from d2m_models.checkpoints.convert import default_lora_scale
        from d2m_models.checkpoints.verify import verify_checkpoint

        scale = default_lora_scale(config, args.lora_scale)
        print(verify_checkpoint(args.source, target, lora_scale=scale, **where,
                                progress=not args.quiet))  # fmt: skip


def run_export(args: argparse.Namespace) -> None:
    from d2m_models.checkpoints.single_file import export

    export(args.model, args.target, args.format, progress=not args.quiet)
    print(f"wrote {args.target}")


def _convert(args: argparse.Namespace, config: Any, where: dict, dtype: Any) -> None:
    from d2m_models.checkpoints.convert import RECORD, convert_checkpoint
    from d2m_models.checkpoints.origin import base_pipeline
    from d2m_models.inspection.card import write_card
    from d2m_models.inspection.table import inspect

    again = (Path(args.target).expanduser() / RECORD).is_file()
    record = convert_checkpoint(
        args.source, args.target, config, neuron_order=args.order, keep_adaln=args.keep_adaln,
        adaln_calibration=args.adaln_calibration, lora_scale=args.lora_scale, dtype=dtype,
        seed=args.seed, progress=not args.quiet, **where,
    )  # fmt: skip
    counts = inspect(args.target).counts
    target = Path(args.target).expanduser()
    if not (target / "README.md").exists():  # which may have been edited since
        write_card(target)
    print(
        f"{'already there: ' if again else 'wrote '}{args.target}: "
        f"{counts.total_params:,} parameters, "
        f"{counts.activated_params:,} of them activated"
    )
    errors = record["adaln_error"]
    if errors:
        worst = max(errors, key=errors.get)
        print(
            f"AdaLN compression: relative error {sum(errors.values()) / len(errors):.2%} on "
            f"average, {errors[worst]:.2%} at worst ({worst}); all are in d2m_conversion.json"
        )
    base = base_pipeline(args.source, args.subfolder)
    if Path(base).expanduser().is_file():  # a transformer alone, which does not name its pipeline
        base = "PIPELINE"
    print(_next(args.target, base, args.preset, record["routers"]))


def _next(target: str, base: str, preset: str | None, routers: str) -> str:
    """What a model is that was only converted, and the commands that come next."""
    config = f"{preset}.yaml" if preset else "CONFIG.yaml"
    rows = (
        (f"d2m prepare photos/ latents/ --model {base}", "your images and captions"),
        (f"d2m distill {config} --plan", "memory and hours"),
        (f"d2m distill {config}", "trains; starts from the dense model itself"),
        (f'd2m sample {target} "a cat" --base {base} --top-k dense', "every expert runs"),
    )
    width = max(len(command) for command, _ in rows)
    lines = [f"  {command:{width}}  # {what}" for command, what in rows]
    state = {"random": "choose at random", "fitted": "are fitted, nothing is trained"}[routers]
    return "\n".join([f"{target} is converted, not distilled: its routers {state}. Next:", *lines])


def structure_of(args: argparse.Namespace) -> Any:
    """--preset's name, checked, or --structure's FluxMoEConfig."""
    from d2m_models.config import FluxMoEConfig
    from d2m_models.presets import find_preset

    if args.preset is not None:
        find_preset(args.preset)
        return args.preset
    import yaml

    try:
        data = yaml.safe_load(Path(args.structure).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {args.structure}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.structure} is no valid YAML: {error}") from error
    return FluxMoEConfig.from_dict(data)


def run_inspect(args: argparse.Namespace) -> None:
    from d2m_models.inspection.table import PAPER, draw, family_table, inspect, module_table

    names = [n for model in args.models for n in (PAPER if model == "presets" else (model,))]
    found = [inspect(name, args.size, args.size, args.text_tokens) for name in names]
    print(f"at {args.size} x {args.size} with {args.text_tokens} text tokens")
    if len(found) > 1:
        print("\n" + family_table(found))
    else:
        print(f"\n{found[0].name}\n\n{module_table(found[0])}")
    if args.plot:
        print(f"\nwrote {draw(found, args.plot)}")


def run_diff(args: argparse.Namespace) -> None:
    from d2m_models.inspection.differences import diff_checkpoints, diff_table, draw_diff

    top_k: Any = args.top_k
    if isinstance(top_k, str) and top_k.isdigit():
        top_k = int(top_k)
    errors = diff_checkpoints(
        args.teacher, args.student, inputs=args.inputs, batch=args.batch, seed=args.seed,
        image_tokens=args.image_tokens, text_tokens=args.text_tokens, top_k=top_k,
    )  # fmt: skip
    print(diff_table(errors))
    if args.plot:
        print(f"\nwrote {draw_diff(errors, args.plot)}")


def run_push(args: argparse.Namespace) -> None:
    from d2m_models.inspection.push import plan_push, push

    uploads = plan_push(args.model, args.repository, args.base)
    if not args.dry_run:
        print(f"pushed {len(uploads)} files to {push(uploads, args.repository, args.private)}")
        return
    for upload in uploads:
        print(f"{upload.nbytes:>14,}  {upload.name}")
    print("\nREADME.md:\n")
    print(next(u.content for u in uploads if u.name == "README.md").decode())
    print("dry run: nothing was uploaded")
