"""How many tokens, experts and choices, and how far apart in memory: the layer on CPU back-ends.

Under Triton's interpreter (the last test starts it) the same for back-end "triton", in fewer cases.
"""

from __future__ import annotations

import pytest
import torch
from helpers.cases import Case, call, compare, compare_closely
from helpers.triton_cases import BACKENDS, INTERPRETED, run_interpreted

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
SMALL = dict(D=12, S=5, H=3, dtype=torch.bfloat16)


def combinations():
    if INTERPRETED:
        few = [(128, 2, 1), (128, 2, "E"), (128, 14, "dense"), (1536, 14, 2)]
        return [*few, (128, 14, 0), (20, 256, 5), (6, 256, "dense")]
    every = [(T, E, k) for T in (128, 1536) for E in (2, 14, 256) for k in (0, 1, 2, "E", "dense")]
    return [c for c in every if c != (1536, 256, "E")]  # 256 experts a token: below


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T,E,k", combinations())
def test_tokens_experts_and_top_k(backend, T, E, k):
    case = Case(T=T, E=E, k=E if k == "E" else k, seed=T + E, scale=1.3, **SMALL)
    if E == 256 and case.k:  # an expert or a slot has too few numbers to compare bf16 errors by
        case.dtype = torch.float32
    compare(case, backend)


if not INTERPRETED:

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_token_to_each_of_256_experts(backend):
        compare_closely(Case(T=100, D=4, S=2, H=1, E=256, k=256), backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_two_hundred_thousand_tokens(backend):
        compare(Case(T=200_000, D=4, S=2, H=2, E=3, k=2), backend)


def wide_views(p: dict, step: int = 1) -> dict:
    """The same numbers inside larger tensors, at odd offsets, as slices of rows and of columns."""
    out = dict(p)
    T, D = p["x"].shape
    x = torch.full((T, 3 * D + step), float("nan"))
    w2 = torch.full((D, p["w2"].shape[1] + 24 + step), float("nan"))
    w1 = torch.full((p["w1"].shape[0] + 3, D + 2 * step), float("nan"))
    out["x"], out["w2"] = x[:, D : 2 * D], w2[:, 24 : 24 + p["w2"].shape[1]]
    out["w1"] = w1[3:, step : step + D]
    for name in ("x", "w2", "w1"):
        out[name].copy_(p[name])
    return {n: t.detach().requires_grad_() for n, t in out.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [0, 2, "dense"] if INTERPRETED else [0, 1, 2, 4, "dense"])
@pytest.mark.parametrize("step", [1, 8])  # addresses that TMA cannot take, and ones that it can
def test_strided_and_offset_views(backend, k, step, monkeypatch):
    if INTERPRETED:
        from d2m_kernels.backends.triton import configs

        monkeypatch.setenv(configs.ENV, "64x128x64w4s4p2tma" if step == 8 else "small")
    case = Case(T=24, D=16, S=8, H=8, E=4, k=k, activation="swiglu", scale=1.3)
    p = case.build(grad=False)
    results = []
    for q in (wide_views(p, step), {n: t.clone().requires_grad_() for n, t in p.items()}):
        y = call(case, backend)(q)
        dy = torch.randn(16, 2 * 24, generator=torch.Generator().manual_seed(1))[:, ::2].T
        leaves = list(q.values())
        zero_strides = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
        results.append((y, zero_strides, torch.autograd.grad(y, leaves, dy)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def far_apart(t):
    """The same matrix with 2^30 elements between its rows, on memory that stays untouched."""
    if t.dim() < 2:
        return t.clone()
    step = 1 << 30
    try:
        memory = torch.empty((t.shape[0] - 1) * step + t.shape[1], dtype=t.dtype)
    except RuntimeError as error:
        pytest.skip(f"this machine does not promise memory that is never used: {error}")
    return memory.as_strided(t.shape, (step, 1)).copy_(t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_offsets_beyond_two_to_the_31(backend, activation):
    """Element 2^31 and 2^32 of x, router, w1, w2 and dy: bit for bit what they give close by."""
    case = Case(T=5, D=5, S=2, H=1, E=3, k=2, activation=activation, dtype=torch.bfloat16)
    p = case.build(grad=False)
    dy = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for place in (torch.clone, far_apart):
        leaves = {n: place(t).requires_grad_() for n, t in p.items()}
        assert place is torch.clone or leaves["x"].stride() == (1 << 30, 1)
        y = call(case, backend)(leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), place(dy))
        results.append(dict(zip(leaves, grads, strict=True)) | {"y": y.detach()})
    for name, value in results[0].items():
        assert value.isfinite().all() and torch.equal(results[1][name], value), name


if not INTERPRETED:

    @pytest.mark.slow
    def test_sizes_under_the_interpreter():
        run_interpreted(__file__)
