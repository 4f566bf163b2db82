"""`combine`: the weighted gather-sum of the routed rows onto the shared expert's result."""

from __future__ import annotations

import torch
from harness.single_ops import all_shapes, record, shape_for

from d2m_kernels import combine, route


@all_shapes
def test_combine(bench, name):
    shape = shape_for(name, bench)
    T, K, D = shape.T, shape.K, shape.D
    p = shape.tensors(bench.device, weights=False)
    r = route(p["x"], p["router"], top_k=K)
    y = torch.randn(T * K, D, device=bench.device).to(shape.dtype)
    weights = r.weights.to(shape.dtype)[..., None]

    def eager():
        return p["x"] + (y[r.inverse.long()].view(T, K, D) * weights).sum(1)

    out = combine(y, r, shared=p["x"])
    assert (out.float() - eager().float()).abs().max() < 0.02 * out.float().abs().max()
    functions = {"combine": lambda: combine(y, r, shared=p["x"]), "eager": eager}
    with torch.inference_mode():
        race = bench.race(functions, "combine", bench.rounds(15), budget=4)
        counts = bench.count(functions["combine"])
    gbyte = shape.gbyte(T * K * D, 2 * T * D)
    record(bench, "combine", name, shape, race, 2e-9 * T * K * D, gbyte, counts)
