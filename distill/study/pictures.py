"""The three pictures of a run: sample grid, loss curves, expert use; one PNG each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.files import write_atomic

# Okabe and Ito's palette, readable with any colour vision; one colour a model, in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#444444")
INK, FAINT = "#1f2430", "#8a90a0"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.edgecolor": FAINT,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "figure.facecolor": "white",
        }
    )
    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    # No software version inside, so that the same run gives the same bytes.
    write_atomic(
        path, lambda tmp: figure.savefig(tmp, dpi=150, format="png", metadata={"Software": None})
    )
    plt.close(figure)


def samples_png(
    path: Path, rows: Mapping[str, tuple[str, Tensor]], columns: Sequence[str], per_prompt: int = 2
) -> None:
    """Grid like the paper's Fig. 1: a row a model, a column a prompt and noise.

    Args:
        rows: model -> (caption, images [C * n, 8, 8] in 0..1, prompt-major, n a prompt).
        columns: the C prompts. per_prompt: samples shown of each.
    """
    plt = _pyplot()
    across = len(columns) * per_prompt
    figure = plt.figure(figsize=(0.46 * across + 1.9, 0.5 * len(rows) + 0.75))
    left, top = 1.75 / figure.get_figwidth(), 1 - 0.42 / figure.get_figheight()
    cell_w = (1 - left - 0.01) / across
    cell_h = (top - 0.06) / len(rows)
    gap = 0.12
    for r, (name, (caption, images)) in enumerate(rows.items()):
        y = top - (r + 1) * cell_h
        figure.text(left - 0.012, y + 0.62 * cell_h, name, ha="right", va="center", weight="bold")
        figure.text(
            left - 0.012,
            y + 0.26 * cell_h,
            caption,
            ha="right",
            va="center",
            fontsize=7,
            color=FAINT,
        )
        per_class = len(images) // len(columns)
        for c in range(len(columns)):
            for k in range(per_prompt):
                x = left + (c * per_prompt + k + gap / 2) * cell_w
                axis = figure.add_axes((x, y + 0.04 * cell_h, cell_w * (1 - gap), cell_h * 0.92))
                image = images[c * per_class + k].numpy()
                axis.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(visible=True, color="#d6dae3", linewidth=0.6)
    for c, column in enumerate(columns):
        x = left + (c + 0.5) * per_prompt * cell_w
        figure.text(x, top + 0.012, f"“{column}”", ha="center", va="bottom")
    _save(plt, figure, path)


def loss_png(path: Path, curves: Mapping[str, Sequence[tuple[str, np.ndarray]]]) -> None:
    """Distillation loss (7) of every student over its stages, and how evenly experts and blocks are
    used.

    Args:
        curves: model -> its stages in order: (name, array [n, 3] of step, L_distill, L_balance);
            steps count from the stage's start, the loss is the mean since the line before.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), width_ratios=(1.7, 1))
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
        style = {"color": colour, "linestyle": "--" if pruned else "-", "linewidth": 1.6}
        left.plot(xs, ys, label=model, **style)
        for i, (x, y) in enumerate(balance):
            right.plot(x, y, label=model if i == 0 else None, **style)
    left.set_yscale("log")
    left.set(xlabel="training step", title="Output distillation loss (eq. 7)")
    right.axhline(1, color=FAINT, linewidth=0.8, linestyle=":")
    right.set(xlabel="training step", title="Load balance: experts, then blocks (1 = even)")
    for x, stage in boundaries.items():
        for axis in (left, right):
            axis.axvline(x, color="#d6dae3", linewidth=0.8, zorder=0)
        left.text(
            x,
            1.0,
            f" {stage}",
            transform=left.get_xaxis_transform(),
            fontsize=7,
            color=FAINT,
            va="top",
        )
    for axis in (left, right):
        axis.grid(axis="y", color="#eceef3", linewidth=0.6)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(plt, figure, path)


def _heatmap(axis: Any, table: Tensor, title: str, ylabel: str, even: float) -> Any:
    image = axis.imshow(
        table.numpy(),
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=max(4 * even, 0.02),
        interpolation="nearest",
    )
    axis.set(title=title, ylabel=ylabel)
    ticks = range(table.shape[1]) if table.shape[1] <= 14 else range(0, table.shape[1], 4)
    axis.set_xticks(list(ticks))
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image


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
    plt = _pyplot()
    rows = len(layers) + (1 if groups else 0)
    figure, axes = plt.subplots(
        rows, 3, figsize=(9.6, 2.5 * rows), squeeze=False, layout="constrained"
    )
    for line, (caption, tables) in zip(axes, layers.items(), strict=False):
        for axis, kind, ylabel in zip(
            line,
            ("prompt", "timestep", "token"),
            ("digit", "sampling step", "token"),
            strict=True,
        ):
            table = tables[kind]
            even = 1 / table.shape[1]
            picture = _heatmap(axis, table, f"{caption}: by {kind}", ylabel, even)
            axis.set_xlabel("expert")
            axis.set_yticks(range(0, table.shape[0], 3 if table.shape[0] <= 12 else 4))
            if kind == "token" and table.shape[0] > 16:
                axis.axhline(text_tokens - 0.5, color="white", linewidth=1.2)
                axis.text(
                    table.shape[1] - 0.6,
                    text_tokens - 0.8,
                    "text",
                    color="white",
                    ha="right",
                    fontsize=7,
                )
        bar = figure.colorbar(picture, ax=line[-1], fraction=0.06, pad=0.02)
        bar.set_ticks([0, even, 2 * even, 4 * even], labels=["0", "even", "2x", "≥4x"])
        bar.outline.set_visible(False)
    if groups:
        for axis, kind, ylabel in zip(
            axes[-1], ("prompt", "timestep"), ("digit", "sampling step"), strict=False
        ):
            table = np.concatenate([g[kind].numpy() for g in groups.values()], axis=1)
            picture = axis.imshow(
                table, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest"
            )
            names = [
                label for g, t in groups.items() for label in _block_labels(g, t[kind].shape[1])
            ]
            axis.set_xticks(range(len(names)), names, fontsize=7)
            axis.set(title=f"MoB: block chosen, by {kind}", ylabel=ylabel, xlabel="block")
            edge = 0
            for g in list(groups.values())[:-1]:
                edge += g[kind].shape[1]
                axis.axvline(edge - 0.5, color="white", linewidth=2)
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[-1][2].axis("off")
        bar = figure.colorbar(picture, ax=axes[-1][1], fraction=0.06, pad=0.02)
        bar.outline.set_visible(False)
    _save(plt, figure, path)


def _block_labels(caption: str, count: int) -> list[str]:
    """Caption "D1-3" -> D1, D2, D3: the group's blocks by kind and number."""
    first = int("".join(ch for ch in caption.split("-")[0] if ch.isdigit()))
    return [f"{caption[0]}{first + i}" for i in range(count)]
