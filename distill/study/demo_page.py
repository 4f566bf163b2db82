"""What a run leaves behind: results.json, three pictures and report.html, one self-contained page.

Everything is rendered from results.json and report.safetensors, so `d2m report` can do it again.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill import files as ckpt
from distill.errors import CheckpointError
from distill.page import facts, figure, page, table
from distill.study.pictures import coloured, grid_png, loss_png

FIELDS = ("total_params", "activated_params", "flops", "step_seconds", "latency_ratio",
          "rel_mse", "words", "psnr", "ssim", "dead", "busiest")  # fmt: skip


def write_results(
    folder: Path, seed: int, environment: Mapping[str, Any], models: Mapping[str, Any]
) -> None:
    """results.json: {"seed", "environment", "models": {name: {FIELDS}}}."""
    for name, row in models.items():
        assert tuple(row) == FIELDS, (name, row)
    content = {"seed": seed, "environment": dict(environment), "models": dict(models)}
    ckpt.write_text(folder / "results.json", json.dumps(content, indent=2) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        missing = [k for k in ("seed", "environment", "models") if k not in results]
    except OSError as err:
        raise CheckpointError(
            f"cannot read {path}: {err.strerror or err}; expected the output folder of `d2m demo`"
        ) from err
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{path} is no valid JSON ({err})") from err
    if missing:
        raise CheckpointError(f"{path} lacks the keys {missing}")
    return results


def render(folder: Path | str) -> Path:
    """(Re)write the pictures and report.html from the run's data; returns the page's path."""
    folder = Path(folder)
    results = read_results(folder)
    tensors, meta = ckpt.load_tensors(folder / "report.safetensors")
    models, prompts = results["models"], meta["prompts"]
    drawn = {name: tensors[f"drawn/{name}"][: len(prompts)] for name in models}
    captions = {n: f"rel. MSE {row['rel_mse']:.2g}" for n, row in models.items()}
    captions["teacher"] = "dense"
    columns = ["\n".join(p.split()) for p in prompts]
    real = [i if i.any() else None for i in tensors["real"]]
    rows = {"real icon": ("training data", real)}
    rows |= {name: (captions[name], list(images)) for name, images in drawn.items()}
    grid_png(folder / "samples.png", rows, columns)
    errors = {n: (captions[n], list((i - drawn["teacher"]).abs()))
              for n, i in drawn.items() if n != "teacher"}  # fmt: skip
    grid_png(folder / "errors.png", errors, columns, cmap="magma")
    experts = {}
    for key in sorted(k for k in tensors if k.startswith("experts/")):
        ids, (prefix, number, *_) = tensors[key], key.split("/")[1].split(".")
        block = f"{'single' if prefix.startswith('single') else 'double'} block {number}"
        moments = {"first": 0, "last": len(ids) - 1}
        for words, step in moments.items():
            own = [coloured(i, own) for i, own in zip(drawn["moe"], ids[step], strict=True)]
            experts[f"{block}, {words}"] = ("", own)
    grid_png(folder / "experts.png", experts, columns, side=1.9)
    loss_png(folder / "loss.png", ckpt.unpack("curve", tensors))
    report = folder / "report.html"
    ckpt.write_text(report, _page(folder, results, meta))
    return report


def _number(value: float) -> str:
    """Three digits with k, M, G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def table_rows(models: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the results table, as text."""
    columns = {
        "total params": lambda m: _number(m["total_params"]),
        "activated": lambda m: _number(m["activated_params"]),
        "FLOPs a step": lambda m: _number(m["flops"]),
        "step": lambda m: f"{m['step_seconds'] * 1e3:.3g} ms",
        "latency / dense": lambda m: f"{m['latency_ratio']:.2f}",
        "rel. MSE": lambda m: "0" if m["rel_mse"] == 0 else f"{m['rel_mse']:.2e}",
        "words": lambda m: f"{m['words']:.2f}",
        "PSNR": lambda m: f"{m['psnr']:.1f}",
        "SSIM": lambda m: f"{m['ssim']:.3f}",
        "experts dead": lambda m: "" if m["dead"] is None else f"{m['dead']:.0%}",
        "busiest": lambda m: "" if m["busiest"] is None else f"{m['busiest']:.1f}x",
    }
    cells = [[name, *(cell(m) for cell in columns.values())] for name, m in models.items()]
    return ["model", *columns], cells


def text_table(models: Mapping[str, Any]) -> str:
    """The results table for a terminal."""
    header, cells = table_rows(models)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = []
    for row in [header, *cells]:
        padded = [
            c.ljust(w) if i < 1 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _figures(models: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """File -> title, caption, and what it shows in words with its main numbers."""
    words = ", ".join(f"{n} {m['words']:.2f}" for n, m in models.items())
    errors = ", ".join(f"{n} {m['psnr']:.1f} dB" for n, m in models.items() if n != "teacher")
    return {
        "samples.png": ("Drawings", "Every row is a model, every column the same prompt and the "
            "same initial noise. Columns without a real icon are combinations of words that no "
            "training icon has.", f"Grid of drawn icons, a row a model; words read: {words}."),
        "errors.png": ("Where they differ from the teacher's", "Absolute difference of pixels, "
            "bright = large.", f"Difference maps; PSNR: {errors}."),
        "experts.png": ("Who draws what", "The MoE's drawings; a patch has the colour of its "
            "token's first expert, in the first and the last of the sampling steps.",
            "Icons whose 4x4 patches are tinted by expert, for two layers and two steps."),
        "loss.png": ("Training", "Output distillation loss; the MoB and the pruned depth begin "
            "with the trained MoE.", f"Distillation loss over steps, for {', '.join(models)}."),
    }  # fmt: skip


def _page(folder: Path, results: dict[str, Any], meta: dict[str, Any]) -> str:
    models = results["models"]
    moe, teacher = models["moe"], models["teacher"]
    return page(
        "dense2moe demo",
        "<h1>From a dense diffusion transformer to MoE and MoB</h1>",
        f"<p>A FLUX model of {_number(teacher['total_params'])} parameters that draws icons from "
        "words, and what is left when only part of it runs. The MoE computes "
        f"{moe['flops'] / teacher['flops']:.0%} of its FLOPs in {moe['latency_ratio']:.0%} of its "
        "time.</p>",
        table(*table_rows(models)),
        f"<p>{html.escape(meta['notes'])}</p>",
        "<p>An expert is dead if it gets less than a thousandth of its layer's slots; busiest is "
        "the mean load of each layer's busiest expert, 1x = even. Should some die, let routers "
        "learn more slowly (router_lr_scale) or balance more (loss.balance).</p>",
        "".join(
            figure((folder / file).read_bytes(), *words) for file, words in _figures(models).items()
        ),
        f"<h2>Environment</h2>{facts({'seed': results['seed'], **results['environment']})}",
    )
