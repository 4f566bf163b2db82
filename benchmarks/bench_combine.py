"""`combine`: the weighted gather-sum of the routed rows onto the shared expert's result."""

from __future__ import annotations

import torch
from race import describe, race_with
from shapes import flux

from d2m_kernels import combine, route


def test_combine(benchmark, device, quick):
    shape = flux(quick)
    T, K, D = shape.T, shape.K, shape.D
    p = shape.tensors(device)
    r = route(p["x"], p["router"], top_k=K)
    y = torch.randn(T * K, D, device=device).to(shape.dtype)
    weights = r.weights.to(shape.dtype)[..., None]

    def eager():
        return p["x"] + (y[r.inverse.long()].view(T, K, D) * weights).sum(1)

    out = combine(y, r, shared=p["x"])
    assert (out.float() - eager().float()).abs().max() < 0.02 * out.float().abs().max()
    functions = {"combine": lambda: combine(y, r, shared=p["x"]), "eager": eager}
    with torch.inference_mode():
        race = race_with(benchmark, "combine", functions, 5 if quick else 15, device)
    describe(benchmark, shape=str(shape), gflop=2e-9 * T * K * D,
             gbyte=shape.gbyte(T * K * D, 2 * T * D), race=race, name="combine",
             ratio_to_eager=round(race.ratio("combine", "eager"), 4))  # fmt: skip
