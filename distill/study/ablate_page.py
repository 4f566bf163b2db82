"""The pictures and the page of `d2m ablate`, rendered from claims.json and ablate.safetensors."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill import files as ckpt
from distill.errors import CheckpointError
from distill.page import FAINT, INK, facts, figure, page, picture, table
from distill.study import claims
from distill.study.pictures import COLOURS, heat_map

_COLOURS = dict(zip(claims.VERDICTS, ("good", "bad", "open"), strict=True))
VERDICT_COLOURS = {"holds": COLOURS[0], "does not hold": COLOURS[1], "undecided": FAINT}


def claims_png(path: Path, content: Mapping[str, Any]) -> None:
    """Every claim's effect: seeds as dots, the mean with t standard errors as a bar, a panel for
    ratios and one for differences."""
    entries = content["claims"]
    panels = {s: [c for c in entries if c["scale"] == s] for s in ("log", "linear")}
    heights = [len(p) + 1 for p in panels.values()]
    options = {"height_ratios": heights, "layout": "constrained"}
    with picture(path, 9.6, 0.34 * len(entries) + 1.6, 2, 1, **options) as (_, axes):
        for axis, (scale, panel) in zip(axes, panels.items(), strict=True):
            for y, entry in enumerate(reversed(panel)):
                low, high = (
                    [math.nan if v is None else v for v in entry["arms"][entry[k]]]
                    for k in ("low", "high")
                )
                seeds = np.array(claims.effects(low, high, scale))
                colour = VERDICT_COLOURS[entry["verdict"]]
                if np.isfinite(seeds).all() and len(seeds) > 1:
                    bar = claims.critical(len(seeds)) * seeds.std(ddof=1) / len(seeds) ** 0.5
                    ends = [seeds.mean() - bar, seeds.mean() + bar]
                    axis.plot(ends, [y, y], color=colour, linewidth=5, alpha=0.35,
                              solid_capstyle="round")  # fmt: skip
                axis.plot(seeds, np.full(len(seeds), y), "o", color=colour, markersize=4)
            axis.axvline(0, color=INK, linewidth=0.8)
            words = [f"{c['claim']} ({c['source']}): {c['verdict']}" for c in reversed(panel)]
            axis.set_yticks(range(len(panel)), words, fontsize=7.5)
            axis.set_ylim(-0.6, len(panel) - 0.4)
        axes[0].set_xlabel("error of the other / error of the one claimed better (1 = alike)")
        _ratio_ticks(axes[0])
        axes[1].set_xlabel("difference to what chance gives (Fig. 3, Fig. 6)")


def _ratio_ticks(axis: Any) -> None:
    """Natural logarithms labelled as ratios."""
    low, high = axis.get_xlim()
    ticks = [r for r in (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50)
             if low <= math.log(r) <= high]  # fmt: skip
    if high - low > 2.5:
        ticks = [r for r in ticks if r in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)]
    axis.set_xticks([math.log(r) for r in ticks], [f"{r:g}" for r in ticks])


def comparators_png(path: Path, content: Mapping[str, Any]) -> None:
    """Relative MSE of every comparator, a dot a seed; the trained MoE at other top-k (Fig. 8)."""
    runs = content["runs"]
    first = next(iter(runs.values()))
    names = [n for n in first if all(r[n].get("rel_mse", 0) > 0 for r in runs.values())]
    names.sort(key=lambda n: np.mean([r[n]["rel_mse"] for r in runs.values()]))
    names.reverse()  # the best on top
    colours = {"moe": 0, "joint": 0, "prune": 1, "bk": 1, "lite": 4, "mob": 2, "groups": 5,
               "hyper": 3}  # fmt: skip
    options = {"width_ratios": (2, 1), "layout": "constrained"}
    with picture(path, 9.6, 0.25 * len(names) + 1.2, 1, 2, **options) as (_, (left, right)):
        for y, name in enumerate(names):
            values = [r[name]["rel_mse"] for r in runs.values()]
            colour = COLOURS[colours.get(name.split("-")[0], 7)]
            left.plot(values, [y] * len(values), "o", color=colour, markersize=5)
        left.set_yticks(range(len(names)), names)
        left.set_xscale("log")
        left.grid(axis="x", color="#e6e9ef", linewidth=0.8)
        left.set_title("Relative MSE to the teacher, a dot a seed")
        counts = sorted(int(k[3:]) for k in first["moe"] if k.startswith("top"))
        for seed, row in ((s, r) for s, r in runs.items() if r["moe"]):
            right.plot(range(len(counts)), [row["moe"][f"top{k}"] for k in counts], "o-",
                       markersize=4, color=COLOURS[0], alpha=0.7, label=f"seed {seed}")  # fmt: skip
        right.set_xticks(range(len(counts)), [str(k) for k in counts])
        right.set_yscale("log")
        right.set(xlabel="experts a token", title="Top-k without training (Fig. 8)")


def blocks_png(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fig. 3: log MSE between input and output of every single block, by prompt and timestep."""
    from matplotlib import colormaps

    with picture(path, 9.6, 3.2, 1, 2, sharey=True, layout="constrained") as (_, axes):
        for axis, kind in zip(axes, ("prompt", "timestep"), strict=True):
            table = tensors[f"teacher/blocks/{kind}"].numpy()
            shades = colormaps["viridis"](np.linspace(0.05, 0.9, len(table)))
            for row, shade in zip(table, shades, strict=True):
                axis.plot(row, color=shade, linewidth=1)
            axis.plot(table.mean(0), color="black", linewidth=2)
            axis.set(xlabel="single block", title=f"by {kind}")
        axes[0].set_ylabel("log10 MSE, output - input")


