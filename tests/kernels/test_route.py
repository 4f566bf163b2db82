"""`route` and `permute` on every CPU back-end: selection rules, invariants, gradients."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import CPU_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

from d2m_kernels import Routing, permute, route
from d2m_kernels.route import reroute


def check_order(r: Routing, ids=None) -> None:
    """offsets, order and inverse agree with the ids, and the order is stable."""
    ids = (r.ids if ids is None else ids).long().reshape(-1)
    N, E = ids.numel(), r.num_experts
    key = torch.where(ids < 0, E, ids)
    counts = torch.bincount(key, minlength=E + 1)
    assert r.offsets.tolist() == [0, *counts[:E].cumsum(0).tolist()]
    assert torch.equal(r.order.long(), key.argsort(stable=True))
    assert torch.equal(r.order.long()[r.inverse.long()], torch.arange(N))
    for t in (r.ids, r.offsets, r.order, r.inverse):
        assert t.dtype == torch.int32


def first_k(logits: list[float], k: int) -> list[int]:
    """Ties to the lowest id, NaN last: python's own stable sort says it."""
    return sorted(range(len(logits)), key=lambda e: (logits[e] != logits[e], -logits[e], e))[:k]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 127, 129])
@pytest.mark.parametrize("D,E,k", [(1, 1, 1), (5, 7, 2), (33, 12, 0), (100, 64, 64), (130, 256, 3)])
def test_against_sorting(backend, T, D, E, k):
    # Small integers: every dot product is exact, so that ties are real in each back-end.
    g = torch.Generator().manual_seed(T + D)
    x = torch.randint(-3, 4, (T, D), generator=g).float()
    router = torch.randint(-2, 3, (E, D), generator=g).float()
    r = route(x, router, top_k=k, backend=backend)
    logits = x @ router.T
    assert r.ids.tolist() == [first_k(row, k) for row in logits.tolist()]
    torch.testing.assert_close(r.probs, logits.softmax(-1))
    torch.testing.assert_close(r.weights, logits.gather(-1, r.ids.long()).softmax(-1))
    check_order(r)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_softmax_of_the_selected_is_softmax_then_renormalise(backend):
    x, router = torch.randn(40, 16), torch.randn(8, 16)
    r = route(x, router, top_k=3, backend=backend)
    alpha = (x @ router.T).softmax(-1).gather(-1, r.ids.long())  # eq. 3 as it is written
    torch.testing.assert_close(r.weights, alpha / alpha.sum(-1, keepdim=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_and_infinite_logits(backend):
    nan, inf = float("nan"), float("inf")
    x = torch.eye(5)
    router = torch.tensor(
        [
            [nan, inf, nan, -inf, 1.0],
            [0.0, inf, nan, nan, 1.0],
            [nan, 0.0, nan, -inf, 1.0],
            [1.0, nan, nan, 0.0, 1.0],
        ]
    )
    # Row t of the logits is column t of the router; 0 * nan would spoil a plain product.
    for t in range(5):
        column = router[:, t : t + 1]
        r = route(x[t : t + 1, t : t + 1], column.contiguous(), top_k=3, backend=backend)
        assert r.ids.tolist() == [first_k(column[:, 0].tolist(), 3)]
        check_order(r)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equal_logits_take_the_lowest_ids(backend):
    r = route(torch.randn(9, 4), torch.zeros(12, 4), top_k=5, backend=backend)
    assert r.ids.tolist() == [[0, 1, 2, 3, 4]] * 9


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_large_logits(backend):
    x = torch.randn(33, 16) * 1e4
    r = route(x, torch.randn(6, 16), top_k=2, backend=backend)
    assert r.weights.isfinite().all()
    torch.testing.assert_close(r.weights.sum(-1), torch.ones(33))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16])
def test_fp32_logits_from_bf16(backend, router_dtype):
    x = torch.randn(50, 96, dtype=torch.bfloat16)
    router = torch.randn(12, 96).to(router_dtype)
    r = route(x, router, top_k=2, backend=backend)
    exact = (x.double() @ router.double().T).softmax(-1)
    torch.testing.assert_close(r.probs.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strided_x_and_router(backend):
    x, router = torch.randn(20, 48), torch.randn(6, 40)
    views = x[:, 3:19], router[:, 7:23]
    a = route(*views, top_k=2, backend=backend)
    b = route(*(v.contiguous() for v in views), top_k=2, backend=backend)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.probs, b.probs)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gradients(backend, k):
    x, router = torch.randn(21, 9), torch.randn(5, 9)
    up = torch.randn(21, 5), torch.randn(21, k)

    def grads(dtype, function):
        p, q = (t.to(dtype).clone().requires_grad_() for t in (x, router))
        probs, weights = function(p, q)
        loss = (probs * up[0].to(dtype)).sum() + (weights * up[1].to(dtype)).sum()
        return torch.autograd.grad(loss, (p, q))

    ids = route(x, router, top_k=k, backend=backend).ids.long()

    def plain(p, q):
        logits = p @ q.T
        return logits.softmax(-1), logits.gather(-1, ids).softmax(-1)

    def ours(p, q):
        r = route(p, q, top_k=k, backend=backend)
        return r.probs, r.weights

    for a, b in zip(grads(torch.float32, ours), grads(torch.float64, plain), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=170, deadline=None, print_blob=True)
