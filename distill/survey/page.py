"""The survey for people: survey.html, its picture, and the suggestion in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2m_models.config import MoEConfig
from distill import files as ckpt
from distill.page import facts, figure, page, picture, table
from distill.survey.run import mixtures, verdict


def shape(moe: Mapping[str, Any]) -> str:
    """A mixture in the paper's notation, such as 1S12E2A, with the size of an expert."""
    m = MoEConfig.from_dict(moe)
    return f"{m.shared_ratio:g}S{m.num_experts}E{m.top_k}A (experts {m.expert_ratio:g} D)"


def describe(best: Mapping[str, Any]) -> str:
    """A suggestion in one line."""
    dense = f", dense: {', '.join(best['dense'])}" if best["dense"] else ""
    return (
        f"{shape(best['moe'])}, {best['formation']}{dense}; activated {best['activated']:.2f} D, "
        f"error {best['error']:.4f}, pruning {best['pruned']:.4f}"
    )


def write_page(out: Path | str, content: Mapping[str, Any], best: Mapping[str, Any]) -> Path:
    """OUT/survey.png and OUT/survey.html; returns the page."""
    out = Path(out)
    draw(out / "survey.png", content)
    layers, found = content["layers"], mixtures(content)
    rows = []
    for name, layer in layers.items():
        own = min((m for m in layer["mixtures"] if m["ratio"] == 1.5), key=lambda m: m["error"])
        rows.append([
            name, f"{1 - layer['linear']:.1%}", f"{own['pruned']:.4f}", f"{own['error']:.4f}",
            f"{own['pruned'] / own['error']:.2f}x", shape(own["moe"]), own["formation"],
        ])  # fmt: skip
    forms = [
        [shape(m["moe"]), m["formation"], f"{m['ratio']:g}", f"{m['pruned']:.4f}",
         f"{m['error']:.4f}", f"{m['gain']:.2f}x"]
        for m in found
    ]  # fmt: skip
    groups = [
        [
            name,
            *(f"{g[k]:.4f}" for k in ("kept", "pruned", "mob")),
            f"{g['pruned'] / g['mob']:.2f}x",
        ]
        for name, g in content["groups"].items()
    ]
    parts = [
        "<h1>Is this model worth converting?</h1>",
        f"<p><b>{verdict(content, best)}</b> Suggested: {describe(best)}.</p>",
        "<p>Relative errors of a layer's output on tokens that the fit has not seen, before any "
        "training; pruning and mixtures activate equally many neurons, and both have the best "
        "output weights that least squares gives. Where a linear map explains nearly all of an "
        "FFN, few neurons do, whichever they are.</p>",
        figure((out / "survey.png").read_bytes(), "Error against activated neurons",
               "left: mean over layers; right: how many times nearer the best mixture at r_a 1.5 "
               "is, layer by layer"),
        "<h2>Layers, at r_a 1.5</h2>",
        table(["FFN", "linear share", "pruned", "best mixture", "gain", "shape", "formation"],
              rows),
        "<h2>Mixtures, mean over layers</h2>",
        table(["shape", "formation", "r_a", "pruned", "mixture", "gain"], forms),
    ]  # fmt: skip
    if groups:
        parts += [
            "<h2>Groups of single-stream blocks, one of which runs</h2>",
            "<p>kept: the first block as it is; pruned: its output weights refitted to the whole "
            "group; MoB: a refitted copy for each third of the noise levels.</p>",
            table(["blocks", "kept", "pruned", "MoB", "gain"], groups),
        ]
    about = {**content["settings"], **content["environment"]}
    path = out / "survey.html"
    ckpt.write_text(path, page("Survey", *parts, facts(about)))
    return path


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """Two panels: mean error against r_a, and the gain of every layer at r_a 1.5."""
    layers = list(content["layers"].values())
    with picture(path, 9.0, 3.4, columns=2) as (_, (left, right)):
        ratios = sorted(map(float, layers[0]["pruned"]))
        curve = [
            sum(next(v for k, v in layer["pruned"].items() if float(k) == r) for layer in layers)
            / len(layers)
            for r in ratios
        ]
        left.plot(ratios, curve, "o-", ms=3, label="pruned")
        best = {}
        for m in mixtures(content):
            best.setdefault(m["ratio"], m)
        left.plot(list(best), [m["error"] for m in best.values()], "s-", ms=4, label="mixture")
        left.set(yscale="log", xlabel="activated neurons / width", ylabel="relative error")
        left.legend(frameon=False)
        gains = [
            max(m["pruned"] / m["error"] for m in layer["mixtures"] if m["ratio"] == 1.5)
            for layer in layers
        ]
        right.bar(range(len(gains)), gains)
        right.axhline(1.0, lw=0.8, color="black")
        right.set(xlabel="FFN", ylabel="pruned / best mixture")
