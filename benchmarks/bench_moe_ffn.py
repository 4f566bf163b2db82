"""`moe_ffn` against the dense FFN it replaces and against its peers, forward and backward."""

from __future__ import annotations

import pytest
import torch
from harness import counting, peer_libraries, peers
from harness.peers import Contender
from harness.shapes import ROUTINGS, FFNShape
from harness.single_ops import all_shapes, shape_for

from d2m_kernels import moe_ffn

# On a CPU seconds add up: three minutes for the default set, ten for --full. {size: {pass: what}}
_ON_A_CPU = {
    "quick": {
        "forward": {("flux-4608", "balanced"), ("flux-4608", "zipf"), ("dit-xl-8", "balanced")},
        "forward_backward": {("flux-4608", "balanced")},
    },
    "default": {
        "forward": {("flux-4608", "balanced"), ("dit-xl-8", "balanced")},
        "forward_backward": {("flux-512", "balanced")},
    },
    "full": {
        "forward": {("flux-4608", routing) for routing in ROUTINGS}
        | {(name, "balanced") for name in ("flux-1536", "flux-512", "dit-xl-1", "dit-xl-8")},
        "forward_backward": {(name, "balanced") for name in ("flux-4608", "flux-1536", "dit-xl-8")},
    },
}


def chosen_shape(bench, kind: str, name: str, routing: str) -> FFNShape:
    """The shape, or a skip where its measurement is not in this size's set."""
    table = _ON_A_CPU.get(bench.size)
    if bench.device.type == "cpu" and table and (name, routing) not in table[kind]:
        pytest.skip(f"not in the {bench.size} set on a CPU")
    return shape_for(name, bench).at(routing=routing)


def contenders(bench, p, shape: FFNShape) -> tuple[dict[str, Contender], dict[str, str]]:
    """Ours first, dense, then every peer that gives the right result; why the others are out."""
    leaves = list(p.values())

    def ours():
        return moe_ffn(**p, top_k=shape.K, shared=shape.S)

    found = {
        "moe_ffn": Contender(ours, leaves=leaves),
        "dense": Contender(lambda: peers.dense(p, shape), same="other", leaves=leaves),
        "torch grouped_mm": Contender(lambda: peers.grouped_mm(p, shape), leaves=leaves),
        "expert loop": Contender(lambda: peers.expert_loop(p, shape), leaves=leaves),
    }
    libraries, missing = peer_libraries.installed(p, shape)
    # On a CPU the compiler takes half a minute and oneDNN does the work in either case.
    if bench.device.type == "cuda" or (bench.size == "full" and shape.T == 1536):
        libraries["dense compiled"] = peers.compiled_dense(p, shape)
    found |= libraries
    right = {}
    with torch.no_grad():
        truth = {kind: peers.expert_loop(p, shape, kind == "bias") for kind in ("bias", "no bias")}
        for name, contender in found.items():
            problem = check(contender, truth)
            if problem and name in ("moe_ffn", "torch grouped_mm"):
                raise AssertionError(f"{name}: {problem}")
            if problem:
                missing[name] = problem
            else:
                right[name] = contender
    return right, missing


def check(contender: Contender, truth: dict) -> str | None:
    """What is wrong with a contender's result: timings of a wrong result are worth nothing."""
    try:
        got = contender.run()
    except Exception as error:  # noqa: BLE001 (a library's failure is an answer)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if contender.same == "other":
        return None if got.isfinite().all() else "its result is not finite"
    error = peers.rms_error(got, truth[contender.same])
    return None if error < 0.02 else f"its result is off by {error:.2g} of the RMS"