def experts_png(path: Path, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Fig. 6: how often each expert is chosen by prompt, timestep, token; Fig. 7: one image's map
    of first choices at three steps, for a double and a single block."""
    layers = sorted({k.split("/")[1] for k in tensors if k.startswith("moe/")}, reverse=True)
    options = {"width_ratios": (1.5, 1.2, 1.2, 1, 1, 1), "squeeze": False, "layout": "constrained"}
    with picture(path, 11.5, 2.5 * len(layers), len(layers), 6, **options) as (_, axes):
        for row, layer in zip(axes, layers, strict=True):
            tables = ckpt.unpack(f"moe/{layer}", tensors)
            experts, maps = tables["prompt"].shape[1], tables["map"]
            for axis, kind in zip(row[:3], ("prompt", "timestep", "token"), strict=True):
                heat_map(axis, tables[kind], "magma", None, xlabel="expert", title=f"by {kind}",
                         xticks=range(0, experts, 3))  # fmt: skip
            prefix, index, *_ = layer.split(".")
            row[0].set_yticks(range(len(names)), names, fontsize=5.5)
            row[0].set_ylabel(f"{'single' if prefix.startswith('single') else 'double'} {index}")
            side = round(maps.shape[1] ** 0.5)
            for axis, step in zip(row[3:], (0, len(maps) // 2, len(maps) - 1), strict=True):
                axis.imshow(maps[step].view(side, side).numpy(), cmap="tab20", vmin=0,
                            vmax=max(experts - 1, 19), interpolation="nearest")  # fmt: skip
                axis.set(xticks=[], yticks=[], title=f"map, step {step + 1}")


_FIGURES = (
    ("claims.png", "Verdicts", "Right of the line: as claimed. Dots are seeds, bars t standard "
     "errors of the mean; a bar that crosses the line leaves the claim undecided."),
    ("arms.png", "Comparators", "Every model that was compared, on the same held-out triples."),
    ("blocks.png", "Blocks (Fig. 3)", "The black line is the mean; each other line is a prompt or "
     "a timestep. The teacher, first seed."),
    ("experts.png", "Experts (Figs. 6 and 7)", "A row of a heat map adds up to one. The maps show "
     "the first choice of each of an image's 64 tokens, in place."),
)  # fmt: skip


def render(folder: Path | str) -> Path:
    """(Re)write the pictures and ablate.html from the run's data; returns the page's path."""
    from distill.data.photos import Photos

    folder = Path(folder)
    content = claims.read(folder / "claims.json")
    tensors, _ = ckpt.load_tensors(folder / "ablate.safetensors")
    claims_png(folder / "claims.png", content)
    comparators_png(folder / "arms.png", content)
    blocks_png(folder / "blocks.png", tensors)
    experts_png(folder / "experts.png", tensors, Photos.names)
    for file, *_ in _FIGURES:
        shrink(folder / file)
    images = {file: (folder / file).read_bytes() for file, *_ in _FIGURES}
    ckpt.write_text(folder / "ablate.html", _page(content, images))
    return folder / "ablate.html"


def rewrite(path: Path | str) -> Path:
    """The words, tables and style of a page (NAME.html) anew from NAME.json beside it.

    Its pictures stay: what they were drawn from is in the run's folder, not in NAME.json.
    """
    path = Path(path)
    content = claims.read(path.with_suffix(".json"))
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', path.read_text(encoding="utf-8"))
    if len(found) != len(_FIGURES):
        raise CheckpointError(
            f"{path} has {len(found)} pictures, expected {len(_FIGURES)}; "
            "`d2m ablate --results` writes it anew"
        )
    pairs = zip(_FIGURES, found, strict=True)
    images = {file: base64.b64decode(data) for (file, *_), data in pairs}
    ckpt.write_text(path, _page(content, images))
    return path


def shrink(path: Path) -> None:
    """A PNG with a palette of 128 colours: a third of the bytes, no difference to the eye."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    ckpt.write_atomic(path, lambda tmp: small.save(tmp, format="PNG", optimize=True))


def separation_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Gap of pruned models to the dense one, in standard deviations over seeds."""
    header = ["pruned model", "relative MSE", "gap / s.d.", "flow-matching loss: gap", "gap / s.d."]
    rows = []
    for name, entry in content["separation"].items():
        cells = [name]
        for value in ("rel_mse", "flow_loss"):
            gap, ratio = entry[value]["gap"], entry[value]["gap_over_spread"]
            cells += ["" if gap is None else f"{gap:.3g}", "" if ratio is None else f"{ratio:.1f}"]
        rows.append(cells)
    return header, rows


def values_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean and standard deviation over seeds of every comparator."""
    keys = ("rel_mse", "flow_loss", "sample_mse", "shared_only", "few_steps", "many_steps")
    rows = []
    runs = list(content["runs"].values())
    for name in runs[0]:
        cells = [name]
        for key in keys:
            values = np.array([r[name].get(key, math.nan) for r in runs])
            spread = f" ± {values.std(ddof=1):.1e}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3g}{spread}" if np.isfinite(values).all() else "")
        rows.append(cells)
    return ["comparator", *keys], rows


