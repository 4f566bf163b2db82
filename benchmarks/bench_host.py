"""The host's cost of one `moe_ffn` call: Python and dispatch, with kernels that do nothing.

On a GPU a call must cost the host less than the GPU needs for it, or the GPU waits.
"""

from __future__ import annotations

import pytest
import torch
from shapes import FFNShape

from d2m_kernels import backends, moe_ffn

SHAPE = FFNShape(T=16, D=64, S=64, H=16)


@pytest.fixture
def noop(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "noop", "noop_backend")
    return "noop"


def call(p, backend):
    return moe_ffn(p["x"], p["router"], p["w1"], p["w2"], p["b1"], p["b2"], top_k=SHAPE.K,
                   shared=SHAPE.S, backend=backend)  # fmt: skip


def test_host_inference(benchmark, noop, quick):
    p = SHAPE.tensors("cpu")
    with torch.inference_mode():
        assert call(p, noop).shape == p["x"].shape
        benchmark.pedantic(call, (p, noop), rounds=200 if quick else 2000, warmup_rounds=50)
    benchmark.extra_info["host_us"] = round(benchmark.stats.stats.median * 1e6, 2)


def test_host_training(benchmark, noop, quick):
    p = SHAPE.tensors("cpu", grad=True)
    dy = torch.ones_like(p["x"])

    def step():
        for t in p.values():
            t.grad = None
        call(p, noop).backward(dy)

    benchmark.pedantic(step, rounds=100 if quick else 1000, warmup_rounds=20)
    benchmark.extra_info["host_us"] = round(benchmark.stats.stats.median * 1e6, 2)
