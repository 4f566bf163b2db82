"""How the reports' pictures are made; those of the demo: drawings, errors, who draws what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2m_models.inspection.figures import COLOURS
from distill.page import FAINT, HAIR, picture


def heat_map(axis: Any, table: Tensor, cmap: str, most: float | None, **labels: Any) -> Any:
    """Rows and columns of a table as colours from 0 to `most`."""
    image = axis.imshow(
        table.numpy(), aspect="auto", cmap=cmap, vmin=0, vmax=most, interpolation="nearest"
    )
    axis.set(**labels)
    return image


def grid_png(
    path: Path, rows: Mapping[str, tuple[str, Sequence[Any]]], columns: Sequence[str],
    cell: float = 0.8, side: float = 1.5, **shown: Any,
) -> None:  # fmt: skip
    """Pictures in rows and columns, like the paper's Fig. 1.

    Args:
        rows: name -> (caption, an image [H, W] or [H, W, 3] in 0..1 a column; None: left empty).
        columns: their headings. cell, side: inches of a picture, and beside them. shown: of
            `imshow`; by default grey, 1 white.
    """
    shown = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest", **shown}
    head = 0.15 * max(1, *(c.count("\n") + 1 for c in columns)) + 0.1
    size = (cell * len(columns) + side, cell * len(rows) + head + 0.05)
    with picture(path, *size, rows=0, layout=None) as (figure, _):
        width, height = cell / size[0], cell / size[1]
        left, top = side / size[0], 1 - head / size[1]
        beside = {"x": left - 0.1 / size[0], "ha": "right", "va": "center"}
        for r, (name, (caption, images)) in enumerate(rows.items()):
            y = top - (r + 1) * height
            middle = 0.6 if caption else 0.5
            figure.text(y=y + middle * height, s=name, weight="bold", **beside)
            figure.text(y=y + 0.32 * height, s=caption, fontsize=7, color=FAINT, **beside)
            for c, image in enumerate(images):
                if image is None:
                    continue
                box = (left + c * width + 0.03 * width, y + 0.03 * height)
                axis = figure.add_axes((*box, 0.94 * width, 0.94 * height))
                axis.imshow(np.asarray(image), **shown)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=True, color=HAIR, linewidth=0.6)
        for c, column in enumerate(columns):
            x = left + (c + 0.5) * width
            figure.text(x, top + 0.06 / size[1], column, ha="center", va="bottom", fontsize=8)


def coloured(image: Tensor, ids: Tensor) -> Tensor:
    """An icon [H, W] in 0..1 whose patches are tinted by number: ids [patches] -> [H, W, 3]."""
    palette = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in TINTS])
    across = round(ids.numel() ** 0.5)
    tint = palette[ids.long().view(across, across) % len(TINTS)]
    scale = image.shape[0] // across
    tint = tint.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return tint * (0.25 + 0.75 * image[..., None])  # ink dark, paper in the expert's colour


TINTS = ("#8dd3c7", "#ffffb3", "#bebada", "#fb8072", "#80b1d3", "#fdb462", "#b3de69", "#fccde5",
         "#d9d9d9", "#bc80bd", "#ccebc5", "#ffed6f")  # fmt: skip


def loss_png(path: Path, curves: Mapping[str, Tensor]) -> None:
    """Distillation loss (7) of every student: model -> [n, 2] of step and the mean loss since the
    line before."""
    with picture(path, 7.2, 3.2) as (_, axis):
        for colour, (model, table) in zip(COLOURS, curves.items(), strict=False):
            style = "--" if model.startswith("prune") else "-"
            axis.plot(table[:, 0], table[:, 1], style, color=colour, label=model, linewidth=1.6)
        axis.set_yscale("log")
        axis.set(xlabel="training step", title="Output distillation loss (eq. 7)")
        axis.grid(axis="y", color="#eceef3", linewidth=0.6)
        axis.legend(frameon=False, fontsize=8)
