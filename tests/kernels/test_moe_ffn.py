"""`moe_ffn` on every CPU back-end: values, gradients, and what must never happen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import CPU_BACKENDS, Case, call, checkpointed, compare, double_loop, run

from d2m_kernels import Routing, backends, moe_ffn, route

pytestmark = pytest.mark.usefixtures("poisoned")

ALL_K = [0, 1, 2, "E", "dense"]


@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_tanh", "silu", "relu", "geglu", "geglu_tanh", "swiglu"]
)
@pytest.mark.parametrize("k", ALL_K)
def test_reference_equals_a_double_loop(k, activation):
    case = Case(T=11, D=6, S=3, H=5, E=4, k=4 if k == "E" else k, activation=activation,
                dtype=torch.float64, scale=1.7)  # fmt: skip
    inputs = case.build(grad=False)
    y = call(case, "reference")(inputs)
    torch.testing.assert_close(y, double_loop(case, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", ALL_K)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_gradcheck(k, activation):
    case = Case(T=5, D=4, S=2, H=3, E=3, k=3 if k == "E" else k, activation=activation,
                dtype=torch.float64, scale=0.8)  # fmt: skip
    p = case.build()
    assert torch.autograd.gradcheck(
        lambda *t: moe_ffn(*t, **case.kwargs(), backend="reference"), tuple(p.values())
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", ALL_K)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_dtypes_and_top_k(backend, dtype, k, activation):
    case = Case(k=4 if k == "E" else k, dtype=dtype, activation=activation, scale=2.0)
    compare(case, backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 127, 129])
@pytest.mark.parametrize(
    "D,S,H,E,k",
    [(1, 1, 1, 1, 1), (5, 0, 1, 7, 2), (33, 5, 3, 3, 3), (100, 33, 5, 12, 2), (130, 64, 4, 64, 7)],
)
def test_odd_shapes(backend, T, D, S, H, E, k):
    compare(Case(T=T, D=D, S=S, H=H, E=E, k=k, dtype=torch.bfloat16, seed=T + D), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "geglu"])
def test_other_activations_without_bias(backend, activation):
    compare(Case(activation=activation, bias=False, S=0, dtype=torch.float32), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "relu", "geglu", "swiglu"])
@pytest.mark.parametrize("D", [16, 33])
@pytest.mark.parametrize("S", [0, 8])
def test_biases_are_rounded_once(backend, activation, D, S):
    """A bias added to a rounded product can turn a pre-activation's sign, and relu's gradient."""
    case = Case(T=129, D=D, S=S, activation=activation, dtype=torch.bfloat16, seed=3)
    compare(case, backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_many_experts(backend):
    compare(Case(T=40, D=8, S=4, H=2, E=256, k=5), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_all_tokens_to_one_expert(backend):
    router = torch.zeros(4, 16, dtype=torch.float64)
    router[2, 0] = 50
    x = torch.randn(3000, 16, dtype=torch.float64)
    x[:, 0] = 1
    compare(Case(T=3000, k=1, tensors={"router": router, "x": x}), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_unreached_experts_have_gradient_zero(backend):
    case = Case(T=1, E=12, k=2)
    p = case.build()
    routing = route(p["x"], p["router"], top_k=2, backend=backend)
    grads = run(call(case, backend), p)
    for e in set(range(12)) - set(routing.ids[0].tolist()):
        own = slice(case.S + e * case.H, case.S + (e + 1) * case.H)
        assert not grads["w1"][own].any() and not grads["w2"][:, own].any()
        assert not grads["b1"][own].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_dense_is_the_dense_ffn(backend):
    case = Case(k="dense", T=64)
    p = case.build()
    dense = F.linear(
        F.gelu(F.linear(p["x"], p["w1"], p["b1"]), approximate="tanh"), p["w2"], p["b2"]
    )
    torch.testing.assert_close(call(case, backend)(p), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("k", [0, "dense"])
def test_router_gradient_is_zero_and_not_none(backend, k):
    p = Case(k=k).build()
    p["router"].data.fill_(float("nan"))
    grads = run(call(Case(k=k), backend), p)
    assert torch.equal(grads["router"], torch.zeros_like(p["router"]))
    assert grads["x"].isfinite().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_one_rows_problem(backend, bad):
    case = Case(T=50, bias=True)
    p = case.build(grad=False)
    clean = call(case, backend)(p)
    sound = p["x"].clone()
    p["x"][17] = bad
    y, routing = call(case, backend, return_routing=True)(p)
    assert routing.ids.min() >= 0 and routing.ids.max() < case.E
    others = torch.arange(50) != 17
    torch.testing.assert_close(y[others], clean[others], rtol=1e-5, atol=1e-6)
    assert not y[17].isfinite().all()
    y, same_places = (call(case, backend, routing=routing)({**p, "x": x}) for x in (p["x"], sound))
    assert torch.equal(y[others], same_places[others])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("k", [1, 3])
def test_masked_tokens_get_the_shared_expert_only(backend, k):
    case = Case(T=30, k=k)
    p = case.build()
    mask = torch.rand(30, generator=torch.Generator().manual_seed(1)) < 0.6
    p["x"].data[(~mask).nonzero()[0, 0]] = 1e4  # a masked row may hold anything
    y, r = call(case, backend, token_mask=mask, return_routing=True)(p)
    full = call(case, backend)(p)
    shared_only = moe_ffn(p["x"], p["router"], p["w1"], p["w2"], p["b1"], p["b2"], top_k=0,
                          shared=case.S, backend=backend)  # fmt: skip
    torch.testing.assert_close(y[mask], full[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[~mask], shared_only[~mask])
    assert (r.ids[~mask] == -1).all() and not r.probs[~mask].any() and not r.weights[~mask].any()
    assert r.offsets[-1] == k * mask.sum()
    (dx,) = torch.autograd.grad(y[~mask].sum() + r.probs.sum() + r.weights.sum(), p["x"])
    (dx_shared,) = torch.autograd.grad(shared_only[~mask].sum(), p["x"])
    torch.testing.assert_close(dx[~mask], dx_shared[~mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("k", [1, 2, "dense"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_freeze_shared(backend, k, activation):
    case = Case(k=k, activation=activation)
    free = run(call(case, backend), case.build())
    frozen = run(call(case, backend, freeze_shared=True), case.build())
    S, rows = case.S, frozen["w1"].shape[0]
    starts = range(0, rows, case.hidden)
    for start in starts:
        for name in ("w1", "b1"):
            assert not frozen[name][start : start + S].any()
            routed = slice(start + S, start + case.hidden)
            torch.testing.assert_close(frozen[name][routed], free[name][routed])
    assert not frozen["w2"][:, :S].any()
    torch.testing.assert_close(frozen["w2"][:, S:], free["w2"][:, S:])
    for name in ("y", "x", "router", "b2"):
        torch.testing.assert_close(frozen[name], free[name])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_routing_can_be_reused_and_carries_gradient(backend):
    case = Case(k=2)
    p = case.build()
    y, first = call(case, backend, return_routing=True)(p)
    again, second = call(case, backend, routing=first.detach(), return_routing=True)(p)
    torch.testing.assert_close(y, again)
    assert isinstance(second, Routing) and torch.equal(first.ids, second.ids)
    for loss_of in (lambda y, r: y.sum(), lambda y, r: (r.probs**2).sum() + (r.weights**2).sum()):
        one = torch.autograd.grad(loss_of(y, first), (p["x"], p["router"]), retain_graph=True)
        two = torch.autograd.grad(loss_of(again, second), (p["x"], p["router"]), retain_graph=True)
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strided_views_and_gradients(backend):
    """A single-stream block's w2 and x may be column slices; dy may be expanded (zero strides)."""
    case = Case(T=24)
    p = case.build(grad=False)
    big = torch.randn(case.D, case.hidden + 24)
    big[:, 24:] = p["w2"]
    wide_x = torch.randn(24, 3 * case.D)
    wide_x[:, case.D : 2 * case.D] = p["x"]
    views = dict(
        p, w2=big[:, 24:].requires_grad_(), x=wide_x[:, case.D : 2 * case.D].requires_grad_()
    )
    torch.testing.assert_close(call(case, backend)(views), call(case, backend)(p))
    leaves = {n: t.detach().clone().requires_grad_() for n, t in p.items()}
    for q in (views, leaves):
        q["out"] = torch.autograd.grad(call(case, backend)(q).sum(), (q["x"], q["w2"]))
    torch.testing.assert_close(views["out"], leaves["out"])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_batch_dimensions_and_pairs(backend):
    case = Case(T=24, activation="swiglu")
    p = case.build()
    y = call(case, backend)(p)
    cube = moe_ffn(p["x"].view(2, 3, 4, -1), p["router"], p["w1"], p["w2"], p["b1"], p["b2"],
                   backend=backend, **case.kwargs())  # fmt: skip
    torch.testing.assert_close(cube.view(24, -1), y)
    up, gate = p["w1"].chunk(2)
    b_up, b_gate = p["b1"].chunk(2)
    pair = moe_ffn(p["x"], p["router"], (up, gate), p["w2"], (b_up, b_gate), p["b2"],
                   backend=backend, **case.kwargs())  # fmt: skip
    torch.testing.assert_close(pair, y)
    w1, b1 = torch.cat([gate, up]), torch.cat([b_gate, b_up])
    flipped = moe_ffn(p["x"], p["router"], w1, p["w2"], b1, p["b2"], gate_first=True,
                      backend=backend, **case.kwargs())  # fmt: skip
    torch.testing.assert_close(flipped, y)
    d_pair = torch.autograd.grad(pair.square().sum(), p["w1"])[0]
    torch.testing.assert_close(d_pair, torch.autograd.grad(y.square().sum(), p["w1"])[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("trained", [0, 1])
def test_one_half_of_a_pair_may_be_trained_alone(backend, trained):
    case = Case(activation="swiglu")
    p = case.build(grad=False)
    w1, b1 = p["w1"].chunk(2), p["b1"].chunk(2)

    def gradients(halves):
        leaves = [t.clone().requires_grad_(i % 2 in halves) for i, t in enumerate((*w1, *b1))]
        y = call(case, backend)(p | {"w1": leaves[:2], "b1": leaves[2:]})
        return torch.autograd.grad(y.square().sum(), [t for t in leaves if t.requires_grad])

    both = gradients((0, 1))
    for alone, expected in zip(gradients((trained,)), both[trained::2], strict=True):
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_two_runs_are_bitwise_equal(backend):
    case = Case(T=129, D=32, dtype=torch.bfloat16)
    one, two = (run(call(case, backend), case.build()) for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autocast_keeps_the_logits_in_fp32(backend):
    case = Case(T=64, D=32)
    p = case.build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, r = call(case, backend, return_routing=True)(p)
    exact = route(p["x"], p["router"], backend="reference")
    assert y.dtype == torch.bfloat16 and r.probs.dtype == torch.float32
    torch.testing.assert_close(r.probs, exact.probs, rtol=1e-5, atol=1e-6)
    y.float().square().sum().backward()
    assert p["w1"].grad.dtype == torch.float32 and p["w1"].grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_backward_inside_autocast_is_the_one_outside(backend, dtype):
    case, grads = Case(T=33, D=32, dtype=dtype), []
    for inside in (False, True):
        p = case.build()
        y = call(case, backend)(p)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y.backward(torch.ones_like(y))
        grads.append({name: t.grad for name, t in p.items() if t.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "router" in grads[0]
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_saved_for_backward_is_x_pre_activations_and_routing():
    case = Case(T=128, D=64, S=64, H=32, E=8, k=2, dtype=torch.bfloat16)
    p = case.build()
    saved: dict[int, int] = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(case, None)(p)
    for t in p.values():
        saved.pop(t.untyped_storage().data_ptr(), None)
    N = case.T * case.k
    pre_activations = 2 * (case.T * case.S + N * case.H)
    routing = 4 * (case.T * case.E + 3 * case.T * case.k + 2 * N + case.E + 1)
    assert sum(saved.values()) <= pre_activations + routing


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("k", [0, 2, "dense"])
def test_compiles_without_a_graph_break(backend, k):
    case = Case(T=17, k=k)
    torch._dynamo.reset()  # each case is a new program, not a recompilation of the last one
    compiled = torch.compile(call(case, backend), fullgraph=True, backend="aot_eager")
    eager, ours = run(call(case, backend), case.build()), run(compiled, case.build())
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_checkpointing_runs_the_layer_twice_and_routes_once(backend, compiled, monkeypatch):
    module, calls = backends.module(backend), []
    for name in ("route", "ffn_fwd"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _name=name, _real=real: calls.append(_name) or _real(*a)
        )
    case = Case(T=17, k=2)
    layer = call(case, backend)
    expected = run(layer, case.build())
    assert calls == ["route", "ffn_fwd"]
    again = checkpointed(layer)
    if compiled:
        torch._dynamo.reset()
        again = torch.compile(again, fullgraph=True, backend="aot_eager")
    ours = run(again, case.build())
    assert calls == ["route", "ffn_fwd"] * 2 + ["ffn_fwd"]
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])


@pytest.mark.slow
def test_inductor():
    """The default back-end of `torch.compile`: our ops between code that it generates."""
    case = Case(T=17, k=2)
    layer = call(case, None)

    def block(p):
        return torch.nn.functional.silu(layer({**p, "x": 2 * p["x"] + 1})) + p["x"]

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    eager, ours = run(block, case.build()), run(compiled, case.build())
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name])


def test_inference_mode_and_no_grad():
    case = Case()
    p = case.build(grad=False)
    with torch.inference_mode():
        y = call(case, None)(p)
    torch.testing.assert_close(y.clone(), call(case, None)(p))
