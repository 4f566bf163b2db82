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
from distill.study import claims
from distill.study.page import STYLE, _html_table
from distill.study.pictures import COLOURS, FAINT, INK, _pyplot, _save

VERDICT_COLOURS = {"holds": COLOURS[0], "does not hold": COLOURS[1], "undecided": FAINT}


def claims_png(path: Path, content: Mapping[str, Any]) -> None:
    """Every claim's effect: seeds as dots, the mean with t standard errors as a bar, a panel for
    ratios and one for differences."""
    plt = _pyplot()
    entries = content["claims"]
    panels = [[c for c in entries if c["scale"] == s] for s in ("log", "linear")]
    figure, axes = plt.subplots(
        2, 1, figsize=(9.6, 0.34 * len(entries) + 1.6), height_ratios=[len(p) + 1 for p in panels],
        layout="constrained",
    )  # fmt: skip
    for axis, panel, scale in zip(axes, panels, ("log", "linear"), strict=True):
        for y, entry in enumerate(reversed(panel)):
            low, high = (
                [math.nan if v is None else v for v in entry["arms"][entry[k]]]
                for k in ("low", "high")
            )
            seeds = np.array(claims.effects(low, high, scale))
            colour = VERDICT_COLOURS[entry["verdict"]]
            if np.isfinite(seeds).all() and len(seeds) > 1:
                bar = claims.critical(len(seeds)) * seeds.std(ddof=1) / len(seeds) ** 0.5
                centre = seeds.mean()
                axis.plot([centre - bar, centre + bar], [y, y], color=colour, linewidth=5,
                          alpha=0.35, solid_capstyle="round")  # fmt: skip
            axis.plot(seeds, np.full(len(seeds), y), "o", color=colour, markersize=4)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(
            range(len(panel)),
            [f"{c['claim']} ({c['source']}): {c['verdict']}" for c in reversed(panel)],
            fontsize=7.5,
        )
        axis.set_ylim(-0.6, len(panel) - 0.4)
        if scale == "log":
            axis.set_xlabel("error of the other / error of the one claimed better (1 = alike)")
            _ratio_ticks(axis)
        else:
            axis.set_xlabel("difference to what chance gives (Fig. 3, Fig. 6)")
    _save(plt, figure, path)


def _ratio_ticks(axis: Any) -> None:
    """Natural logarithms labelled as ratios."""
    low, high = axis.get_xlim()
    ticks = [r for r in (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50)
             if low <= math.log(r) <= high]  # fmt: skip
    if high - low > 2.5:
        ticks = [r for r in ticks if r in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)]
    axis.set_xticks([math.log(r) for r in ticks], [f"{r:g}" for r in ticks])


def arms_png(path: Path, content: Mapping[str, Any]) -> None:
    """Relative MSE of every arm, a dot a seed; and the trained MoE at other top-k (Fig. 8)."""
    plt = _pyplot()
    runs = content["runs"]
    first = next(iter(runs.values()))
    arms = [a for a in first if all(r[a].get("rel_mse", 0) > 0 for r in runs.values())]
    arms.sort(key=lambda a: np.mean([r[a]["rel_mse"] for r in runs.values()]))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 0.25 * len(arms) + 1.2), width_ratios=(2, 1), layout="constrained"
    )
    for y, arm in enumerate(reversed(arms)):
        method = arm.split("-")[0]
        colour = {"moe": 0, "joint": 0, "prune": 1, "bk": 1, "lite": 4, "mob": 2, "groups": 5,
                  "hyper": 3}.get(method, 7)  # fmt: skip
        values = [r[arm]["rel_mse"] for r in runs.values()]
        left.plot(values, [y] * len(values), "o", color=COLOURS[colour], markersize=5)
    left.set_yticks(range(len(arms)), list(reversed(arms)))
    left.set_xscale("log")
    left.grid(axis="x", color="#e6e9ef", linewidth=0.8)
    left.set_title("Relative MSE to the teacher, a dot a seed")
    counts = sorted(int(k[3:]) for k in first["moe"] if k.startswith("top"))
    for seed, row in ((s, r) for s, r in runs.items() if r["moe"]):
        right.plot(range(len(counts)), [row["moe"][f"top{k}"] for k in counts], "o-", markersize=4,
                   color=COLOURS[0], alpha=0.7, label=f"seed {seed}")  # fmt: skip
    right.set_xticks(range(len(counts)), [str(k) for k in counts])
    right.set_yscale("log")
    right.set(xlabel="experts a token", title="Top-k without training (Fig. 8)")
    _save(plt, figure, path)


def blocks_png(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fig. 3: log MSE between input and output of every single block, by prompt and timestep."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("prompt", "timestep"), strict=True):
        table = tensors[f"teacher/blocks/{kind}"].numpy()
        shades = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, len(table)))
        for row, shade in zip(table, shades, strict=True):
            axis.plot(row, color=shade, linewidth=1)
        axis.plot(table.mean(0), color="black", linewidth=2)
        axis.set(xlabel="single block", title=f"by {kind}")
    axes[0].set_ylabel("log10 MSE, output - input")
    _save(plt, figure, path)


