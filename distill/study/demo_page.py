"""What a run leaves behind: results.json, three pictures and report.html, one self-contained page.

Everything is rendered from results.json and report.safetensors, so `d2m report` can do it again.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import files as ckpt
from distill.errors import CheckpointError
from distill.study.page import STYLE, _html_table
from distill.study.pictures import experts_png, loss_png, samples_png

FIELDS = (
    "kind",
    "total_params",
    "activated_params",
    "flops",
    "step_seconds",
    "latency_ratio",
    "rel_mse",
    "class_accuracy",
)
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


def curve_table(entries: list[dict[str, Any]]) -> Tensor:
    """Log lines -> [n, 3]: step, L_distill, L_balance."""
    rows = [[e["step"], e.get("distill", e["loss"]), e.get("balance", 0.0)] for e in entries]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


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
        caption: {k: tensors[f"experts/{layer}/{k}"] for k in ("prompt", "timestep", "token")}
        for layer, caption in meta["layers"].items()
    }
    groups = {
        caption: {k: tensors[f"blocks/{group}/{k}"] for k in ("prompt", "timestep")}
        for group, caption in meta["groups"].items()
    }
    experts_png(folder / "experts.png", layers, groups, meta["text_tokens"])
    full = folder / "full.json"
    summary = json.loads(full.read_text(encoding="utf-8")) if full.exists() else None
    page = folder / "report.html"
    ckpt.write_text(page, _page(folder, results, meta, summary))
    return page


def _number(value: float) -> str:
    """Three digits with k, M, G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def table_rows(models: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the results table, as text."""
    header = [
        "model",
        "kind",
        "total params",
        "activated",
        "FLOPs a step",
        "step",
        "latency / dense",
        "rel. MSE",
        "class accuracy",
    ]
    cells = [
        [
            name,
            m["kind"],
            _number(m["total_params"]),
            _number(m["activated_params"]),
            _number(m["flops"]),
            f"{m['step_seconds'] * 1e3:.3g} ms",
            f"{m['latency_ratio']:.2f}",
            "0" if m["rel_mse"] == 0 else f"{m['rel_mse']:.2e}",
            f"{m['class_accuracy']:.3f}",
        ]
        for name, m in models.items()
    ]
    return header, cells


def text_table(models: Mapping[str, Any]) -> str:
    """The results table for a terminal."""
    header, cells = table_rows(models)
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines = []
    for row in [header, *cells]:
        padded = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


_FIGURES = (
    (
        "samples.png",
        "Samples",
        "Every row is a model, every column the same prompt and the same initial noise.",
    ),
    (
        "loss.png",
        "Training",
        "Left: output distillation loss of every student. Right: load-balancing loss of experts "
        "(stage b) and of blocks (stage c); 1 means even use.",
    ),
    (
        "experts.png",
        "Who does what",
        "Share of selections by prompt, sampling step and token; a row adds up to one. Below: the "
        "block each MoB group chooses.",
    ),
)


def _alt(file: str, models: Mapping[str, Any]) -> str:
    """What a picture shows, in words with its main numbers."""
    names = ", ".join(models)
    if file == "samples.png":
        best = ", ".join(f"{n} {m['class_accuracy']:.0%}" for n, m in models.items())
        return f"Grid of generated digits, a row a model; the classifier reads as prompted: {best}."
    if file == "loss.png":
        return f"Distillation loss and load balance over training steps, for {names}."
    return "Heat maps of how often each expert, and each block of a group, is selected."


def _page(
    folder: Path, results: dict[str, Any], meta: dict[str, Any], full: dict[str, Any] | None
) -> str:
    models = results["models"]
    figures = []
    for file, title, caption in _FIGURES:
        data = base64.b64encode((folder / file).read_bytes()).decode()
        figures.append(
            f'<h2>{title}</h2><figure><img alt="{html.escape(_alt(file, models), quote=True)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    environment = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>"
        for k, v in {"seed": results["seed"], **results["environment"]}.items()
    )
    seeds = ""
    if full is not None:
        header = ["model", "kind", *(f"{k} (mean ± s.d.)" for k in ("rel_mse", "class_accuracy"))]
        cells = [
            [
                name,
                models[name]["kind"],
                f"{s['rel_mse']['mean']:.2e} ± {s['rel_mse']['spread']:.1e}",
                f"{s['class_accuracy']['mean']:.3f} ± {s['class_accuracy']['spread']:.3f}",
            ]
            for name, s in full["summary"].items()
        ]
        claims = "".join(
            f"<li>{html.escape(c['claim'])}: <strong>{html.escape(c['verdict'])}</strong> "
            f"({html.escape(c['detail'])})</li>"
            for c in full["claims"]
        )
        seeds = f"<h2>Over seeds {full['seeds']}</h2>{_html_table(header, cells)}<ul>{claims}</ul>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>dense2moe demo</title><style>{STYLE}</style></head><body>
<h1>From a dense diffusion transformer to MoE and MoB</h1>
<p>A FLUX model of {_number(models["teacher"]["total_params"])} parameters, trained on
scikit-learn's digits with the class as prompt, and what is left when only part of it runs.</p>
{_html_table(*table_rows(models))}
<p>{html.escape(meta["notes"])}</p>
{seeds}
{"".join(figures)}
<h2>Environment</h2><dl>{environment}</dl>
</body></html>
"""
