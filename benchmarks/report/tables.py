"""Tables of measured results beside the paper's, for the report and the Markdown pages.

A table is (header, rows of text); results files are those of benchmarks/ (schema:
benchmarks/README.md). Every measured number names the machine, every predicted one says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from report import roofline
from report.layers import layers, peers, scaling, stages, unavailable
from report.read import (
    Results,
    Table,
    ceilings_of,
    config_of,
    machine_label,
    origin_cells,
    peer_rows,
    ran,
    rows_of,
    run_id,
    run_ids,
)

from distill.evaluate.paper import DENSE, TABLE1


def how_measured(results: Mapping[str, Any]) -> str:
    """Mode and tokens of a machine's models, e.g. "composed, 1024 + 512 tokens"."""
    model = next(iter(results["models"].values()))
    return f"{model['mode']}, {model['image_tokens']} + {model['text_tokens']} tokens"


def calibrations(all_results: Results) -> list[roofline.Calibration]:
    """One a machine that has dense's parts and a layer measured, GPUs first."""
    return [c for results in all_results.values() if (c := roofline.calibrate(results))]


def table1(all_results: Results) -> Table:
    """The paper's Table 1 (cost columns), our counts, measurements and predictions."""
    header = ["model", "steps", "paper: activated B", "paper: TFLOP", "paper: H20 s",
              "ours: total B", "activated B (paper's count)", "TFLOP (full attention)",
              "FLOPs / dense", "paper: latency/FLOPs"]  # fmt: skip
    measured = {n: r for n, r in all_results.items() if r["models"]}
    for name, results in measured.items():
        label = machine_label(name, results)
        header += [f"{label}, {how_measured(results)}: latency / dense",
                   f"{label}: latency/FLOPs", f"{label}: latency/ideal"]  # fmt: skip
        if any("image_seconds" in m for m in results["models"].values()):
            header.append(f"{label}: s an image")
    best = next(iter(calibrations(all_results)), None)
    predicted = [] if best is None else unmeasured(all_results)
    header += [_predicted_header(machine, best) for machine in predicted]
    dense = roofline.account_of("flux-dense")
    rows = []
    for row in TABLE1:
        counts, paper = roofline.account_of(row.preset), roofline.paper_ratio(row.preset)
        cells = [row.name, str(row.nfe), f"{row.activated_b:.2f}", f"{row.flops_t:.1f}",
                 f"{row.latency_s:.2f}", f"{counts.total_params / 1e9:.2f}",
                 f"{counts.activated_params / 1e9:.2f} ({counts.activated_params_paper / 1e9:.2f})",
                 f"{counts.flops / 1e12:.1f}", f"{counts.flops / dense.flops:.3f}",
                 f"{paper['latency_over_flops']:.2f}"]  # fmt: skip
        for results in measured.values():
            cells += _measured_cells(row, results)
        cells += [_predicted_cell(row, machine, best) for machine in predicted]
        rows.append(cells)
    return header, rows


def unmeasured(all_results: Results) -> list[roofline.Machine]:
    """Of the machines that are predicted, those on which no model was measured."""
    devices = [r["environment"]["device"] for r in all_results.values() if r["models"]]
    return [
        machine
        for machine in (roofline.H20, roofline.A100)
        if not any(re.search(rf"\b{machine.name}\b", device) for device in devices)
    ]


def _predicted_header(machine: roofline.Machine, c: roofline.Calibration) -> str:
    if machine is roofline.H20:
        return f"H20 s, predicted from {c.source} and the paper's dense row"
    what = "s" if c.source != roofline.A_CPU else "latency / dense"
    return f"{machine.name} {what}, predicted from {c.source}"


