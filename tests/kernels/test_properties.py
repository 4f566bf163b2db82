"""`moe_ffn` and `grouped_gemm` on drawn shapes, routings and memory layouts, on CPU back-ends.

Where an example fails its arguments and a line that repeats it are printed. Together with the
properties of route, permute and two streams more than 500 examples a run.
"""

from __future__ import annotations

import pytest
import torch
from helpers.cases import Case, act, call, loss_weights, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2m_kernels import grouped_gemm, route

pytestmark = pytest.mark.usefixtures("poisoned")
ACTIVATIONS = [
    "gelu",
    "gelu_tanh",
    "silu",
    "geglu",
    "geglu_tanh",
    "swiglu",
]  # relu has a kink: no small errors


def examples(n):
    health = list(HealthCheck)
    return settings(max_examples=n, deadline=None, suppress_health_check=health, print_blob=True)


def strided(t: torch.Tensor, pad: int) -> torch.Tensor:
    """The same numbers among NaN: `pad` columns before each row, and as many behind."""
    if t is None or t.dim() < 2 or not pad:
        return t
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 2 * pad), float("nan"), dtype=t.dtype)
    wide[..., pad : pad + t.shape[-1]] = t.detach()
    return wide[..., pad : pad + t.shape[-1]].requires_grad_()


@examples(300)
@given(
    T=st.integers(0, 70), D=st.integers(1, 40), S=st.integers(0, 30), H=st.integers(1, 20),
    E=st.integers(1, 12), k=st.one_of(st.integers(0, 12), st.just("dense")),
    activation=st.sampled_from(ACTIVATIONS), bias=st.booleans(), masked=st.booleans(),
    skewed=st.booleans(), frozen=st.booleans(), pad=st.sampled_from([0, 0, 1, 8]),
    scale=st.sampled_from([1.0, -0.7]), seed=st.integers(0, 999),
    backend=st.sampled_from(["cpu", "torch"]),
)  # fmt: skip
def test_layer(
    T, D, S, H, E, k, activation, bias, masked, skewed, frozen, pad, scale, seed, backend
):  # fmt: skip
    """fp32 results and gradients are the reference's in fp64, given the same choice of experts."""
    k = k if k == "dense" else min(k, E)
    case = Case(T=T, D=D, S=S, H=H, E=E, k=k, activation=activation, bias=bias, scale=scale,
                seed=seed)  # fmt: skip
    exact = case.build(torch.float64)
    if skewed:  # nearly every token wants the same experts
        with torch.no_grad():
            exact["x"][:, 0] = 3.0
            exact["router"][0, 0] += 20.0
    low = {n: None if t is None else t.detach().float().requires_grad_() for n, t in exact.items()}
    low = {n: strided(t, pad) for n, t in low.items()}
    mask = torch.arange(T) % 3 != 0 if masked else None
    top_k = 0 if k == "dense" else k
    with torch.no_grad():
        routing = route(low["x"], low["router"], top_k=top_k, token_mask=mask, backend=backend)
    extra = dict(freeze_shared=frozen)
    if masked:
        extra["token_mask"] = mask
    ours = run(call(case, backend, **extra), low)
    if top_k:
        extra["routing"] = routing
    for name, value in run(call(case, "reference", **extra), exact).items():
        assert ours[name].dtype == torch.float32, name
        torch.testing.assert_close(ours[name], value.float(), rtol=1e-4, atol=1e-4, msg=name)


@examples(100)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12), tail=st.integers(0, 9),
    rows=st.integers(1, 50), K=st.integers(1, 40), N=st.integers(1, 40), gather=st.booleans(),
    activation=st.sampled_from([None, *ACTIVATIONS]), bias=st.booleans(),
    pad=st.sampled_from([0, 0, 1, 8]), seed=st.integers(0, 999),
    backend=st.sampled_from(["cpu", "torch", "reference"]),
)  # fmt: skip
def test_grouped_gemm(counts, tail, rows, K, N, gather, activation, bias, pad, seed, backend):
    """Any counts, rows that belong to no expert, gathered rows, padded weights; and gradients."""
    g = torch.Generator().manual_seed(seed)
    E, M = len(counts), sum(counts) + tail
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    index = torch.randint(0, rows, (M,), generator=g).int() if gather else None
    gated = activation in ("geglu", "geglu_tanh", "swiglu")

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    exact = {"x": draw(rows if gather else M, K), "w": draw(E, N, K) / K**0.5}
    if gated:
        exact["w_gate"] = draw(E, N, K) / K**0.5
    if bias:
        exact["bias"] = draw(E, N)
    low = {n: strided(t.float().requires_grad_(), pad) for n, t in exact.items()}
    exact = {n: t.requires_grad_() for n, t in exact.items()}

    def ours(q):
        b = (q["bias"], q["bias"]) if bias and gated else q.get("bias")
        return grouped_gemm(q["x"], q["w"], offsets, w_gate=q.get("w_gate"), gather=index, bias=b,
                            activation=activation, backend=backend)  # fmt: skip

    def plain(q):
        x, out = q["x"] if index is None else q["x"][index.long()], []
        for e, part in enumerate(x[: M - tail].split(counts)):
            b = q["bias"][e] if bias else 0
            z = part @ q["w"][e].T + b
            if gated:
                z = torch.cat([z, part @ q["w_gate"][e].T + b], -1)
            out.append(z if activation is None else act(activation, z))
        return torch.cat([*out, x.new_zeros(tail, N)])

    for name, value in run(plain, exact).items():
        value = torch.zeros_like(low[name]) if value is None else value.float()
        torch.testing.assert_close(run(ours, low)[name], value, rtol=1e-4, atol=1e-4, msg=name)


@examples(100)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4), seed=st.integers(0, 99),
    k=st.sampled_from([0, 1, 2, "dense"]), backend=st.sampled_from(["cpu", "torch", "reference"]),
)  # fmt: skip
def test_leading_dimensions_of_any_rank(shape, seed, k, backend):
    """x [..., D] gives what its rows give, for no dimension in front as well as for four."""
    T = torch.Size(shape).numel()
    case = Case(T=T, D=6, S=3, H=2, E=3, k=k, seed=seed)
    rows, other = case.build(), case.build()
    results = []
    for p, x in ((rows, rows["x"]), (other, other["x"].reshape(*shape, 6))):
        y = call(case, backend)(p | {"x": x})
        assert y.shape == x.shape
        y = y.reshape(T, 6)
        results.append((y, torch.autograd.grad((y * loss_weights(y)).sum(), list(p.values()))))
    torch.testing.assert_close(*results, rtol=0, atol=0)
