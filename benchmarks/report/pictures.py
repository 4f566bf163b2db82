"""The report's pictures of benchmark results, one SVG each, and what they show in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from report import roofline
from report.read import Results, ceilings_of, machine_label, ran, run_id
from report.tables import how_measured

from d2m_models.inspection.figures import COLOURS
from distill.evaluate.paper import TABLE1
from distill.page import FAINT, picture

_MODELS = {"flux-moe-l": "L", "flux-moe-m": "M", "flux-moe-s": "S", "flux-moe-xs": "XS"}


def main_machine(all_results: Results, section: str) -> tuple[str, Mapping[str, Any]] | None:
    """The first machine (GPUs come first) that has something in a section."""
    return next(((n, r) for n, r in all_results.items() if r[section]), None)


def _ratios(all_results: Results) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """{(source, run): {model: (FLOPs ratio, latency ratio)}}, the paper first."""
    paper = {}
    for preset in _MODELS:
        known = roofline.paper_ratio(preset)
        paper[preset] = (known["flops_ratio"], known["latency_ratio"])
    found = {("paper, H20", ""): paper}
    for name, results in all_results.items():
        models = {p: results["models"].get(p, {}) for p in _MODELS}
        rows = {p: (m["flops_ratio"], m["latency_ratio"])
                for p, m in models.items() if "latency_ratio" in m}  # fmt: skip
        if rows:
            run = ran(name, results, (models[p] for p in rows))
            label = f"ours, {machine_label(name, results)}, {how_measured(results)}"
            found[label, run] = rows
    return found


def _words(source: tuple[str, str]) -> str:
    return ", ".join(filter(None, source))


def table1_svg(path: Path, all_results: Results) -> str:
    """Latency and FLOPs of L, M, S, XS relative to dense, the paper's and ours."""
    sources = _ratios(all_results)
    flops = {p: roofline.work_ratio(p) for p in _MODELS}
    with picture(path, 7, 3.2) as (_, axes):
        width = 0.8 / (len(sources) + 1)
        at = range(len(_MODELS))
        axes.bar([i - 0.4 + width / 2 for i in at], flops.values(), width, color=FAINT,
                 label="FLOPs (full attention, 1024x1024)")  # fmt: skip
        for s, ((source, _), rows) in enumerate(sources.items(), 1):
            x = [i - 0.4 + (s + 0.5) * width for i, p in enumerate(_MODELS) if p in rows]
            y = [rows[p][1] for p in _MODELS if p in rows]
            axes.bar(x, y, width, label=f"latency, {source}", color=COLOURS[s - 1])
        axes.set_xticks(list(at), [f"MoE-{letter}" for letter in _MODELS.values()])
        axes.axhline(1, color=FAINT, linewidth=0.8)
        axes.set(ylabel="relative to dense", ylim=(0, 1.05 + 0.17 * len(sources)))
        axes.legend(fontsize=7, frameon=False)
    words = [
        f"{_words(source)}: " + ", ".join(f"{_MODELS[p]} {r[1]:.2f}" for p, r in rows.items())
        for source, rows in sources.items()
    ]
    return "Bars of latency relative to dense. " + "; ".join(words) + "."


def latency_flops_svg(path: Path, all_results: Results) -> str:
    """Latency ratio against FLOPs ratio; on the line, latency falls as far as the FLOPs."""
    words = []
    with picture(path, 5, 4) as (_, axes):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, label="latency = FLOPs")
        for i, (source, rows) in enumerate(_ratios(all_results).items()):
            xs, ys = zip(*rows.values(), strict=True)
            axes.scatter([*xs, 1], [*ys, 1], color=COLOURS[i], label=source[0], zorder=3)
            for preset, (x, y) in rows.items() if i == 0 else ():  # same models, same FLOPs
                axes.annotate(_MODELS[preset], (x, y), textcoords="offset points", xytext=(7, -3))
            ratios = ", ".join(f"{_MODELS[p]} {y / x:.2f}" for p, (x, y) in rows.items())
            words.append(f"{_words(source)}: {ratios}")
        axes.set(xlabel="FLOPs / dense", ylabel="latency / dense")
        axes.set(xlim=(0.2, 1.05), ylim=(0.2, 1.15))
        axes.legend(fontsize=7, frameon=False)
    return "Latency ratio over FLOPs ratio, 1 is ideal. " + "; ".join(words) + "."


