"""The table, the picture and the page of `d2m ablate --recipes`, all from recipes.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from d2m_models.inspection.figures import COLOURS
from distill import files as ckpt
from distill.page import facts, figure, page, picture, table
from distill.study import claims

# (nearer the teacher?, than which): asked at every length that both were trained for
QUESTIONS = (
    ("moe", "prune", "MoE against Diff-Pruning as published"),
    ("moe", "prune-refitted", "MoE against pruning with the same start"),
    ("moe-paper", "prune", "the paper's MoE against Diff-Pruning"),
    ("moe", "moe-paper", "this start and training against the paper's"),
    ("mob", "depth", "MoB against depth pruning"),
)


def lengths_of(content: Mapping[str, Any]) -> list[int]:
    return sorted({int(n.split("@")[1]) for row in content["runs"].values() for n in row})


def values(content: Mapping[str, Any], name: str, key: str = "rel_mse") -> list[float]:
    """One number a seed, of "arm@length"; [] if it was not trained."""
    found = [row[name][key] for row in content["runs"].values() if name in row]
    return [v for v in found if v is not None]


def verdicts(content: Mapping[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(words, length, entry of `claims.judge`) of every question that was measured."""
    for low, high, words in QUESTIONS:
        for n in lengths_of(content):
            if values(content, f"{low}@{n}") and values(content, f"{high}@{n}"):
                claim = claims.Claim(words, f"x{n}", f"{low}@{n}", f"{high}@{n}")
                yield words, n, claims.judge(claim, content["runs"])


def answer(content: Mapping[str, Any]) -> str:
    """When to convert and when to prune, in one sentence, from the longest training."""
    n = max(lengths_of(content))
    claim = claims.Claim("", "", f"moe@{n}", f"prune-refitted@{n}")
    entry = claims.judge(claim, content["runs"])
    if entry["mean"] is None:
        return "Not measured yet."
    gain = math.exp(entry["mean"])
    times = f"{gain:.2f} times as near the teacher as a pruned model with the same start"
    if entry["verdict"] == "undecided":
        return f"Undecided: after {n} times the shortest training an MoE is {times}."
    verb = "Convert" if entry["verdict"] == "holds" else "Prune"
    return (f"{verb}: after {n} times the shortest training an MoE of this teacher is {times}, "
            "at equal activated neurons.")  # fmt: skip


def arms_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Relative MSE (mean ± deviation over seeds) before training and at each length; use of
    experts at the longest."""
    lengths = lengths_of(content)
    header = ["arm", "untrained", *(f"x{n}" for n in lengths), "experts dead", "busiest"]
    rows = []
    for name in content["config"]["arms"]:
        own = [n for n in lengths if values(content, f"{name}@{n}")]
        if not own:
            continue
        cells = [name, f"{mean(values(content, f'{name}@{own[0]}', 'start_rel_mse')):.5f}"]
        for n in lengths:
            found = values(content, f"{name}@{n}")
            spread = f" ± {stdev(found):.5f}" if len(found) > 1 else ""
            cells.append(f"{mean(found):.5f}{spread}" if found else "")
        dead, busiest = (values(content, f"{name}@{own[-1]}", k) for k in ("dead", "busiest"))
        cells += [f"{mean(dead):.1%}", f"{mean(busiest):.1f}x"] if dead else ["", ""]
        rows.append(cells)
    return header, rows


def verdict_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["nearer?", "which", "training", "ratio of errors"]
    found = [[e["verdict"], words, f"x{n}", claims.effect_text(e)]
             for words, n, e in verdicts(content)]  # fmt: skip
    return header, found


def text_table(content: Mapping[str, Any]) -> str:
    """Both tables and the answer for a terminal."""
    parts = []
    for header, rows in (arms_table(content), verdict_table(content)):
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                 for row in [header, *rows]]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, answer(content)])


def curves_png(path: Path, content: Mapping[str, Any]) -> None:
    """Relative MSE against training steps, FFNs left, blocks right; a point a mean, bars ± one
    deviation over seeds."""
    steps, arms = content["config"]["train"]["steps"], content["config"]["arms"]
    sides = (("FFNs", ("moe", "prune")), ("blocks", ("mob", "depth")))
    with picture(path, 9.6, 3.8, 1, 2) as (_, axes):
        for axis, (title, kinds) in zip(axes, sides, strict=True):
            shown = [name for name, arm in arms.items() if arm["kind"] in kinds]
            for colour, name in zip(COLOURS * 2, shown, strict=False):
                own = [n for n in lengths_of(content) if values(content, f"{name}@{n}")]
                points = [values(content, f"{name}@{n}") for n in own]
                spread = [stdev(p) if len(p) > 1 else 0.0 for p in points]
                axis.errorbar([n * steps for n in own], [mean(p) for p in points], spread,
                              marker="o", markersize=4, color=colour, label=name, linewidth=1.4,
                              linestyle="--" if "prune" in name or "depth" in name else "-",
                              capsize=2)  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel="training steps", title=title)
            axis.grid(axis="y", which="both", color="#eceef3", linewidth=0.6)
            if shown:
                axis.legend(frameon=False, fontsize=7)
        axes[0].set_ylabel("relative MSE to the teacher")


def render(folder: Path | str) -> Path:
    """OUT/recipes.html from OUT/recipes.json; returns its path."""
    folder = Path(folder)
    content = json.loads((folder / "recipes.json").read_text(encoding="utf-8"))
    curves_png(folder / "recipes.png", content)
    teacher = json.loads(content["teacher"]) if content["teacher"] else {}
    config = content["config"]
    where = {
        "seeds": ", ".join(content["runs"]),
        "teacher": f"{config['teacher']['path']}, {teacher.get('samples', 0):,} samples seen",
        "learning rates": ", ".join(f"{k} {v:g}" for k, v in content["rates"].items()),
        **content["environment"],
    }
    colours = dict(zip(claims.VERDICTS, ("good", "bad", "open"), strict=True))
    text = page(
        "dense2moe: MoE or pruning?",
        "<h1>MoE or pruning?</h1>",
        f"<p><strong>{answer(content)}</strong></p>",
        "<p>All arms activate as many neurons (or blocks), see the same batches in the same order "
        f"({config['train']['batch_size']} samples a step, x1 = {config['train']['steps']} steps), "
        "and get the same learning-rate search; those without a fitted start train "
        f"{config['calibration_steps']} steps more, what fitting costs.</p>",
        table(*verdict_table(content), colours=colours),
        figure((folder / "recipes.png").read_bytes(), "Error against training",
               "Mean over seeds, bars one standard deviation; dashed: pruned models."),
        f"<h2>Every arm</h2>{table(*arms_table(content))}",
        f"<p>{claims.RULE}</p>",
        f"<h2>Environment</h2>{facts(where)}",
    )  # fmt: skip
    ckpt.write_text(folder / "recipes.html", text)
    return folder / "recipes.html"