def _page(content: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    first, *others = (figure(images[file], *words) for file, *words in _FIGURES)
    missing = "<p><strong>Not all comparators are measured.</strong></p>"
    rates, found = content["rates"], content["config"]["search"]
    rate_text = ", ".join(f"{kind} {rate:g}" for kind, rate in rates["chosen"].items())
    tried = (
        f"Each kind of training had the same search, over {found['rates']} at {found['share']:.0%} "
        "of the steps on another seed."
        if rates["tried"]
        else "Learning rates were not searched in this run."
    )
    where = {"seeds": content["seeds"], "learning rates": rate_text, **content["environment"]}
    return page(
        "dense2moe: the paper's claims at small scale",
        "<h1>The paper's claims at small scale</h1>",
        "" if content["complete"] else missing,
        "<p>A small FLUX trained on crops of 16 photographs with the picture's name as prompt; all",
        f"that are compared have the same steps on the same batches. {html.escape(tried)}</p>",
        table(
            *claims.table(content),
            colours=dict(zip(claims.VERDICTS, ("good", "bad", "open"), strict=True)),
        ),
        f"<p>{html.escape(content['rule'])}</p>",
        first,
        "<h2>Does the setting separate?</h2>",
        "<p>The dense model's relative MSE is 0 by definition. s.d.: over seeds.</p>",
        table(*separation_table(content)),
        f"<h2>Every comparator</h2>{table(*values_table(content))}{facts(content['measures'])}",
        "".join(others),
        f"<h2>Environment</h2>{facts(where)}",
    )