def _predicted_cell(row: Any, machine: roofline.Machine, c: roofline.Calibration) -> str:
    """Seconds of an image, or what of it can be predicted.

    Ratios travel better between machines than seconds: where dense is known (the paper's H20) the
    ratio to it is predicted, and from a CPU to another GPU nothing but the ratio.
    """
    if machine is not roofline.H20 and c.source != roofline.A_CPU:
        return f"{row.nfe * roofline.predict(row.preset, machine, c):.2f}"
    if row.preset == "flux-dense":
        return ""
    ratio = roofline.predict_ratio(row.preset, machine, c)
    if machine is not roofline.H20:
        return f"{ratio:.3f}"
    return f"{row.nfe * DENSE.latency_s / DENSE.nfe * ratio:.2f}"


def _measured_cells(row: Any, results: Mapping[str, Any]) -> list[str]:
    model = results["models"].get(row.preset, {})
    keys = ("latency_ratio", "latency_over_flops", "latency_over_ideal")
    cells = [_number(model, key) for key in keys]
    if any("image_seconds" in m for m in results["models"].values()):
        cells.append(_number(model.get("image_seconds", {}), str(row.nfe), 2))
    return cells


def blocks(all_results: Results) -> Table:
    """One FLUX block of each kind, dense and MoE."""
    header = ["machine", "block", "tokens", "dense ms", "MoE / dense", "dense's attention",
              "FFN", "other GEMMs", "AdaLN", "rest", "back-end", "config", "run"]  # fmt: skip
    rows = []
    for machine, row, origin in rows_of(all_results, "blocks"):
        dense = row["seconds"]["dense"]["median"] * 1e3
        rows.append([machine, row["kind"], f"{row['image_tokens']} + {row['text_tokens']}",
                     f"{dense:.1f}", f"{row['ratio_to_dense']:.3f}",
                     *_shares(row["dense_parts"]), *origin])  # fmt: skip
    return header, rows


def _shares(parts: Mapping[str, float]) -> list[str]:
    total = sum(parts.values())
    return [f"{parts[p] / total:.0%}" for p in roofline.PARTS]


def dense_parts(all_results: Results) -> Table:
    """Where the dense model's step goes, in every mode that was measured."""
    header = ["machine", "mode", "step ms", "attention", "FFN", "other GEMMs", "AdaLN",
              "rest", "run"]  # fmt: skip
    rows = []
    for name, results in all_results.items():
        dense = results["models"].get("flux-dense", {})
        for mode, entry in _modes(dense):
            if "parts" in entry:
                parts = entry["parts"]
                rows.append([machine_label(name, results), mode, _ms(sum(parts.values())),
                             *_shares(parts), run_id(name, results, dense)])  # fmt: skip
    return header, rows


