"""`grouped_gemm` and `combine` on every CPU back-end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import CPU_BACKENDS, act, assert_as_good_as_torch, run

from d2m_kernels import combine, grouped_gemm, route

pytestmark = pytest.mark.usefixtures("poisoned")

GROUPS = {
    "ragged": [0, 3, 3, 40, 41],
    "empty": [0, 0, 0, 0, 0],
    "one": [0, 0, 41, 41, 41],
    "tail": [0, 5, 9, 9, 30],
}


def problem(N, K, rows, dtype, gather, gated, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=g).to(dtype)

    p = {"x": draw(rows, K), "w": draw(4, N, K), "bias": draw(4, N)}
    if gated:
        p |= {"w_gate": draw(4, N, K), "bias_gate": draw(4, N)}
    index = torch.randint(0, rows, (41,), generator=g).int() if gather else None
    return {n: t.requires_grad_() for n, t in p.items()}, index


def expected(p, offsets, index, activation):
    x = p["x"] if index is None else p["x"][index.long()]
    out = []
    for e, (lo, hi) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        z = F.linear(x[lo:hi], p["w"][e], p["bias"][e])
        if "w_gate" in p:
            z = torch.cat([z, F.linear(x[lo:hi], p["w_gate"][e], p["bias_gate"][e])], -1)
        out.append(z if activation is None else act(activation, z))
    out.append(x.new_zeros(x.shape[0] - offsets[-1], p["w"].shape[1]))
    return torch.cat(out)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "relu", "swiglu"])
@pytest.mark.parametrize("dtype,N,K", [(torch.float32, 8, 16), (torch.bfloat16, 5, 33)])
def test_grouped_gemm(backend, groups, gather, activation, dtype, N, K):
    offsets = GROUPS[groups]
    gated = activation == "swiglu"
    p, index = problem(N, K, 17 if gather else 41, dtype, gather, gated)

    def ours(q):
        bias = (q["bias"], q["bias_gate"]) if gated else q["bias"]
        return grouped_gemm(q["x"], q["w"], torch.tensor(offsets, dtype=torch.int32), bias=bias,
                            w_gate=q.get("w_gate"), gather=index, activation=activation,
                            backend=backend)  # fmt: skip

    exact = {n: t.detach().double().requires_grad_() for n, t in p.items()}
    want = run(lambda q: expected(q, offsets, index, activation), exact)
    own = run(lambda q: expected(q, offsets, index, activation), p)
    for name, value in run(ours, p).items():
        assert_as_good_as_torch(value, want[name], own[name], f"{backend} {groups} {name}")
    assert not ours(p)[offsets[-1] :].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_views_of_a_dense_matrix(backend):
    """The experts of w2 are column blocks of a dense [D, F] matrix."""
    w2 = torch.randn(24, 8 + 4 * 16)
    view = w2[:, 8:].unflatten(1, (4, 16)).transpose(0, 1)
    offsets = torch.tensor([0, 7, 9, 30, 41], dtype=torch.int32)
    h = torch.randn(41, 16)
    a = grouped_gemm(h, view, offsets, backend=backend)
    b = grouped_gemm(h, view.contiguous(), offsets, backend=backend)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "T,k,masked", [(0, 2, False), (33, 1, False), (33, 3, True), (5, 0, False)]
)
@pytest.mark.parametrize("with_shared", [False, True])
def test_combine(backend, dtype, T, k, masked, with_shared):
    D, E = 13, 6
    mask = torch.arange(T) % 3 != 0 if masked else None
    x = torch.randn(T, 8)
    r = route(x, torch.randn(E, 8), top_k=k, token_mask=mask, backend="reference")
    y = torch.randn(T * k, D).to(dtype)
    y[int(r.offsets[-1]) :] = float("nan")  # rows of masked slots may hold anything
    p = {"y": y, "weights": r.weights.clone(), "bias": torch.randn(D).to(dtype)}
    if with_shared:
        p["shared"] = torch.randn(T, D).to(dtype)
    p = {n: t.detach().requires_grad_() for n, t in p.items()}

    def routing_with(weights):
        return type(r)(r.probs, weights, r.ids, r.offsets, r.order, r.inverse)

    def ours(q):
        return combine(q["y"], routing_with(q["weights"]), shared=q.get("shared"), bias=q["bias"],
                       scale=1.5, backend=backend)  # fmt: skip

    def plain(q):
        rows = torch.where(torch.arange(T * k)[:, None] < r.offsets[-1], q["y"], 0)
        rows = rows[r.inverse.long()].view(T, k, D)
        out = 1.5 * (rows * q["weights"][..., None].to(rows.dtype)).sum(1) + q["bias"]
        return out + q["shared"] if "shared" in q else out

    exact = {n: t.detach().double().requires_grad_() for n, t in p.items()}
    want, own = run(plain, exact), run(plain, p)
    for name, value in run(ours, p).items():
        assert_as_good_as_torch(value, want[name], own[name], f"{backend} {name}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_stages_make_the_layer(backend):
    """route, grouped_gemm up, grouped_gemm down and combine are moe_ffn without shared expert."""
    from d2m_kernels import moe_ffn

    T, D, E, H, k = 29, 16, 5, 8, 2
    x, router = torch.randn(T, D), torch.randn(E, D)
    w1, w2, b1, b2 = (
        torch.randn(E * H, D),
        torch.randn(D, E * H),
        torch.randn(E * H),
        torch.randn(D),
    )
    r = route(x, router, top_k=k, backend=backend)
    h = grouped_gemm(x, w1.view(E, H, D), r.offsets, gather=r.order // k, bias=b1.view(E, H),
                     activation="silu", backend=backend)  # fmt: skip
    y = grouped_gemm(h, w2.unflatten(1, (E, H)).transpose(0, 1), r.offsets, backend=backend)
    out = combine(y, r, bias=b2, scale=2.0, backend=backend)
    layer = moe_ffn(x, router, w1, w2, b1, b2, top_k=k, activation="silu", routed_scale=2.0,
                    backend=backend)  # fmt: skip
    torch.testing.assert_close(out, layer, rtol=1e-5, atol=1e-5)