def roofline_svg(path: Path, all_results: Results) -> str | None:
    """Stages and layers under the ceilings that their own run measured.

    Runs differ in their ceilings, so both axes are relative to them: 1 is the ceiling's FLOP/s,
    and the FLOP per byte where it meets the copy's rate. The ceilings are medians of a product and
    of a copy that no cache holds; what was faster, from the cache, is drawn on the roof.
    """
    if (found := main_machine(all_results, "stages")) is None:
        return None
    name, results = found
    shown = [row for row in results["stages"] if row["gflop"] > 0]
    shown += [row for row in results["layers"] if row["pass"] == "forward"]
    tops = {run_id(name, results, row): ceilings_of(results, row) for row in shown}
    kinds: dict[str, list[tuple[float, float]]] = {}
    faster = 0
    for row in shown:
        top = ceilings_of(results, row)
        x = row["gflop"] / row["gbyte"] * top["gbps"] * 1e-3 / top["tflops"]
        y, roof = row["tflops"] / top["tflops"], min(1.0, x)
        faster += y > roof
        kinds.setdefault(row.get("stage", "moe_ffn"), []).append((x, min(y, roof)))
    where = machine_label(name, results)
    with picture(path, 6, 4) as (_, axes):
        xs = sorted({1.0, *(x for points in kinds.values() for x, _ in points)})
        axes.plot(xs, [min(1.0, x) for x in xs], color=FAINT, label="ceiling of the same run")
        for i, (kind, points) in enumerate(kinds.items()):
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, label=kind, color=COLOURS[i % len(COLOURS)], s=18)
        axes.set(xscale="log", yscale="log", title=where)
        axes.set(xlabel="FLOP per byte that must move / where both ceilings meet")
        axes.set(ylabel="FLOP/s / ceiling")
        axes.legend(fontsize=7, frameon=False)
    best = {k: max(p[1] for p in points) for k, points in kinds.items()}
    words = ", ".join(f"{k} {v:.1%}" for k, v in best.items())
    limits = ", ".join(f"{top['tflops']:.3g} TFLOP/s and {top['gbps']:.3g} GB/s ({run})"
                       for run, top in sorted(tops.items()))  # fmt: skip
    cached = (f" {faster} of {len(shown)}, faster from the cache than the ceilings, are drawn on "
              "the roof.") if faster else ""  # fmt: skip
    return (f"Roofline of {where}, {ran(name, results, shown)}, each point against its own run's "
            f"ceilings: {limits}; best share of the FLOP/s ceiling: {words}.{cached}")  # fmt: skip


