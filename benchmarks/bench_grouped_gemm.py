"""`grouped_gemm`, up and down, against one dense product of the same size and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness.shapes import ROUTINGS
from harness.single_ops import all_shapes, record, shape_for

from d2m_kernels import grouped_gemm, route


@all_shapes
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("side", ["up", "down"])
def test_grouped_gemm(bench, name, side, routing):
    short = bench.size == "default" or name == "flux-18432"
    if short and routing == "zipf" and bench.device.type == "cpu":
        pytest.skip(f"not in the {bench.size} set on a CPU")
    shape = shape_for(name, bench).at(routing=routing)
    S, E, H, N = shape.S, shape.E, shape.H, shape.T * shape.K
    p = shape.tensors(bench.device)
    r = route(p["x"], p["router"], top_k=shape.K)
    if side == "up":
        x, gather = p["x"], r.order // shape.K
        w, bias, activation = p["w1"][S:].view(E, H, -1), p["b1"][S:].view(E, H), "gelu_tanh"
        rows = x[gather.long()]
    else:
        x = rows = torch.randn(N, H, device=bench.device).to(shape.dtype)
        w, bias = p["w2"][:, S:].unflatten(1, (E, H)).transpose(0, 1), None
        gather = activation = None

    def ours():
        return grouped_gemm(x, w, r.offsets, gather=gather, bias=bias, activation=activation)

    out, bounds = ours(), r.offsets.tolist()
    e = max(range(E), key=lambda i: bounds[i + 1] - bounds[i])
    own = slice(bounds[e], bounds[e + 1])
    z = F.linear(rows[own], w[e], None if bias is None else bias[e])
    z = F.gelu(z, approximate="tanh") if activation else z
    assert (out[own].float() - z.float()).abs().max() <= 0.02 * z.float().abs().max()

    one = w[0].contiguous()
    functions = {"grouped_gemm": ours, "one linear": lambda: F.linear(rows, one)}
    strides_fit = all(s * w.element_size() % 16 == 0 for s in w.stride()[:2])
    if strides_fit:
        ends = r.offsets[1:]
        functions["torch grouped_mm"] = lambda: F.grouped_mm(rows, w.transpose(1, 2), offs=ends)
    with torch.inference_mode():
        race = bench.race(functions, "grouped_gemm", bench.rounds(15), budget=bench.seconds(2, 4))
        counts = bench.count(ours)
    # The least traffic, every operand once: "up" gathers its N rows from x's T.
    operands = (shape.T * shape.D, N * H) if side == "up" else (N * H, N * shape.D)
    gbyte = shape.gbyte(*operands, E * H * shape.D)
    gflop = shape.gflop(shape.K * H, 1)
    record(bench, f"grouped_gemm_{side}", name, shape, race, gflop, gbyte, counts)
