"""Plain matplotlib pictures of this package's tables, one PNG each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2m_models.conversion.grouping import BlockMSE

# Okabe and Ito's palette, readable with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#444444")


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its panels, drawn without a display and without touching global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for axes in panes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panes


def save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a plot is written as PNG; {path} should end in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def stacked_bars(
    path: str | Path, rows: Mapping[str, Mapping[str, float]], unit: str, marks: Mapping[str, float]
) -> Path:
    """One horizontal bar a model, made of its modules (as the paper's Fig. 2, left).

    Args:
        rows: model -> module -> value. marks: model -> a published value, drawn as a black line.
    """
    figure, (axes,) = new_figure(8, 1.2 + 0.45 * len(rows))
    names = list(rows)
    left = [0.0] * len(names)
    for colour, part in zip(COLOURS, next(iter(rows.values())), strict=False):
        values = [rows[name][part] for name in names]
        axes.barh(names, values, left=left, color=colour, label=part, height=0.65)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for y, (name, total) in enumerate(zip(names, left, strict=True)):
        axes.text(total, y, f" {total:.2f}", va="center", fontsize=8)
        if name in marks:
            label = None if any(n in marks for n in names[:y]) else "paper"
            axes.plot([marks[name]] * 2, [y - 0.42, y + 0.42], color="black", lw=1.5, label=label)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_xlim(right=1.1 * max(left))
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return save(figure, path)


def dots(path: str | Path, values: Mapping[str, float], label: str, log: bool = True) -> Path:
    """One point a layer, in the given order; names are "LAYER KIND", one colour a kind."""
    figure, (axes,) = new_figure(max(6, 0.14 * len(values)), 4)
    names = list(values)
    kinds = [name.rpartition(" ")[2] for name in names]
    for colour, kind in zip(COLOURS, dict.fromkeys(kinds), strict=False):
        xs = [i for i, k in enumerate(kinds) if k == kind]
        axes.plot(xs, [values[names[i]] for i in xs], "o", ms=4, color=colour, label=kind)
    if log and min(values.values()) > 0:
        axes.set_yscale("log")
    layers = [name.rpartition(" ")[0] for name in names]
    ticks = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer]
    axes.set_xticks(ticks, [layers[i] for i in ticks], rotation=90, fontsize=6)
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e4e7ee")
    axes.legend(fontsize=8, frameon=False)
    return save(figure, path)


def lines(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    ylabel: str,
    groups: Sequence[Sequence[int]] = (),
) -> Path:
    """Side by side panels of thin lines with their black mean, proposed groups shaded (Fig. 3)."""
    figure, all_axes = new_figure(5.5 * len(panels), 3.6, len(panels))
    for axes, (title, series) in zip(all_axes, panels.items(), strict=True):
        for i, (name, values) in enumerate(series.items()):
            axes.plot(values, color=COLOURS[i % len(COLOURS)], lw=0.8, alpha=0.7, label=name)
        count = len(next(iter(series.values())))
        mean = [sum(v[i] for v in series.values()) / len(series) for i in range(count)]
        axes.plot(mean, color="black", lw=2, label="mean")
        for group in groups:
            axes.axvspan(group[0] - 0.4, group[-1] + 0.4, color="#0072B2", alpha=0.1, lw=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        if len(series) <= 10:
            axes.legend(fontsize=7, frameon=False)
    all_axes[0].set_ylabel(ylabel)
    return save(figure, path)


def draw_block_mse(
    measured: BlockMSE,
    path: str | Path,
    kind: str = "single",
    groups: Sequence[Sequence[int]] = (),
    most: int = 8,
) -> Path:
    """log10 MSE by block, one line a prompt (left) and one a timestep range (right), as Fig. 3.

    Args:
        groups: shaded. most: lines a panel.
    """
    logs_nL = measured.values[kind].clamp(min=1e-30).log10()
    prompts = {f"sample {i}": logs_nL[i].tolist() for i in range(min(most, len(logs_nL)))}
    order = measured.timesteps.argsort(descending=True)
    times = {}
    for part in order.chunk(min(most, len(order))):
        low, high = float(measured.timesteps[part].min()), float(measured.timesteps[part].max())
        times[f"t {low:.2f}-{high:.2f}"] = logs_nL[part].mean(0).tolist()
    return lines(
        path, {"by prompt": prompts, "by timestep": times}, "log10 MSE of output to input", groups
    )