def waterfall_svg(path: Path, all_results: Results) -> str | None:
    """One MoE layer as the sum of its stages run alone, beside moe_ffn and dense."""
    if (found := main_machine(all_results, "layers")) is None:
        return None
    name, results = found
    layer = next((r for r in results["layers"] if r["pass"] == "forward"
                  and r["shape"]["routing"] == "balanced"), results["layers"][0])  # fmt: skip
    rows = {r["stage"]: r for r in results["stages"] if r["name"] == layer["name"]
            and r["shape"]["routing"] == "balanced"}  # fmt: skip
    order = ("route", "grouped_gemm_up", "grouped_gemm_down", "combine")
    if any(stage not in rows for stage in order):
        return None
    shape = layer["shape"]
    dense = layer["seconds"][layer["baseline"]]["median"]
    steps = {"shared expert\n(at dense's rate)": dense * shape["S"] / shape["F"]}
    for stage in order:
        median = next(iter(rows[stage]["seconds"].values()))["median"]
        steps[stage.replace("grouped_gemm_", "routed ")] = median
    ours = layer["seconds"]["moe_ffn"]["median"]
    used = [layer, *(rows[stage] for stage in order)]
    where = machine_label(name, results)
    start = 0.0
    with picture(path, 7, 3.4) as (_, axes):
        for i, (label, seconds) in enumerate(steps.items()):
            axes.bar(label, seconds * 1e3, bottom=start * 1e3, color=COLOURS[i % len(COLOURS)])
            start += seconds
        axes.bar("moe_ffn\n(whole)", ours * 1e3, color=COLOURS[-2])
        axes.bar("dense FFN", dense * 1e3, color=FAINT)
        axes.axhline(dense * layer["flop_limit"] * 1e3, color=FAINT, linestyle=":", linewidth=1)
        axes.tick_params(axis="x", labelsize=7)
        axes.set(ylabel="ms", title=f"{where}, T={shape['T']}; dotted: dense x FLOP limit")
    words = ", ".join(f"{' '.join(k.split())} {v * 1e3:.3g}" for k, v in steps.items())
    return (f"Stages of one MoE layer, T={shape['T']}, on {where}, {ran(name, results, used)}, "
            f"ms: {words}; sum {start * 1e3:.3g}, moe_ffn {ours * 1e3:.3g}, dense "
            f"{dense * 1e3:.3g}.")  # fmt: skip


def scaling_svg(path: Path, all_results: Results) -> str | None:
    """Time and peak memory of the layer against everything that can grow."""
    if (found := main_machine(all_results, "scaling")) is None:
        return None
    name, results = found
    rows, words = results["scaling"], []
    where = machine_label(name, results)
    with picture(path, 2.3 * len(rows), 4.4, 2, len(rows), squeeze=False) as (figure, grid):
        for (above, below), row in zip(grid.T, rows, strict=True):
            points, varied = row["points"], row["axis"].replace("_", " ")
            values = [p["value"] for p in points]
            for i, contender in enumerate(("moe_ffn", "dense")):
                times = [p["seconds"][contender]["median"] * 1e3 for p in points]
                memory = [p["peak_bytes"][contender] / 2**20 for p in points]
                line = {"marker": "o", "ms": 3, "color": COLOURS[i]}
                above.plot(values, times, label=contender, **line)
                below.plot(values, memory, **line)
            above.set_title(varied)
            for axes in (above, below):
                axes.set_ylim(bottom=0)
                axes.tick_params(labelsize=7)
            first, last = points[0], points[-1]
            memory = ", dense ".join(
                " to ".join(f"{p['peak_bytes'][n] / 2**20:.0f}" for p in (first, last))
                for n in ("moe_ffn", "dense")
            )
            words.append(
                f"{varied} {values[0]:g} to {values[-1]:g}: time {first['ratio_to_dense']:.2f} to "
                f"{last['ratio_to_dense']:.2f} x dense, peak memory {memory} MiB"
            )
        grid[0][0].set_ylabel("ms")
        grid[1][0].set_ylabel("peak MiB")
        grid[0][0].legend(fontsize=7, frameon=False)
        figure.suptitle(where, fontsize=9)
    origin = f"{where}, {ran(name, results, rows)}"
    return f"Time and memory of moe_ffn and dense on {origin}. " + "; ".join(words) + "."


FIGURES: dict[str, tuple[str, Callable[[Path, Results], str | None]]] = {
    "table1.svg": ("Latency and FLOPs of the models", table1_svg),
    "latency_flops.svg": ("Latency against FLOPs", latency_flops_svg),
    "roofline.svg": ("Roofline", roofline_svg),
    "waterfall.svg": ("Where one MoE layer's time goes", waterfall_svg),
    "scaling.svg": ("Scaling", scaling_svg),
}
assert {row.preset for row in TABLE1} >= set(_MODELS)
