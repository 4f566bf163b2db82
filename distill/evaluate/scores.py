"""scores.json of `d2m evaluate`: read, and set beside others in the columns of Table 1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError
from distill.evaluate.paper import QUALITY, row_of
from distill.evaluate.statistics import paired

SCHEMA = "dense2moe-scores/1"
# Columns of fidelity, which the paper has not.
FIDELITY = {"psnr": "PSNR", "ssim": "SSIM", "latent_mse": "latent MSE",
            "latent_mse_end": "latent MSE, end", "lpips": "LPIPS", "cosine": "cosine",
            "cmmd": "CMMD", "fid": "FID"}  # fmt: skip
HEADINGS = {**QUALITY, **FIDELITY}
Table = tuple[list[str], list[list[str]]]


def read_scores(path: Path | str) -> dict[str, Any]:
    """scores.json, or that of a folder."""
    path = Path(path)
    path = path / "scores.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"cannot read {path} ({err}); expected a `d2m evaluate`'s") from err
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no scores.json of the schema {SCHEMA!r}")
    return content


def number(value: float) -> str:
    return f"{value:.4g}"


def cell(column: Mapping[str, Any] | None) -> str:
    """ "0.5702 [0.5511, 0.5893]", or nothing."""
    if column is None:
        return ""
    text = number(column["mean"])
    if column["interval"] is not None:
        text += " [{}, {}]".format(*map(number, column["interval"]))
    return text


def label(content: Mapping[str, Any]) -> str:
    """The model's last name."""
    return Path(content["model"]["model"]).name


def table(all_scores: Sequence[Mapping[str, Any]]) -> Table:
    """Models in Table 1's columns, under each the paper's row of its structure and steps."""
    shown = [c for c in HEADINGS if any(c in s["columns"] for s in all_scores)]
    shown = [*QUALITY, *(c for c in shown if c not in QUALITY)]
    header = ["model", "preset", "NFE", "TFLOP", "activated B", "s an image",
              *(HEADINGS[c] for c in shown)]  # fmt: skip
    rows = []
    for scores in all_scores:
        model, columns = scores["model"], scores["columns"]
        costs = [_scaled(model, "flops", 1e12), _scaled(model, "activated_params", 1e9),
                 _scaled(model, "image_seconds", 1)]  # fmt: skip
        rows.append([label(scores), model["preset"] or "", str(model["steps"]), *costs,
                     *(cell(columns.get(c)) for c in shown)])  # fmt: skip
        if (paper := row_of(model["preset"], model["steps"])) is not None:
            quality = dict(zip(QUALITY, map(number, paper.quality), strict=True))
            rows.append([f"paper: {paper.name} (H20)", paper.preset, str(paper.nfe),
                         number(paper.flops_t), number(paper.activated_b),
                         number(paper.latency_s),
                         *(quality.get(c, "") for c in shown)])  # fmt: skip
    return header, rows


def _scaled(model: Mapping[str, Any], key: str, unit: float) -> str:
    return f"{model[key] / unit:.4g}" if key in model else ""


def same_images(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether they began with the same prompts and noise."""
    return all(a["settings"][k] == b["settings"][k] for k in ("prompts_hash", "seed", "size"))


def differences(all_scores: Sequence[Mapping[str, Any]]) -> Table:
    """Every model less the first, in pairs of images of the same prompt and noise."""
    first, *others = all_scores
    header = ["column", "model", f"less {label(first)}", "images"]
    rows = []
    for scores in others:
        if not same_images(scores, first):
            continue
        for name, column in scores["columns"].items():
            base = first["columns"].get(name, {})
            if "values" not in column or "values" not in base:
                continue
            groups = dict(enumerate(scores["groups"])) if "groups" in column else None
            found = paired(column["values"], base["values"], groups)
            if found is not None:
                rows.append([HEADINGS.get(name, name), label(scores), cell(found),
                             str(found["images"])])  # fmt: skip
    return header, rows
