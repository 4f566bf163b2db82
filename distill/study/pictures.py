"""How the reports' pictures are made; those of the demo: sample grid, loss curves, expert use."""

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


def samples_png(
    path: Path, rows: Mapping[str, tuple[str, Tensor]], columns: Sequence[str], per_prompt: int = 2
) -> None:
    """Grid like the paper's Fig. 1: a row a model, a column a prompt and noise.

    Args:
        rows: model -> (caption, images [C * n, 8, 8] in 0..1, prompt-major, n a prompt).
        columns: the C prompts. per_prompt: samples shown of each.
    """
    across, gap = len(columns) * per_prompt, 0.12
    size = (0.46 * across + 1.9, 0.5 * len(rows) + 0.75)
    with picture(path, *size, rows=0, layout=None) as (figure, _):
        left, top = 1.75 / size[0], 1 - 0.42 / size[1]
        cell_w, cell_h = (1 - left - 0.01) / across, (top - 0.06) / len(rows)
        beside = {"x": left - 0.012, "ha": "right", "va": "center"}
        for r, (name, (caption, images)) in enumerate(rows.items()):
            y = top - (r + 1) * cell_h
            figure.text(y=y + 0.62 * cell_h, s=name, weight="bold", **beside)
            figure.text(y=y + 0.26 * cell_h, s=caption, fontsize=7, color=FAINT, **beside)
            per_class = len(images) // len(columns)
            for i in range(across):
                x = left + (i + gap / 2) * cell_w
                axis = figure.add_axes((x, y + 0.04 * cell_h, cell_w * (1 - gap), cell_h * 0.92))
                image = images[i // per_prompt * per_class + i % per_prompt].numpy()
                axis.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=True, color=HAIR, linewidth=0.6)
        for c, column in enumerate(columns):
            x = left + (c + 0.5) * per_prompt * cell_w
            figure.text(x, top + 0.012, f"“{column}”", ha="center", va="bottom")


def loss_png(path: Path, curves: Mapping[str, Sequence[tuple[str, np.ndarray]]]) -> None:
    """Distillation loss (7) of every student over its stages, and how evenly experts and blocks are
    used.

    Args:
        curves: model -> its stages in order: (name, array [n, 3] of step, L_distill, L_balance);
            steps count from the stage's start, the loss is the mean since the line before.
    """
    with picture(path, 9.6, 3.5, 1, 2, width_ratios=(1.7, 1)) as (_, (left, right)):
        boundaries: dict[float, str] = {}
        for colour, (model, stages) in zip(COLOURS, curves.items(), strict=False):
            start, xs, ys, balance = 0.0, [], [], []
            pruned = model.startswith(("prune", "lite"))
            for stage, table in stages:
                if len(table) == 0:
                    continue
                if "(" in stage:
                    boundaries.setdefault(start, stage)
                xs.extend(start + table[:, 0])
                ys.extend(table[:, 1])
                if not pruned and np.any(table[:, 2] > 0):
                    balance.append((start + table[:, 0], table[:, 2]))
                start += table[-1, 0]
            line = {"color": colour, "linestyle": "--" if pruned else "-", "linewidth": 1.6}
            left.plot(xs, ys, label=model, **line)
            for i, (x, y) in enumerate(balance):
                right.plot(x, y, label=model if i == 0 else None, **line)
        left.set_yscale("log")
        left.set(xlabel="training step", title="Output distillation loss (eq. 7)")
        right.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
        right.set(xlabel="training step", title="Load balance: experts, then blocks (1 = even)")
        words = {"transform": left.get_xaxis_transform(), "fontsize": 7, "color": FAINT}
        for x, stage in boundaries.items():
            for axis in (left, right):
                axis.axvline(x, color=HAIR, linewidth=0.8, zorder=0)
            left.text(x, 1.0, f" {stage}", va="top", **words)
        for axis in (left, right):
            axis.grid(axis="y", color="#eceef3", linewidth=0.6)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)


def experts_png(
    path: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    groups: Mapping[str, Mapping[str, Tensor]],
    text_tokens: int,
) -> None:
    """Selection frequency by prompt, timestep and token (the paper's Fig. 6), and of MoB blocks.

    Args:
        layers: caption of an MoE layer -> {"prompt", "timestep", "token": [rows, E]}.
        groups: caption of a MoB group -> {"prompt", "timestep": [rows, m]}.
    """
    rows = len(layers) + (1 if groups else 0)
    rules = {"prompt": "digit", "timestep": "sampling step", "token": "token"}
    options = {"squeeze": False, "layout": "constrained"}
    with picture(path, 9.6, 2.5 * rows, rows, 3, **options) as (figure, axes):
        for line, (caption, tables) in zip(axes, layers.items(), strict=False):
            for axis, (kind, ylabel) in zip(line, rules.items(), strict=True):
                count, experts = tables[kind].shape
                even = 1 / experts
                shades = heat_map(axis, tables[kind], "viridis", max(4 * even, 0.02),
                                  title=f"{caption}: by {kind}", xlabel="expert",
                                  ylabel=ylabel)  # fmt: skip
                axis.set_xticks(range(0, experts, 1 if experts <= 14 else 4))
                axis.set_yticks(range(0, count, 3 if count <= 12 else 4))
                axis.spines[:].set_visible(False)
                if kind == "token" and count > 16:
                    axis.axhline(text_tokens - 0.5, color="white", linewidth=1.2)
                    axis.text(experts - 0.6, text_tokens - 0.8, "text", color="white", ha="right",
                              fontsize=7)  # fmt: skip
            bar = figure.colorbar(shades, ax=line[-1], fraction=0.06, pad=0.02)
            bar.set_ticks([0, even, 2 * even, 4 * even], labels=["0", "even", "2x", "≥4x"])
            bar.outline.set_visible(False)
        if not groups:
            return
        for axis, kind in zip(axes[-1], ("prompt", "timestep"), strict=False):
            tables = {g: t[kind] for g, t in groups.items()}
            whole = torch.cat(list(tables.values()), 1)
            shades = heat_map(axis, whole, "magma", 1, ylabel=rules[kind], xlabel="block",
                              title=f"MoB: block chosen, by {kind}")  # fmt: skip
            names = [n for g, t in tables.items() for n in _block_labels(g, t.shape[1])]
            axis.set_xticks(range(len(names)), names, fontsize=7)
            for edge in np.cumsum([t.shape[1] for t in tables.values()])[:-1]:
                axis.axvline(edge - 0.5, color="white", linewidth=2)
            axis.spines[:].set_visible(False)
        axes[-1][2].axis("off")
        bar = figure.colorbar(shades, ax=axes[-1][1], fraction=0.06, pad=0.02)
        bar.outline.set_visible(False)


def _block_labels(caption: str, count: int) -> list[str]:
    """Caption "D1-3" -> D1, D2, D3: the group's blocks by kind and number."""
    first = int("".join(ch for ch in caption.split("-")[0] if ch.isdigit()))
    return [f"{caption[0]}{first + i}" for i in range(count)]
