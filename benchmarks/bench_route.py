"""`route` (with the permutation it ends in) and `permute` alone."""

from __future__ import annotations

import torch
from race import describe, race_with
from shapes import flux

from d2m_kernels import permute, route


def test_route(benchmark, device, quick):
    shape = flux(quick)
    p = shape.tensors(device)
    exact = (p["x"].float() @ p["router"].T).topk(shape.K)
    r = route(p["x"], p["router"], top_k=shape.K)
    chosen = (p["x"].float() @ p["router"].T).gather(-1, r.ids.long())
    torch.testing.assert_close(chosen, exact.values, rtol=1e-3, atol=1e-4)
    functions = {
        "route": lambda: route(p["x"], p["router"], top_k=shape.K),
        "eager": lambda: (p["x"].float() @ p["router"].T).topk(shape.K).values.softmax(-1),
    }
    with torch.inference_mode():
        race = race_with(benchmark, "route", functions, 5 if quick else 15, device)
    describe(benchmark, shape=str(shape), gflop=shape.gflop(shape.E, 1),
             gbyte=shape.gbyte(shape.T * shape.D), race=race, name="route",
             ratio_to_eager=round(race.ratio("route", "eager"), 4))  # fmt: skip


def test_permute(benchmark, device, quick):
    shape = flux(quick)
    ids = torch.randint(0, shape.E, (shape.T, shape.K), dtype=torch.int32, device=device)
    _, order, _ = permute(ids, shape.E)
    assert torch.equal(order.long(), ids.reshape(-1).argsort(stable=True))
    functions = {
        "permute": lambda: permute(ids, shape.E),
        "argsort": lambda: ids.reshape(-1).argsort(stable=True),
    }
    race = race_with(benchmark, "permute", functions, 10 if quick else 50, device)
    describe(benchmark, shape=str(shape), gflop=0.0, gbyte=3 * 4e-9 * shape.T * shape.K,
             race=race, name="permute",
             ratio_to_argsort=round(race.ratio("permute", "argsort"), 4))  # fmt: skip
