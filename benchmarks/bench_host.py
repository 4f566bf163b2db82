"""The host's cost of one `moe_ffn` call: Python and dispatch, with kernels that do nothing.

On a GPU a call must cost the host less than the GPU needs for it, or the GPU waits. `triton`: the
layer's three launches down to the driver, which launches nothing, for one stream of tokens and for
two; `unplanned`: with every launch worked out anew (D2M_TRITON_PLANS=0).
"""

from __future__ import annotations

import pytest
import torch
from harness.no_launch import nothing_launched
from harness.race import summary
from harness.shapes import FFNShape

from d2m_kernels import backends, moe_ffn, route
from d2m_kernels.contract import FFNAttrs

SHAPE = FFNShape(T=16, D=64, S=64, H=16)
TILED = FFNShape(T=64, D=64, S=64, H=64)  # every operand can come by TMA
CALLS = 100  # a round is this many calls: one alone is near the clock's resolution


@pytest.fixture
def noop(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "noop", "harness.noop_backend")
    return "noop"


def call(p, backend):
    return moe_ffn(**p, top_k=SHAPE.K, shared=SHAPE.S, backend=backend)


def record(bench, kind: str, function) -> None:
    rounds = bench.rounds(30, 10)
    bench.benchmark.pedantic(function, rounds=rounds, iterations=CALLS, warmup_rounds=1)
    data = list(bench.benchmark.stats.stats.data)
    host_us = 1e6 * bench.benchmark.stats.stats.median
    bench.add("host", kind, {"pass": kind, "host_us": host_us, "seconds": {"call": summary(data)}},
              line=f"host cost of a call, {kind}: {host_us:.1f} us")  # fmt: skip


def test_host_inference(bench, noop):
    p = SHAPE.tensors("cpu")
    with torch.inference_mode():
        assert call(p, noop).shape == p["x"].shape
        record(bench, "forward", lambda: call(p, noop))


def test_host_training(bench, noop):
    p = SHAPE.tensors("cpu", grad=True)
    dy = torch.ones_like(p["x"])

    def step():
        for t in p.values():
            t.grad = None
        call(p, noop).backward(dy)

    record(bench, "forward_backward", step)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "unplanned"])
def test_host_triton(bench, monkeypatch, streams, planned):
    pytest.importorskip("triton")
    monkeypatch.setenv("D2M_TRITON_CONFIG", "64x64x64w4s4p2tma")  # quick to compile
    monkeypatch.setenv("D2M_TRITON_PLANS", str(int(planned)))
    attrs, tensors = FFNAttrs(TILED.S, "gelu_tanh"), []
    for _ in range(streams):
        p = TILED.tensors("cpu")
        r = route(p["x"], p["router"], top_k=TILED.K, backend="reference")
        tensors += [p["x"], p["w1"], None, p["w2"], None, None, None, r.weights, r.offsets, r.order,
                    r.inverse]  # fmt: skip

    def call():
        return torch.ops.d2m.ffn_fwd.default(tensors, [], "triton", *attrs)

    with nothing_launched(), torch.inference_mode():
        call()
        kind = f"triton_{streams}_streams" + ("" if planned else "_unplanned")
        record(bench, kind, call)
