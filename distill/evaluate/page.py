"""grid.png (prompts x models), report.html of one evaluation and compare.html of several."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill import files as ckpt
from distill.evaluate.generate import image_path
from distill.evaluate.prompts import Prompt
from distill.evaluate.scores import HEADINGS, cell, differences, table
from distill.evaluate.statistics import key_of
from distill.page import facts, figure, page
from distill.page import table as html_table

CELL, TEXT, ROWS = 256, 220, 8  # pixels of an image and of the prompts' column; most prompts


def write_grid(path: Path, folders: Mapping[str, Path], prompts: Sequence[str]) -> None:
    """The first image of the first prompts, a row a prompt, a column a model."""
    from PIL import Image, ImageDraw, ImageFont

    shown = [
        (i, text) for i, text in enumerate(prompts)
        if all(image_path(folder, key_of(i, 0)).exists() for folder in folders.values())
    ][:ROWS]  # fmt: skip
    grid = Image.new("RGB", (TEXT + CELL * len(folders), 24 + CELL * len(shown)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for column, name in enumerate(folders):
        draw.text((TEXT + CELL * column + 6, 4), name[:36], "#1f2430", font=font)
    for row, (i, text) in enumerate(shown):
        top = 24 + CELL * row
        words = "\n".join(textwrap.wrap(text, 30)[:14])
        draw.multiline_text((6, top + 4), words, "#1f2430", font=font)
        for column, folder in enumerate(folders.values()):
            with suppress(OSError, SyntaxError):  # one that cannot be read stays white
                image = Image.open(image_path(folder, key_of(i, 0))).convert("RGB")
                grid.paste(image.resize((CELL - 4, CELL - 4)), (TEXT + CELL * column, top))
    ckpt.write_atomic(path, lambda tmp: grid.save(tmp, format="PNG"))


def write_report(
    out: Path, content: Mapping[str, Any], folders: Mapping[str, Path], prompts: Sequence[Prompt]
) -> Path:
    """grid.png and report.html of one evaluation."""
    write_grid(out / "grid.png", folders, [prompt.text for prompt in prompts])
    rows = []
    for name, column in content["columns"].items():
        judges = "; ".join(f"{role}: {j['judge']} ({j.get('revision') or j.get('weights', '')})"
                           for role, j in column["judges"].items())  # fmt: skip
        groups = ", ".join(f"{g} {v:.4g}" for g, v in column.get("groups", {}).items())
        rows.append([HEADINGS.get(name, name), column["metric"], cell(column),
                     str(column["images"]), groups, judges])  # fmt: skip
    failed = "".join(f"<li>{html.escape(why)}</li>" for why in content["failed"].values())
    header = ["score", "metric", "mean [95%]", "images", "by task", "judges"]
    model = {k: v for k, v in content["model"].items() if v is not None}
    _write(
        out / "report.html", "dense2moe evaluation",
        f"<h1>{html.escape(str(content['model']['model']))}</h1>", html_table(header, rows),
        "<p>Intervals: bootstrap over prompts. CMMD and FID compare two sets and have no value per "
        "image, so none.</p>",
        f"<h2>Not computed</h2><ul>{failed}</ul>" if failed else "",
        figure((out / "grid.png").read_bytes(), "Images", "A row a prompt, a column a model, all "
               "from the same noise."),
        "<h2>In the paper's columns</h2>", html_table(*table([content])),
        f"<h2>Environment</h2>{facts({**model, **content['settings'], **content['environment']})}",
    )  # fmt: skip
    return out / "report.html"


def write_comparison(
    out: Path, all_scores: Sequence[Mapping[str, Any]], folders: Mapping[str, Path],
    prompts: Sequence[str],
) -> Path:  # fmt: skip
    """grid.png and compare.html of several evaluations."""
    write_grid(out / "grid.png", folders, prompts)
    pairs = differences(all_scores)
    _write(
        out / "compare.html", "dense2moe comparison", "<h1>Models side by side</h1>",
        html_table(*table(all_scores)),
        "<p>Rows of the paper: as published. Brackets: 95%, bootstrap over prompts.</p>",
        "<h2>Paired differences</h2>" + html_table(*pairs) if pairs[1] else "",
        figure((out / "grid.png").read_bytes(), "Images", "A row a prompt, a column a model."),
    )  # fmt: skip
    return out / "compare.html"


def _write(path: Path, title: str, *parts: str) -> None:
    ckpt.write_text(path, page(title, *parts))
