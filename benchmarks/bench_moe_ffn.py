"""`moe_ffn` against the dense FFN it replaces and against its peers, forward and backward."""

from __future__ import annotations

import peers
import pytest
import torch
from race import describe, race_with
from shapes import dit_xl, flux

from d2m_kernels import backends, moe_ffn


def ours(p, shape):
    return moe_ffn(p["x"], p["router"], p["w1"], p["w2"], p["b1"], p["b2"], top_k=shape.K,
                   shared=shape.S)  # fmt: skip


def contenders(p, shape, hidream=True) -> dict:
    functions = {
        "moe_ffn": lambda: ours(p, shape),
        "dense": lambda: peers.dense(p, shape),
        "torch grouped_mm": lambda: peers.grouped_mm(p, shape),
        "expert loop": lambda: peers.expert_loop(p, shape),
    }
    layer = peers.hidream(p, shape) if hidream else None
    if layer is not None:
        layer.eval()
        functions["diffusers HiDream"] = lambda: layer(p["x"][None])
    return functions


def check(p, shape):
    """Timings of a wrong result are worth nothing: ours and the peers agree within bf16."""
    got, loop, mm = (f(p, shape).float() for f in (ours, peers.expert_loop, peers.grouped_mm))
    rms = loop.square().mean().sqrt()
    assert (got - loop).square().mean().sqrt() < 0.02 * rms
    assert (mm - loop).square().mean().sqrt() < 0.02 * rms


def report(benchmark, race, shape, name, passes):
    """Ratios to dense of every contender; bytes: each weight, x and y once (forward)."""
    activated = shape.activated
    others = [n for n in race.times if n != "dense"]
    describe(
        benchmark, shape=str(shape), gflop=shape.gflop(activated) * passes,
        gbyte=shape.gbyte(2 * shape.D * shape.F, 2 * shape.T * shape.D) * passes,
        race=race, name=name,
        backend=backends.resolve(None, "cuda" if torch.cuda.is_available() else "cpu", shape.dtype),
        ratio_to_dense={n: round(race.ratio(n, "dense"), 4) for n in others},
        ratio_quartiles={n: [round(q, 4) for q in race.spread(n, "dense")] for n in others},
        median_seconds={n: race.median(n) for n in race.times},
        flop_limit=round(activated / shape.F, 4),
    )  # fmt: skip


@pytest.mark.parametrize("make", [flux, dit_xl])
def test_forward(benchmark, device, quick, make):
    shape = make(quick)
    p = shape.tensors(device)
    with torch.inference_mode():
        check(p, shape)
        race = race_with(benchmark, "moe_ffn", contenders(p, shape), 5 if quick else 15, device)
    report(benchmark, race, shape, "moe_ffn", 1)


def test_forward_backward(benchmark, device, quick):
    shape = flux(quick)
    p = shape.tensors(device, grad=True)
    dy = torch.randn_like(p["x"])

    def step(function):
        def run():
            for t in p.values():
                t.grad = None
            function().backward(dy)

        return run

    forward = contenders(p, shape, hidream=False)  # its training path repeats every token
    race = race_with(
        benchmark, "moe_ffn", {n: step(f) for n, f in forward.items()}, 3 if quick else 5, device
    )
    report(benchmark, race, shape, "moe_ffn", 3)