def record(bench, kind, name, shape, race, found, missing, counts, extra):
    """One entry of "layers": ratios to dense, the faster of eager and compiled."""
    baseline = min((n for n in ("dense", "dense compiled") if n in race.times), key=race.median)
    passes = 1 if kind == "forward" else 3
    weights = 2 * shape.D * shape.F + 2 * shape.T * shape.D
    rates = bench.against_ceilings(
        race.median("moe_ffn"), shape.gflop(shape.activated) * passes, shape.gbyte(weights) * passes
    )
    others = [n for n in race.times if n != baseline]
    limit = shape.activated / shape.F
    bench.add(
        "layers",
        f"moe_ffn/{kind}/{name}/{shape.routing}",
        {
            "name": name,
            "shape": shape.to_json(),
            "pass": kind,
            "seconds": race.to_json(),
            "baseline": baseline,
            "ratio_to_dense": {n: race.ratio(n, baseline) for n in others},
            "ratio_quartiles": {n: race.spread(n, baseline) for n in others},
            "flop_limit": limit,
            "dense_tflops": shape.gflop(shape.F) * passes * 1e-3 / race.median(baseline),
            **rates,
            **counts,
            **extra,
            "notes": {n: c.note for n, c in found.items() if c.note},
            "unavailable": missing,
            "backend": bench.backend(shape.dtype),
        },
    )
    bench.note(f"moe_ffn {kind} {name} {shape.routing}: {shape}; limit {limit:.3f} x {baseline}")
    for n in sorted(others, key=race.median):
        low, high = race.spread(n, baseline)
        ratio = race.ratio(n, baseline)
        bench.note(f"    {n:<24} {ratio:.3f} x dense  ({low:.3f}-{high:.3f})  "
                   f"{race.median(n) * 1e3:9.3f} ms")  # fmt: skip


@all_shapes
@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward(bench, name, routing):
    shape = chosen_shape(bench, "forward", name, routing)
    p = shape.tensors(bench.device)
    with torch.inference_mode():
        found, missing = contenders(bench, p, shape)
        runs = {n: c.run for n, c in found.items()}
        headline = name == "flux-4608" and routing == "balanced"
        budget = bench.seconds(9, 120 if headline else 15)
        race = bench.race(runs, "moe_ffn", bench.rounds(15), budget=budget)
        counts = bench.count(runs["moe_ffn"])
        extra = costs(bench, runs)
    record(bench, "forward", name, shape, race, found, missing, counts, extra)


@all_shapes
@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_backward(bench, name, routing):
    shape = chosen_shape(bench, "forward_backward", name, routing)
    p = shape.tensors(bench.device, grad=True)
    dy = torch.randn_like(p["x"])
    found, missing = contenders(bench, p, shape)

    def step(contender):
        def run():
            for t in contender.leaves:
                t.grad = None
            contender.run().backward(dy)

        return run

    runs = {n: step(c) for n, c in found.items()}
    for name_, run in list(runs.items()):
        try:
            run()
        except Exception as error:  # noqa: BLE001 (a library's failure is an answer)
            if name_ in ("moe_ffn", "dense"):
                raise
            missing[name_] = f"backward: {' '.join(str(error).split())[:200]}"
            del runs[name_]
    race = bench.race(runs, "moe_ffn", bench.rounds(7, 3), budget=bench.seconds(5, 20))
    # Counted without gradients of an earlier step, whose memory a step frees on its way.
    for contender in found.values():
        for t in contender.leaves:
            t.grad = None

    def gradients(contender):
        return lambda: torch.autograd.grad(contender.run(), contender.leaves, dy, allow_unused=True)

    single = {n: gradients(found[n]) for n in runs}
    counts = bench.count(single["moe_ffn"])
    extra = costs(bench, single)
    extra["saved_bytes_of"] = {n: counting.saved_bytes(c.run, c.leaves)
                               for n, c in found.items() if n in runs}  # fmt: skip
    record(bench, "forward_backward", name, shape, race, found, missing, counts, extra)


def costs(bench, runs) -> dict:
    """Peak bytes, launches and host syncs of every contender.

    On a CPU of ours and dense alone: the profiler is slow there, and code that Dynamo meets while
    operators are counted it never compiles again.
    """
    names = runs if bench.device.type == "cuda" else ("moe_ffn", "dense")
    return {
        "peak_bytes_of": {n: counting.peak_bytes(runs[n], bench.device) for n in names},
        "counts_of": {n: counting.launches_and_syncs(runs[n], bench.device) for n in names},
    }
