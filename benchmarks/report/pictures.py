"""The report's pictures of benchmark results, one PNG each, and what they show in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from report import roofline
from report.paper import TABLE1
from report.read import Results, ceilings_of, machine_label, ran, run_id
from report.tables import how_measured

from distill.study.pictures import COLOURS, FAINT, _pyplot, _save

_MODELS = {"flux-moe-l": "L", "flux-moe-m": "M", "flux-moe-s": "S", "flux-moe-xs": "XS"}


def main_machine(all_results: Results, section: str) -> tuple[str, Mapping[str, Any]] | None:
    """The first machine (GPUs come first) that has something in a section."""
    return next(((n, r) for n, r in all_results.items() if r[section]), None)


def _ratios(all_results: Results) -> dict[str, dict[str, tuple[float, float]]]:
    """{source and run: {model: (FLOPs ratio, latency ratio)}}, the paper first."""
    paper = {}
    for preset in _MODELS:
        known = roofline.paper_ratio(preset)
        paper[preset] = (known["flops_ratio"], known["latency_ratio"])
    found = {"paper, H20": paper}
    for name, results in all_results.items():
        models = {p: results["models"].get(p, {}) for p in _MODELS}
        rows = {p: (m["flops_ratio"], m["latency_ratio"])
                for p, m in models.items() if "latency_ratio" in m}  # fmt: skip
        if rows:
            run = ran(name, results, (models[p] for p in rows))
            label = f"ours, {machine_label(name, results)}, {how_measured(results)}"
            found[f"{label},\n{run}"] = rows  # two lines of a legend
    return found


def _line(text: str) -> str:
    return " ".join(text.split())


def table1_png(path: Path, all_results: Results) -> str:
    """Latency and FLOPs of L, M, S, XS relative to dense, the paper's and ours."""
    plt = _pyplot()
    sources = _ratios(all_results)
    flops = {p: roofline.work_ratio(p) for p in _MODELS}
    figure, axes = plt.subplots(figsize=(7, 3.2))
    width = 0.8 / (len(sources) + 1)
    at = range(len(_MODELS))
    axes.bar([i - 0.4 + width / 2 for i in at], flops.values(), width, color=FAINT,
             label="FLOPs (full attention, 1024x1024)")  # fmt: skip
    for s, (source, rows) in enumerate(sources.items(), 1):
        x = [i - 0.4 + (s + 0.5) * width for i, p in enumerate(_MODELS) if p in rows]
        axes.bar(x, [rows[p][1] for p in _MODELS if p in rows], width, label=f"latency, {source}",
                 color=COLOURS[s - 1])  # fmt: skip
    axes.set_xticks(list(at), [f"MoE-{letter}" for letter in _MODELS.values()])
    axes.set_ylabel("relative to dense")
    axes.axhline(1, color=FAINT, linewidth=0.8)
    axes.set_ylim(0, 1.05 + 0.17 * len(sources))
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    _save(plt, figure, path)
    words = [
        f"{_line(source)}: " + ", ".join(f"{_MODELS[p]} {r[1]:.2f}" for p, r in rows.items())
        for source, rows in sources.items()
    ]
    return "Bars of latency relative to dense. " + "; ".join(words) + "."