@given(data=st.data())
def test_permute_is_a_stable_counting_sort(backend, data):
    E = data.draw(st.integers(1, 20), "E")
    T, k = data.draw(st.integers(0, 60), "T"), data.draw(st.integers(0, 4), "k")
    ids = data.draw(st.lists(st.integers(-1, E - 1), min_size=T * k, max_size=T * k), "ids")
    ids = torch.tensor(ids, dtype=torch.int32).reshape(T, k)
    offsets, order, inverse = permute(ids, E, backend=backend)
    empty = torch.empty(0)
    check_order(Routing(empty, empty, ids, offsets, order, inverse))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=40, deadline=None, print_blob=True)
@given(
    T=st.integers(0, 80),
    D=st.integers(1, 40),
    E=st.integers(1, 17),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_route_invariants(backend, T, D, E, data, dtype):
    k = data.draw(st.integers(0, E), "k")
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    x = torch.randn(T, D, generator=g).to(dtype)
    router = torch.randn(E, D, generator=g)
    mask = torch.rand(T, generator=g) < 0.7 if data.draw(st.booleans(), "masked") else None
    r = route(x, router, top_k=k, token_mask=mask, backend=backend)
    check_order(r)
    live = torch.ones(T, dtype=torch.bool) if mask is None else mask
    assert (r.ids[live] >= 0).all() and (r.ids < E).all() and (r.ids[~live] == -1).all()
    assert all(len(set(row)) == k for row in r.ids[live].tolist())
    torch.testing.assert_close(r.probs.sum(-1), live.float())
    if k:
        torch.testing.assert_close(r.weights.sum(-1), live.float())
        exact = (x.double() @ router.double().T)[live]
        chosen = exact.gather(-1, r.ids[live].long())
        best = exact.topk(k).values
        # fp32 sums may swap near-ties, never more.
        torch.testing.assert_close(chosen.sort(-1, descending=True).values, best, rtol=0, atol=1e-4)


def test_routing_is_a_pytree_and_frozen():
    r = route(torch.randn(6, 4), torch.randn(3, 4), backend="reference")
    leaves, spec = torch.utils._pytree.tree_flatten(r)
    again = torch.utils._pytree.tree_unflatten([t + 0 for t in leaves], spec)
    assert isinstance(again, Routing) and torch.equal(again.ids, r.ids)
    assert (r.num_experts, r.top_k) == (3, 2)
    with pytest.raises(AttributeError):
        r.ids = None


@pytest.mark.parametrize("x_dtype,router_dtype", [("float32", "float64"), ("float64", "float32"),
                                                  ("bfloat16", "float64")])  # fmt: skip
def test_fp64_beside_a_narrower_dtype(x_dtype, router_dtype):
    """Routed by the reference, in fp64; probs and weights in the dtype that x's sums have."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=g, dtype=torch.float64).to(getattr(torch, x_dtype))
    router = torch.randn(4, 6, generator=g, dtype=torch.float64).to(getattr(torch, router_dtype))
    x.requires_grad_()
    router.requires_grad_()
    r = route(x, router, top_k=2)
    exact = (x.double() @ router.double().T).softmax(-1)
    assert torch.equal(r.ids.long(), exact.topk(2).indices)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert r.probs.dtype == r.weights.dtype == wide
    torch.testing.assert_close(r.probs.double(), exact, rtol=1e-6, atol=1e-7)
    # gradients, through the call and through the reused routing
    for again in (r, reroute(x, router, r)):
        dx, drouter = torch.autograd.grad(again.probs[:, 0].sum(), (x, router))
        ex, er = torch.autograd.grad(exact[:, 0].sum(), (x, router), retain_graph=True)
        assert dx.dtype == x.dtype and drouter.dtype == router.dtype
        torch.testing.assert_close(dx, ex, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5,
                                   atol=1e-5)  # fmt: skip
        torch.testing.assert_close(drouter, er, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
def test_a_padding_row_does_not_reach_the_routers_gradient(backend):
    x, router = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])
    x[2] = float("nan")
    r = route(x, router, top_k=2, token_mask=mask, backend=backend)
    (drouter,) = torch.autograd.grad(r.weights[:, 0].sum() + r.probs[:, 1].sum(), router)
    kept = route(x[mask], router, top_k=2, backend=backend)
    (expected,) = torch.autograd.grad(kept.weights[:, 0].sum() + kept.probs[:, 1].sum(), router)
    torch.testing.assert_close(drouter, expected)


def test_the_cuda_kernels_take_256_experts():
    from d2m_kernels.backends import cuda

    x, router = torch.randn(3, 4), torch.randn(257, 4)
    with pytest.raises(ValueError, match="at most 256 experts for the back-end 'cuda', got 257"):
        cuda.route(x, router, 1)
    with pytest.raises(ValueError, match="got 257"):
        cuda.modulate_route(x, x[:1], x[:1], 1e-6, router, 1)
    with pytest.raises(ValueError, match="got 257"):
        cuda.permute(torch.zeros(3, 1, dtype=torch.int32), 257)
