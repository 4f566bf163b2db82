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
from distill.study.pictures import experts_png, loss_png, samples_png

FIELDS = ("kind", "total_params", "activated_params", "flops", "step_seconds", "latency_ratio",
          "rel_mse", "class_accuracy", "psnr", "ssim")  # fmt: skip
KINDS = ("teacher", "moe", "mob", "prune-mlp", "prune-depth")


def write_results(
    folder: Path, seed: int, environment: Mapping[str, Any], models: Mapping[str, Any]
) -> None:
    """results.json: {"seed", "environment", "models": {name: {FIELDS}}}."""
    for name, row in models.items():
        assert tuple(row) == FIELDS and row["kind"] in KINDS, (name, row)
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
    rows = {}
    for name, row in results["models"].items():
        caption = "dense" if row["kind"] == "teacher" else f"rel. MSE {row['rel_mse']:.2g}"
        rows[name] = (caption, tensors[f"samples/{name}"])
    samples_png(folder / "samples.png", rows, meta["prompts"])
    curves = {
        model: [(stage, tensors[f"curve/{model}/{stage}"].numpy()) for stage in stages]
        for model, stages in meta["curves"].items()
    }
    loss_png(folder / "loss.png", curves)
    layers = {
        caption: ckpt.unpack(f"experts/{layer}", tensors)
        for layer, caption in meta["layers"].items()
    }
    groups = {
        caption: ckpt.unpack(f"blocks/{group}", tensors)
        for group, caption in meta["groups"].items()
    }
    experts_png(folder / "experts.png", layers, groups, meta["text_tokens"])
    full = folder / "full.json"
    summary = json.loads(full.read_text(encoding="utf-8")) if full.exists() else None
    report = folder / "report.html"
    ckpt.write_text(report, _page(folder, results, meta, summary))
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
        "kind": lambda m: m["kind"],
        "total params": lambda m: _number(m["total_params"]),
        "activated": lambda m: _number(m["activated_params"]),
        "FLOPs a step": lambda m: _number(m["flops"]),
        "step": lambda m: f"{m['step_seconds'] * 1e3:.3g} ms",
        "latency / dense": lambda m: f"{m['latency_ratio']:.2f}",
        "rel. MSE": lambda m: "0" if m["rel_mse"] == 0 else f"{m['rel_mse']:.2e}",
        "class accuracy": lambda m: f"{m['class_accuracy']:.3f}",
        "PSNR": lambda m: f"{m['psnr']:.2f}" if "psnr" in m else "",  # runs of before it was there
        "SSIM": lambda m: f"{m['ssim']:.3f}" if "ssim" in m else "",
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
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _figures(models: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """File -> title, caption, and what it shows in words with its main numbers."""
    best = ", ".join(f"{n} {m['class_accuracy']:.0%}" for n, m in models.items())
    return {
        "samples.png": ("Samples", "Every row is a model, every column the same prompt and the "
            "same initial noise.", "Grid of generated digits, a row a model; the classifier reads "
            f"as prompted: {best}."),
        "loss.png": ("Training", "Left: output distillation loss of every student. Right: "
            "load-balancing loss of experts (stage b) and of blocks (stage c); 1 means even use.",
            f"Distillation loss and load balance over training steps, for {', '.join(models)}."),
        "experts.png": ("Who does what", "Share of selections by prompt, sampling step and token; "
            "a row adds up to one. Below: the block each MoB group chooses.", "Heat maps of how "
            "often each expert, and each block of a group, is selected."),
    }  # fmt: skip


def _over_seeds(models: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """Means over seeds, and the verdicts."""
    header = ["model", "kind", *(f"{k} (mean ± s.d.)" for k in ("rel_mse", "class_accuracy"))]
    cells = [
        [name, models[name]["kind"], "{mean:.2e} ± {spread:.1e}".format(**s["rel_mse"]),
         "{mean:.3f} ± {spread:.3f}".format(**s["class_accuracy"])]
        for name, s in full["summary"].items()
    ]  # fmt: skip
    claims = "".join(
        f"<li>{html.escape(c['claim'])}: <strong>{html.escape(c['verdict'])}</strong> "
        f"({html.escape(c['detail'])})</li>"
        for c in full["claims"]
    )
    return f"<h2>Over seeds {full['seeds']}</h2>{table(header, cells)}<ul>{claims}</ul>"


def _page(
    folder: Path, results: dict[str, Any], meta: dict[str, Any], full: dict[str, Any] | None
) -> str:
    models = results["models"]
    return page(
        "dense2moe demo",
        "<h1>From a dense diffusion transformer to MoE and MoB</h1>",
        f"<p>A FLUX model of {_number(models['teacher']['total_params'])} parameters, trained on",
        "scikit-learn's digits with the class as prompt, and what is left when only part of it "
        "runs.</p>",
        table(*table_rows(models)),
        f"<p>{html.escape(meta['notes'])}</p>",
        "" if full is None else _over_seeds(models, full),
        "".join(
            figure((folder / file).read_bytes(), *words) for file, words in _figures(models).items()
        ),
        f"<h2>Environment</h2>{facts({'seed': results['seed'], **results['environment']})}",
    )
