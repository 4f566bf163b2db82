"""`grouped_gemm`, up and down, against one dense product of the same size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from race import describe, race_with
from shapes import flux

from d2m_kernels import grouped_gemm, route


@pytest.mark.parametrize("side", ["up", "down"])
def test_grouped_gemm(benchmark, device, quick, side):
    shape = flux(quick)
    S, E, H, N = shape.S, shape.E, shape.H, shape.T * shape.K
    p = shape.tensors(device)
    r = route(p["x"], p["router"], top_k=shape.K)
    if side == "up":
        x, gather = p["x"], r.order // shape.K
        w, bias, activation = p["w1"][S:].view(E, H, -1), p["b1"][S:].view(E, H), "gelu_tanh"
        rows = x[gather.long()]
    else:
        x = rows = torch.randn(N, H, device=device).to(shape.dtype)
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
    with torch.inference_mode():
        race = race_with(benchmark, "grouped_gemm", functions, 5 if quick else 15, device)
    describe(benchmark, shape=f"{side}: {shape}", gflop=shape.gflop(shape.K * H, 1),
             gbyte=shape.gbyte(N * shape.D, N * H, E * H * shape.D), race=race,
             name="grouped_gemm",
             ratio_to_linear=round(race.ratio("grouped_gemm", "one linear"), 4))  # fmt: skip