def experts_png(path: Path, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Fig. 6: how often each expert is chosen by prompt, timestep, token; Fig. 7: one image's map
    of first choices at three steps, for a double and a single block."""
    plt = _pyplot()
    layers = sorted({k.split("/")[1] for k in tensors if k.startswith("moe/")}, reverse=True)
    figure, axes = plt.subplots(
        len(layers), 6, figsize=(11.5, 2.5 * len(layers)), layout="constrained",
        width_ratios=(1.5, 1.2, 1.2, 1, 1, 1), squeeze=False,
    )  # fmt: skip
    for row, layer in zip(axes, layers, strict=True):
        experts = tensors[f"moe/{layer}/prompt"].shape[1]
        for axis, kind in zip(row[:3], ("prompt", "timestep", "token"), strict=True):
            axis.imshow(tensors[f"moe/{layer}/{kind}"].numpy(), aspect="auto", cmap="magma",
                        vmin=0, interpolation="nearest")  # fmt: skip
            axis.set(xlabel="expert", title=f"by {kind}", xticks=range(0, experts, 3))
            if kind == "prompt":
                axis.set_yticks(range(len(names)), names, fontsize=5.5)
                kind_, index, *_ = layer.split(".")
                axis.set_ylabel(f"{'single' if kind_.startswith('single') else 'double'} {index}")
        maps = tensors[f"moe/{layer}/map"]
        side = round(maps.shape[1] ** 0.5)
        for axis, step in zip(row[3:], (0, len(maps) // 2, len(maps) - 1), strict=True):
            axis.imshow(maps[step].view(side, side).numpy(), cmap="tab20", vmin=0,
                        vmax=max(experts - 1, 19), interpolation="nearest")  # fmt: skip
            axis.set(xticks=[], yticks=[], title=f"map, step {step + 1}")
    _save(plt, figure, path)


_FIGURES = (
    ("claims.png", "Verdicts", "Right of the line: as claimed. Dots are seeds, bars t standard "
     "errors of the mean; a bar that crosses the line leaves the claim undecided."),
    ("arms.png", "Arms", "Every model that was compared, on the same held-out triples."),
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
    arms_png(folder / "arms.png", content)
    blocks_png(folder / "blocks.png", tensors)
    experts_png(folder / "experts.png", tensors, Photos.names)
    for file, *_ in _FIGURES:
        shrink(folder / file)
    page = folder / "ablate.html"
    images = {file: (folder / file).read_bytes() for file, *_ in _FIGURES}
    ckpt.write_text(page, _page(content, images))
    return page


def rewrite(page: Path | str) -> Path:
    """The words, tables and style of a page (NAME.html) anew from NAME.json beside it.

    Its pictures stay: what they were drawn from is in the run's folder, not in NAME.json.
    """
    page = Path(page)
    content = claims.read(page.with_suffix(".json"))
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page.read_text(encoding="utf-8"))
    if len(found) != len(_FIGURES):
        raise CheckpointError(
            f"{page} has {len(found)} pictures, expected {len(_FIGURES)}; "
            "`d2m ablate --results` writes it anew"
        )
    files = [file for file, *_ in _FIGURES]
    images = {f: base64.b64decode(data) for f, data in zip(files, found, strict=True)}
    ckpt.write_text(page, _page(content, images))
    return page


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
    for arm, entry in content["separation"].items():
        cells = [arm]
        for value in ("rel_mse", "flow_loss"):
            gap, ratio = entry[value]["gap"], entry[value]["gap_over_spread"]
            cells += ["" if gap is None else f"{gap:.3g}", "" if ratio is None else f"{ratio:.1f}"]
        rows.append(cells)
    return header, rows


def values_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean and standard deviation over seeds of every arm."""
    keys = ("rel_mse", "flow_loss", "sample_mse", "shared_only", "few_steps", "many_steps")
    rows = []
    runs = list(content["runs"].values())
    for arm in runs[0]:
        cells = [arm]
        for key in keys:
            values = np.array([r[arm].get(key, math.nan) for r in runs])
            spread = f" ± {values.std(ddof=1):.1e}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3g}{spread}" if np.isfinite(values).all() else "")
        rows.append(cells)
    return ["arm", *keys], rows


def _page(content: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    pictures = {}
    for file, title, caption in _FIGURES:
        data = base64.b64encode(images[file]).decode()
        pictures[file] = (
            f'<h2>{title}</h2><figure><img alt="{html.escape(caption, quote=True)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
            "</figure>"
        )
    first, *others = pictures.values()
    unfinished = "" if content["complete"] else "<p><strong>Not all arms are measured.</strong></p>"
    rates, found = content["rates"], content["config"]["search"]
    rate_text = ", ".join(f"{kind} {rate:g}" for kind, rate in rates["chosen"].items())
    tried = (
        f"Each kind of training had the same search, over {found['rates']} at {found['share']:.0%} "
        "of the steps on another seed."
        if rates["tried"]
        else "Learning rates were not searched in this run."
    )
    facts = {"seeds": content["seeds"], "learning rates": rate_text, **content["environment"]}
    listed = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items()
    )
    measures = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>"
        for k, v in content["measures"].items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>dense2moe: the paper's claims at small scale</title><style>{STYLE}</style></head><body>
<h1>The paper's claims at small scale</h1>
{unfinished}
<p>A small FLUX trained on crops of 16 photographs with the picture's name as prompt; every arm of a
comparison has the same steps on the same batches. {html.escape(tried)}</p>
{_html_table(*claims.table(content))}
<p>{html.escape(content["rule"])}</p>
{first}
<h2>Does the setting separate?</h2>
<p>The dense model's relative MSE is 0 by definition. s.d.: over seeds.</p>
{_html_table(*separation_table(content))}
<h2>Every arm</h2>{_html_table(*values_table(content))}<dl>{measures}</dl>
{"".join(others)}
<h2>Environment</h2><dl>{listed}</dl>
</body></html>
"""