def latency_flops_png(path: Path, all_results: Results) -> str:
    """Latency ratio against FLOPs ratio; on the line, latency falls as far as the FLOPs."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5, 4))
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, label="latency = FLOPs")
    words = []
    for i, (source, rows) in enumerate(_ratios(all_results).items()):
        xs, ys = zip(*rows.values(), strict=True)
        axes.scatter([*xs, 1], [*ys, 1], color=COLOURS[i], label=source, zorder=3)
        for preset, (x, y) in rows.items() if i == 0 else ():  # same models, same FLOPs
            axes.annotate(_MODELS[preset], (x, y), textcoords="offset points", xytext=(7, -3))
        ratios = ", ".join(f"{_MODELS[p]} {y / x:.2f}" for p, (x, y) in rows.items())
        words.append(f"{_line(source)}: {ratios}")
    axes.set_xlabel("FLOPs / dense")
    axes.set_ylabel("latency / dense")
    axes.set_xlim(0.2, 1.05)
    axes.set_ylim(0.2, 1.15)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    _save(plt, figure, path)
    return "Latency ratio over FLOPs ratio, 1 is ideal. " + "; ".join(words) + "."


def roofline_png(path: Path, all_results: Results) -> str | None:
    """Stages and layers under the ceilings measured on the same machine."""
    found = main_machine(all_results, "stages")
    if found is None:
        return None
    name, results = found
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 4))
    shown = [row for row in results["stages"] if row["gflop"] > 0]
    shown += [row for row in results["layers"] if row["pass"] == "forward"]
    tops = {run_id(name, results, row): ceilings_of(results, row) for row in shown}
    for run, top in sorted(tops.items()):  # a stage is under its own run's ceilings
        knee = top["tflops"] * 1e3 / top["gbps"]
        xs = [0.1, knee, 1e4]
        axes.plot(xs, [min(top["tflops"], x * top["gbps"] * 1e-3) for x in xs], color=FAINT,
                  label=f"ceilings measured in run {run}")  # fmt: skip
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in shown:
        point = (row["gflop"] / row["gbyte"], row["tflops"])
        kinds.setdefault(row.get("stage", "moe_ffn"), []).append(point)
    for i, (kind, points) in enumerate(kinds.items()):
        axes.scatter(*zip(*points, strict=True), label=kind, color=COLOURS[i % len(COLOURS)], s=18)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("TFLOP/s")
    where = f"{machine_label(name, results)}, {ran(name, results, shown)}"
    axes.set_title(where)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    _save(plt, figure, path)
    best = {k: max(p[1] for p in points) for k, points in kinds.items()}
    words = ", ".join(f"{k} {v:.3g}" for k, v in best.items())
    limits = ", ".join(f"{top['tflops']:.3g} TFLOP/s and {top['gbps']:.3g} GB/s ({run})"
                       for run, top in sorted(tops.items()))  # fmt: skip
    return f"Roofline of {where}; ceilings {limits}; best TFLOP/s: {words}."


def waterfall_png(path: Path, all_results: Results) -> str | None:
    """One MoE layer as the sum of its stages run alone, beside moe_ffn and dense."""
    found = main_machine(all_results, "layers")
    if found is None:
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
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.4))
    start = 0.0
    for i, (label, seconds) in enumerate(steps.items()):
        axes.bar(label, seconds * 1e3, bottom=start * 1e3, color=COLOURS[i % len(COLOURS)])
        start += seconds
    ours = layer["seconds"]["moe_ffn"]["median"]
    axes.bar("moe_ffn\n(whole)", ours * 1e3, color=COLOURS[-2])
    axes.bar("dense FFN", dense * 1e3, color=FAINT)
    axes.axhline(dense * layer["flop_limit"] * 1e3, color=FAINT, linestyle=":", linewidth=1)
    axes.set_ylabel("ms")
    axes.tick_params(axis="x", labelsize=7)
    used = [layer, *(rows[stage] for stage in order)]
    where = f"{machine_label(name, results)}, {ran(name, results, used)}"
    axes.set_title(f"{where}, T={shape['T']}; dotted: dense x FLOP limit")
    figure.tight_layout()
    _save(plt, figure, path)
    words = ", ".join(f"{' '.join(k.split())} {v * 1e3:.3g}" for k, v in steps.items())
    return (f"Stages of one MoE layer, T={shape['T']}, on {where}, ms: {words}; sum "
            f"{start * 1e3:.3g}, moe_ffn {ours * 1e3:.3g}, dense {dense * 1e3:.3g}.")  # fmt: skip


def scaling_png(path: Path, all_results: Results) -> str | None:
    """Time and peak memory of the layer against everything that can grow."""
    found = main_machine(all_results, "scaling")
    if found is None:
        return None
    name, results = found
    plt = _pyplot()
    axes_rows = results["scaling"]
    figure, grid = plt.subplots(2, len(axes_rows), figsize=(2.3 * len(axes_rows), 4.4),
                                squeeze=False)  # fmt: skip
    words = []
    for column, row in enumerate(axes_rows):
        values = [p["value"] for p in row["points"]]
        for i, contender in enumerate(("moe_ffn", "dense")):
            times = [p["seconds"][contender]["median"] * 1e3 for p in row["points"]]
            memory = [p["peak_bytes"][contender] / 2**20 for p in row["points"]]
            grid[0][column].plot(values, times, marker="o", ms=3, color=COLOURS[i], label=contender)
            grid[1][column].plot(values, memory, marker="o", ms=3, color=COLOURS[i])
        grid[0][column].set_title(row["axis"].replace("_", " "))
        for axes in (grid[0][column], grid[1][column]):
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
        ratios = [p["ratio_to_dense"] for p in row["points"]]
        first, last = (row["points"][i]["peak_bytes"] for i in (0, -1))
        memory = ", dense ".join(f"{first[n] / 2**20:.0f} to {last[n] / 2**20:.0f}"
                                 for n in ("moe_ffn", "dense"))  # fmt: skip
        words.append(
            f"{row['axis'].replace('_', ' ')} {values[0]:g} to {values[-1]:g}: time "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f} x dense, peak memory {memory} MiB"
        )
    grid[0][0].set_ylabel("ms")
    grid[1][0].set_ylabel("peak MiB")
    grid[0][0].legend(fontsize=7, frameon=False)
    where = f"{machine_label(name, results)}, {ran(name, results, axes_rows)}"
    figure.suptitle(where, fontsize=9)
    figure.tight_layout()
    _save(plt, figure, path)
    return f"Time and memory of moe_ffn and dense on {where}. " + "; ".join(words) + "."


FIGURES: dict[str, tuple[str, Callable[[Path, Results], str | None]]] = {
    "table1.png": ("Latency and FLOPs of the models", table1_png),
    "latency_flops.png": ("Does latency fall as far as the FLOPs?", latency_flops_png),
    "roofline.png": ("Roofline", roofline_png),
    "waterfall.png": ("Where one MoE layer's time goes", waterfall_png),
    "scaling.png": ("Scaling", scaling_png),
}
assert {row.preset for row in TABLE1} >= set(_MODELS)
