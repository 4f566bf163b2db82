"""`d2m convert --calibrate DATA`: experts, routers and output weights measured on data, FFN by FFN.

DST.start/ holds a file an FFN, so that an interrupted run goes on, and is what `--order` takes:

    FFN.safetensors           FFN [F] int64, FFN.router [E, D], FFN.w2 [D, F], FFN.b2 [D]
    adaln/temb.safetensors    temb [n, D]: conditioning of these prompts, for the AdaLN basis
    start.json                the settings, and each FFN's relative error before any training
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.device import add_device, pick_device
from distill.errors import UserError, library_errors

TOKENS = 48  # a width, 12 for each neuron of a FLUX FFN


def extend(convert: argparse.ArgumentParser) -> None:
    """Adds the options to `d2m convert`."""
    plain = convert.get_default("run")

    def run(args: argparse.Namespace) -> None:
        if args.calibrate is None:
            return _plain(plain, args)
        if args.to_dense or args.order or args.adaln_calibration or args.subfolder or args.variant:
            raise UserError(
                "--calibrate measures what --order and --adaln-calibration give, on a model that "
                "is loaded whole; leave out these, --to-dense, --subfolder and --variant"
            )
        start = calibrate(args)
        args.order, temb = str(start), start / "adaln" / "temb.safetensors"
        args.adaln_calibration = str(temb) if temb.exists() else None
        _plain(plain, args)
        errors = json.loads((start / "start.json").read_text(encoding="utf-8"))["errors"].values()
        print(
            f"calibrated on {args.calibrate}: an FFN's relative error before training is "
            f"{sum(errors) / len(errors):.1%} on average, {max(errors):.1%} at worst"
        )

    group = convert.add_argument_group(
        "--calibrate",
        "Experts for clusters of tokens, each with copies of the neurons that serve it most, "
        "routers fitted to them, and output weights refitted to make up for what a token does not "
        "use. The dense model is loaded whole (FLUX.1: 24 GB of device memory, or of host memory "
        "and slow), FFNs are measured a few at a time.",
    )
    group.add_argument(
        "--calibrate", metavar="DATA",
        help="digits, photos or icons, which are built in, or a folder of `d2m prepare`",
    )  # fmt: skip
    group.add_argument(
        "--keep-outputs", action="store_true",
        help="no copies, and output weights stay the dense ones, so that --to-dense finds them",
    )  # fmt: skip
    group.add_argument("--tokens", type=int, help=f"of each FFN (default: {TOKENS} x width)")
    group.add_argument("--text-encoders", help="for shards without embeddings: a FLUX folder")
    add_device(group)
    convert.set_defaults(run=run)


def _plain(run: Any, args: argparse.Namespace) -> None:
    with library_errors():
        run(args)


def calibrate(args: argparse.Namespace) -> Path:
    """Measures what the conversion needs; returns its folder, DST.start."""
    import torch
    from tqdm import tqdm

    from d2m_models.checkpoints.convert import default_lora_scale
    from d2m_models.commands import structure_of
    from d2m_models.conversion.flux import check_dense_flux, ffn_names
    from d2m_models.presets import resolve_config
    from distill import files as ckpt
    from distill.configs.sections import DataConfig, StudentConfig, TeacherConfig
    from distill.data.sources import BUILT_IN, data_fingerprint, open_source
    from distill.students import each_start, measure_importance
    from distill.teacher import load_teacher, modulation_inputs

    device = pick_device(args.device)
    data = (
        DataConfig(name=args.calibrate) if args.calibrate in BUILT_IN
        else DataConfig("shards", folder=args.calibrate, text_encoders=args.text_encoders)
    )  # fmt: skip
    dtype = "float32" if args.dtype == "float32" else "bfloat16"
    with library_errors():
        config = structure_of(args)
    scale = default_lora_scale(config, args.lora_scale)
    path = TeacherConfig(path=args.source, dtype=dtype, lora=args.lora, lora_scale=scale)
    teacher = load_teacher(path, data, args.seed, device)
    with library_errors():
        check_dense_flux(teacher, "the model of --calibrate")
        structure = resolve_config(config, len(teacher.transformer_blocks),
                                   len(teacher.single_transformer_blocks))  # fmt: skip
    if structure.moe is None:
        raise UserError("--calibrate is for a configuration with experts, this one has none")
    source = open_source(data, teacher, device)
    tokens = args.tokens or TOKENS * teacher.inner_dim
    how = ("clusters", "fitted", "dense") if args.keep_outputs else ("copies", "fitted", "refitted")
    student = StudentConfig("-", None, *how, tokens)
    settings = {"source": str(args.source), "data": args.calibrate, "tokens": tokens,
                "digest": data_fingerprint(data), "moe": structure.moe.to_dict(),
                "outputs": student.outputs, "seed": args.seed, "lora": args.lora}  # fmt: skip
    out = ckpt.make_folder(f"{args.target}.start")
    errors = _errors(out / "start.json", settings)
    with torch.no_grad():
        if structure.adaln_dim is not None and not (out / "adaln" / "temb.safetensors").exists():
            temb = modulation_inputs(teacher, source, student.calibration, args.seed).cpu()
            ckpt.make_folder(out / "adaln")
            ckpt.save_tensors(out / "adaln" / "temb.safetensors", {"temb": temb}, {})
    todo = [name for name in ffn_names(teacher) if name not in errors]
    if not todo:
        return out
    bar = tqdm(total=len(errors) + len(todo), initial=len(errors), desc="calibrate", unit=" FFNs",
               disable=args.quiet)  # fmt: skip
    with bar:
        scores = measure_importance(teacher, source, student.importance_batches, args.seed, 8)
        found = each_start(teacher, source, structure.moe, scores, student, args.seed, todo)
        for name, start, error in found:
            tensors = {name: start.order, f"{name}.router": start.router}
            if start.w2 is not None:
                tensors |= {f"{name}.w2": start.w2.to(teacher.dtype), f"{name}.b2": start.b2}
            ckpt.save_tensors(out / f"{name}.safetensors", tensors, {})
            errors[name] = error
            _write(out / "start.json", settings, errors)
            bar.update()
    return out


def _errors(path: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Of the FFNs that are measured already with these settings."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != dict(settings):
        raise UserError(f"{path.parent} was measured with other settings; remove it")
    return found["errors"]


def _write(path: Path, settings: Mapping[str, Any], errors: Mapping[str, float]) -> None:
    from distill.files import write_text

    content = {"settings": dict(settings), "errors": dict(errors)}
    write_text(path, json.dumps(content, indent=1) + "\n")
