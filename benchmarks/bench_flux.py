"""Whole FLUX.1-shaped models with random weights: dense, L, M, S, XS (Table 1 of the paper).

Every model runs beside dense in one process, in three modes: eager, regional compile
(`compile_repeated_blocks`), and a CUDA graph of a whole compiled step (of an eager one where it
cannot be compiled). Needs about 60 GB of GPU memory; on a CPU only a rehearsal (--tiny) runs, and
bench_blocks.py composes the ratios instead.
"""

from __future__ import annotations

import pytest
import torch
from harness.counting import launches_and_syncs, peak_bytes
from harness.flux_models import WRONG, Model, error_to_reference
from harness.needs import skip, skip_without
from harness.parts import split
from report.roofline import ideal

NEEDED_GB = 60
STEPS = (28, 8)
MODES = ("eager", "compile", "graphs")
DETAILS = ("seconds", "ratio_quartiles", "ratio_rounds")  # of a mode, not put up front


PRESETS = ("flux-moe-l", "flux-moe-s", "flux-moe-xs", "flux-moe-m")  # the most telling first


@pytest.fixture(scope="module")
def dense(session):
    """The dense model, its inputs, and what was measured of it so far; or a skip."""
    skip_without(session, ["diffusers"], PRESETS)
    if session.size != "tiny":
        if session.device.type != "cuda":
            pytest.skip("needs a GPU; bench_blocks.py composes the ratios on a CPU")
        free, _ = torch.cuda.mem_get_info(session.device)
        if free < NEEDED_GB * 1e9:
            why = f"needs {NEEDED_GB} GB of free GPU memory, there are {free / 1e9:.0f}"
            skip(session, why, PRESETS)
    return Model("flux-dense", session)


@pytest.mark.parametrize("preset", PRESETS)
def test_model(bench, dense, preset):
    # Every block of every model shares two compiled graphs; the limit is on variants of one code.
    torch._dynamo.config.recompile_limit = 64
    student = Model(preset, bench.session)
    student.error = error_to_reference(student.model, student.step)
    races = run_modes(bench, dense, student)
    if races:
        bench.show(races[-1], student.name)
    error, structure = student.error, student.model.d2m_config
    del student
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    assert races, "no mode could be measured"
    assert structure.mob is not None or error < WRONG


def run_modes(bench, dense, student) -> list:
    """Measures and publishes mode after mode; one that fails keeps what it had measured."""
    races: list = []
    with torch.inference_mode():
        for mode in MODES:
            try:
                measure(bench, dense, student, mode, races)
            except Exception as error:  # noqa: BLE001
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                entry = student.record["modes"].setdefault(mode, {})
                entry["incomplete" if "step_seconds" in entry else "unavailable"] = text
            for model in (dense, student):
                publish(bench, dense, model)
    for model in (dense, student):
        model.uncompile()
    return races


def measure(bench, dense, student, mode, races) -> None:
    """One mode of both models: step latency side by side, whole images, memory, dense's parts.

    What matters most is recorded first, so that a failure later on loses only the rest.
    """
    models = (dense, student)
    compiled = mode == "compile"
    if compiled:
        for model in models:
            model.compile()
    replays = {}
    if mode == "graphs":
        compiled = "step_seconds" in student.record["modes"].get("compile", {})
        if not compiled:
            for model in models:
                model.uncompile()
        replays = {m.name: m.graph() for m in (student, dense)}
    race = bench.race({m.name: replays.get(m.name, m.step) for m in models}, None,
                      bench.rounds(9, 3), budget=15)  # fmt: skip
    races.append(race)
    for model in models:
        entry = model.record["modes"].setdefault(mode, {})
        entry["step_seconds"] = race.median(model.name)
        entry["seconds"] = race.to_json()[model.name]
        if mode == "graphs":
            entry["captured"] = "compile" if compiled else "eager"
    entry = student.record["modes"][mode]
    entry["latency_ratio"] = race.ratio(student.name, dense.name)
    entry["ratio_quartiles"] = race.spread(student.name, dense.name)
    entry["ratio_rounds"] = race.ratios(student.name, dense.name)
    parts = parts_of(bench, dense, mode, "compile" if compiled else "eager")
    if parts is not None:
        entry["ideal_seconds"] = ideal(parts, dense.work, student.work)
        entry["latency_over_ideal"] = entry["step_seconds"] / entry["ideal_seconds"]
    for model in models:
        complete(bench, model, mode, replays.get(model.name))


def parts_of(bench, dense, mode, code) -> dict[str, float] | None:
    """Dense's parts in a mode that runs compiled or eager code; None where that was not measured.

    A graph has its code's parts; it changes only what "rest" loses in launch gaps.
    """
    entry = dense.record["modes"].get(code)
    if entry is None:
        return None
    if "parts" not in entry:
        dim = dense.model.inner_dim
        entry["parts"] = split(dense.step, entry["step_seconds"], bench.device, dim)
    parts = dict(entry["parts"])
    if mode == "graphs":
        total = dense.record["modes"][mode]["step_seconds"]
        parts["rest"] = max(0.0, total - sum(parts.values()) + parts["rest"])
    return parts


def complete(bench, model, mode, replay) -> None:
    """Whole images, memory and counts of a model in a mode; once, as dense runs beside several."""
    entry = model.record["modes"][mode]
    if "image_seconds" not in entry:
        entry["image_seconds"] = {str(n): model.image_seconds(n, replay) for n in STEPS}
    if "peak_bytes" in entry:
        return
    if replay is not None:
        entry["peak_bytes"] = model.bytes + model.graph_bytes
        return
    entry["peak_bytes"] = model.bytes + peak_bytes(model.step, bench.device)
    # On a CPU operators are counted under a dispatch mode, and code that Dynamo has once met
    # under such a mode it never compiles again.
    if mode == "eager" or bench.device.type == "cuda":
        entry |= launches_and_syncs(model.step, bench.device)


def publish(bench, dense, model) -> None:
    """The model's entry: the regional-compile mode up front, or the best that there is."""
    counts, modes = model.account, model.record["modes"]
    measured = {m: e for m, e in modes.items() if "step_seconds" in e}
    if not measured:
        return
    mode = next(m for m in ("compile", "eager", "graphs") if m in measured)
    front = measured[mode]
    record = {
        "mode": mode,
        "image_tokens": model.image,
        "text_tokens": model.text,
        "flops": counts.flops,
        "total_params": counts.total_params,
        "activated_params": counts.activated_params,
        "activated_params_paper": counts.activated_params_paper,
        "model_bytes": model.bytes,
        "error_to_reference": model.error,
        "modes": modes,
        "backend": bench.backend(),
        "attention": bench.session.attention or "diffusers' default",
        **{k: v for k, v in front.items() if k not in DETAILS},
    }
    if model is dense:
        record |= {"latency_ratio": 1.0, "flops_ratio": 1.0}
    elif "latency_ratio" in front:
        record["flops_ratio"] = counts.flops / dense.account.flops
        record["latency_over_flops"] = front["latency_ratio"] / record["flops_ratio"]
    bench.model(model.name, record)