def _modes(model: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Every mode of a model with what was measured in it; of older records the only one."""
    return (model.get("modes") or {model.get("mode"): model}).items()


def models(all_results: Results) -> Table:
    """Every mode of every whole model that was measured."""
    header = ["machine", "model", "mode", "step ms", "latency / dense", "latency/ideal",
              "28 steps s", "8 steps s", "peak GiB", "launches", "host syncs", "back-end",
              "config", "attention", "run"]  # fmt: skip
    rows = []
    for name, results in all_results.items():
        for model, record in results["models"].items():
            for mode, entry in _modes(record):
                if "step_seconds" not in entry:
                    continue
                if "captured" in entry:
                    mode = f"{mode} of {entry['captured']} code"
                images, peak = entry.get("image_seconds", {}), entry.get("peak_bytes")
                backend, config, run = origin_cells(name, results, record)
                rows.append([
                    machine_label(name, results), model, mode,
                    _ms(entry["step_seconds"]),
                    _number(entry, "latency_ratio"), _number(entry, "latency_over_ideal"),
                    _number(images, "28", 2), _number(images, "8", 2),
                    "" if peak is None else f"{peak / 2**30:.1f}",
                    str(entry.get("launches", "")), str(entry.get("host_syncs", "")),
                    backend, config, str(record.get("attention") or ""), run,
                ])  # fmt: skip
    return header, rows


def _ms(seconds: float) -> str:
    """Milliseconds, four digits or all before the point."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 1e4 else f"{ms:.4g}"


def _number(entry: Mapping[str, Any], key: str, digits: int = 3) -> str:
    return f"{entry[key]:.{digits}f}" if key in entry else ""


def prediction_error(all_results: Results) -> Table:
    """The roofline against the paper's H20 rows and every machine measured."""
    header = ["calibrated on", "machine", "what", "predicted", "known", "error", "note"]
    return header, [
        [e["calibrated_on"], e["machine"], e["what"], f"{e['predicted']:.3g}",
         f"{e['known']:.3g}", f"{e['error']:+.0%}", e["note"]]
        for calibration in calibrations(all_results)
        for e in roofline.error_rows(calibration, all_results)
    ]  # fmt: skip


def distillation(all_results: Results) -> Table:
    header = ["machine", "what", "batch", "samples/s", "peak MiB beyond the weights", "back-end",
              "config", "run"]  # fmt: skip
    rows = [
        [machine, row["id"], str(row["batch"]), f"{row['samples_per_second']:.3g}",
         f"{row['peak_bytes'] / 2**20:.0f}", *origin]
        for machine, row, origin in rows_of(all_results, "distillation")
    ]  # fmt: skip
    return header, rows


def environments(all_results: Results) -> Table:
    """Where every number comes from."""
    header = ["run", "machine", "date", "commit", "size", "driver", "clocks MHz", "torch", "triton",
              "CUDA", "ceiling TFLOP/s", "ceiling GB/s", "pins"]  # fmt: skip
    rows = []
    for name, results in all_results.items():
        for run, short in run_ids(name, results).items():
            env, top = results["runs"][run], ceilings_of(results, {"run": run})
            clocks = f"{env['sm_mhz']} / {env['memory_mhz']}" if "sm_mhz" in env else ""
            pins = " ".join(f"{k}={v}" for k, v in env.get("pins", {}).items())
            rows.append([short, machine_label(name, results), env["date"], str(env["commit"]),
                         env.get("size", ""), env.get("driver", ""), clocks, env["torch"],
                         env["triton"] or "none", env["cuda"] or "none", f"{top['tflops']:.3g}",
                         f"{top['gbps']:.3g}", pins])  # fmt: skip
    return header, rows


def _model_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records behind measured and predicted models."""
    return [*results["models"].values(), *(roofline.calibrating(results) or ())]


# Tables too compact for a column of runs: the records that they show.
_SHOWN = {"peers": peer_rows, "table1": _model_rows, "prediction-error": _model_rows}


def origin(table: str, all_results: Results) -> str:
    """One line for a table whose rows do not name their run: which runs, with what."""
    lines = []
    for name, results in all_results.items():
        records = list(_SHOWN[table](results)) if table in _SHOWN else []
        for run, env in sorted(results["runs"].items()):
            if own := [row for row in records if row["run"] == run]:
                tiles = ", ".join(sorted({config_of(row) for row in own} - {""}))
                lines.append(f"{machine_label(name, results)}: {ran(name, results, own)}"
                             f"{f' ({tiles})' if tiles else ''}, commit {env['commit']}, "
                             f"{env['date'][:10]}, torch {env['torch']}.")  # fmt: skip
    return " ".join(lines)


TABLES = {
    table.__name__.replace("_", "-"): table
    for table in (table1, peers, layers, stages, scaling, blocks, models, dense_parts,
                  prediction_error, distillation, unavailable, environments)
}  # fmt: skip


def filled(table: Table) -> Table:
    """The table without the columns that have no entry."""
    header, rows = table
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in keep], [[row[i] for i in keep] for row in rows]


def markdown(table: Table) -> str:
    """GitHub's tables; a column without any entry is left out."""
    header, rows = filled(table)
    if not rows:
        return "Nothing measured yet.\n"
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
