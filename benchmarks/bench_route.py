"""`route` (with the permutation it ends in) and `permute` alone."""

from __future__ import annotations

import pytest
import torch
from harness.shapes import ROUTINGS
from harness.single_ops import all_shapes, record, shape_for

from d2m_kernels import permute, route


def eager_route(p, shape):
    """Router, softmax over the top-k and the permutation in plain torch."""
    weights, ids = (p["x"].float() @ p["router"].T).topk(shape.K)
    order = ids.reshape(-1).argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return weights.softmax(-1), ids, order, inverse


@all_shapes
@pytest.mark.parametrize("routing", ROUTINGS)
def test_route(bench, name, routing):
    shape = shape_for(name, bench).at(routing=routing)
    p, ids = shape.tensors(bench.device, weights=False), shape.choices(bench.device)
    r = route(p["x"], p["router"], top_k=shape.K)
    assert torch.equal(r.ids.long().sort(1).values, ids.sort(1).values)
    assert torch.equal(r.order.long(), r.ids.reshape(-1).argsort(stable=True))
    functions = {
        "route": lambda: route(p["x"], p["router"], top_k=shape.K),
        "eager": lambda: eager_route(p, shape),
    }
    with torch.inference_mode():
        race = bench.race(functions, "route", bench.rounds(15), budget=4)
        counts = bench.count(functions["route"])
    # x is read once; probs, weights, ids, order and inverse have 4 bytes an entry.
    gbyte = shape.gbyte(shape.T * shape.D) + 4e-9 * shape.T * (shape.E + 4 * shape.K)
    record(bench, "route", name, shape, race, shape.gflop(shape.E, 1), gbyte, counts)


@all_shapes
def test_permute(bench, name):
    shape = shape_for(name, bench)
    ids = shape.choices(bench.device).to(torch.int32)
    _, order, _ = permute(ids, shape.E)
    assert torch.equal(order.long(), ids.reshape(-1).argsort(stable=True))
    functions = {
        "permute": lambda: permute(ids, shape.E),
        "argsort": lambda: ids.reshape(-1).argsort(stable=True),
    }
    race = bench.race(functions, "permute", bench.rounds(30, 10))
    counts = bench.count(functions["permute"])
    record(bench, "permute", name, shape, race, 0.0, 3 * 4e-9 * shape.T * shape.K, counts)
