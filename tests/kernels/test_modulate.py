"""AdaLN in front of the router, gate and residual behind the layer.

Shapes: B samples, T tokens (T / B of each), D model, E experts, K top-k.
"""

from __future__ import annotations

import pytest
import torch
from helpers.cases import CPU_BACKENDS, Case
from torch.nn import functional as F

from d2m_kernels import Stream, modulate_route, moe_ffn, moe_ffn_pair, route

pytestmark = pytest.mark.usefixtures("poisoned")

B, S, D, E = 3, 7, 16, 4


def inputs(dtype=torch.float32, mean=0.0, grad=False, seed=0, B=B, S=S, D=D):
    g = torch.Generator().manual_seed(seed)

    def draw(*size, dtype=dtype, plus=0.0):
        t = torch.randn(*size, generator=g, dtype=torch.float64) + plus
        return t.to(dtype).requires_grad_(grad)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(x=draw(B, S, D, plus=mean), scale=draw(B, D), shift=draw(B, D),
                router=draw(E, D, dtype=wide))  # fmt: skip


def plain(x, scale, shift, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_is_the_formula_and_route(backend, dtype, mean):
    p = inputs(dtype, mean)
    modulated, routing = modulate_route(**p, top_k=2, backend=backend)
    exact = plain(*(p[n].double() for n in ("x", "scale", "shift")))
    assert modulated.dtype == dtype and modulated.shape == p["x"].shape
    unit = torch.finfo(dtype).eps
    room = unit * exact.abs() + 3e-6 * (1 + mean)  # fp32 knows x - mean to mean * 6e-8
    assert ((modulated.double() - exact).abs() <= room).all()
    alone = route(modulated, p["router"], top_k=2, backend=backend)
    assert torch.equal(routing.ids, alone.ids) and torch.equal(routing.order, alone.order)
    torch.testing.assert_close(routing.probs, alone.probs)


@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_gradcheck(top_k):
    p = inputs(torch.float64, grad=True)

    def function(x, scale, shift, router):
        y, r = modulate_route(x, scale, shift, router, top_k=top_k, backend="reference")
        return y, r.probs, r.weights

    assert torch.autograd.gradcheck(function, tuple(p.values()))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_in_fp32_equal_composed_ops(backend):
    p = inputs(grad=True)
    g = torch.Generator().manual_seed(5)
    dy, dp = torch.randn(B, S, D, generator=g), torch.randn(B * S, E, generator=g)

    def gradients(modulated, probs):
        return torch.autograd.grad((modulated * dy).sum() + (probs * dp).sum(), list(p.values()))

    y, r = modulate_route(**p, top_k=2, backend=backend)
    composed = plain(p["x"], p["scale"], p["shift"])
    logits = composed.reshape(-1, D) @ p["router"].T
    torch.testing.assert_close(
        gradients(y, r.probs), gradients(composed, logits.softmax(-1)), rtol=1e-4, atol=1e-5
    )


def test_shapes_of_samples():
    p = inputs()
    y, _ = modulate_route(**p)
    flat, _ = modulate_route(p["x"].view(-1, D), p["scale"], p["shift"], p["router"])
    assert torch.equal(flat, y.view(-1, D))
    one, _ = modulate_route(p["x"], p["scale"][:1], p["shift"][:1], p["router"])
    assert torch.equal(one[0], y[0])
    six = torch.randn(B, 6 * D).chunk(6, dim=-1)  # as a DiT's one Linear gives them
    strided, _ = modulate_route(p["x"], six[3], six[4], p["router"])
    torch.testing.assert_close(strided, plain(p["x"], six[3], six[4]))
    empty, r = modulate_route(p["x"][:, :0], p["scale"], p["shift"], p["router"])
    assert empty.shape == (B, 0, D) and r.order.numel() == 0


def test_a_bad_row_stays_that_rows_problem():
    p = inputs()
    clean, r = modulate_route(**p)
    p["x"][1, 2], p["x"][2, 0, 3] = float("nan"), float("inf")
    dirty, bad = modulate_route(**p)
    rest = torch.ones(B, S, dtype=torch.bool)
    rest[1, 2] = rest[2, 0] = False
    assert torch.equal(dirty[rest], clean[rest])
    assert torch.equal(bad.ids[rest.view(-1)], r.ids[rest.view(-1)])
    assert bad.ids.min() >= 0 and bad.ids.max() < E


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(scale=torch.zeros(2, D)), r"scale: expected \[B, D = 16\] with B = 1 or 3"),
        (dict(shift=torch.zeros(3, 8)), r"shift: expected \[B, D = 16\]"),
        (dict(shift=torch.zeros(1, D)), r"shift: expected scale's shape \(3, 16\)"),
        (dict(x=torch.zeros(7, D)), r"scale: .* B = a divisor of T = 7"),
    ],
)
def test_wrong_shapes_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        modulate_route(**{**inputs(), **change})


# ------------------------------------------------------------------------------- the layer with it


CASE = Case(T=B * S, D=D, S=8, H=8, E=E, k=2, scale=1.3)


def block(grad=True, dtype=torch.float32):
    """A layer's inputs with modulation, gate and residual; x and residual [B, S, D]."""
    p = CASE.build(dtype, grad=False)
    g = torch.Generator().manual_seed(9)
    p["x"] = p["x"].view(B, S, D) * 2 + 1
    for name, size in dict(scale=(B, D), shift=(B, D), gate=(B, D), residual=(B, S, D)).items():
        p[name] = torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)
    return {n: t.detach().requires_grad_(grad) for n, t in p.items()}


def fused(p, backend=None, **extra):
    p = dict(p)
    modulation = p.pop("scale"), p.pop("shift")
    return moe_ffn(**p, modulation=modulation, **{**CASE.kwargs(), **extra}, backend=backend)


def composed(p, backend=None, **extra):
    p = dict(p)
    x = plain(p.pop("x"), p.pop("scale"), p.pop("shift"))
    gate, residual = p.pop("gate"), p.pop("residual")
    y = moe_ffn(x, **p, **{**CASE.kwargs(), **extra}, backend=backend)
    return residual + gate[:, None] * y


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("k", [0, 2, "dense"])
def test_moe_ffn_equals_the_block_written_out(backend, k):
    p = block()
    results = []
    for function in (fused, composed):
        y = function(p, backend, top_k=k)
        grads = torch.autograd.grad(y.square().sum(), list(p.values()))
        results.append((y, grads))
        with torch.no_grad():
            torch.testing.assert_close(function(p, backend, top_k=k), y)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_masks_and_reused_routings():
    p = block(grad=False)
    mask = torch.arange(B * S).view(B, S) % 3 != 0
    y, routing = fused(p, token_mask=mask, return_routing=True)
    torch.testing.assert_close(y, composed(p, token_mask=mask), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused(p, routing=routing), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_pair_of_blocks(grad):
    p = block(grad)
    stream = {**p, "modulation": (p["scale"], p["shift"]), **CASE.kwargs()}
    del stream["scale"], stream["shift"]
    first = Stream(**stream)
    bare = {n: t for n, t in stream.items() if n not in ("gate", "residual", "modulation")}
    for second in (first, Stream(**bare)):
        ys = moe_ffn_pair(first, second)
        assert torch.equal(ys[0], fused(p)) and torch.equal(ys[1], moe_ffn(**vars(second)))


def test_wrong_gates_and_residuals_are_named():
    p = block(grad=False)
    for change, words in [
        (dict(gate=torch.zeros(2, D)), "gate: expected"),
        (dict(residual=p["residual"][:, 1:]), "residual: expected x.shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            fused({**p, **change})
    with pytest.raises(TypeError, match=r"modulation: expected \(scale, shift\)"):
        moe_ffn(p["x"], p["router"], p["w1"], p["w2"], modulation=p["scale"])


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_a_graph_break(grad):
    torch._dynamo.reset()
    p = block(grad)
    compiled = torch.compile(lambda p: fused(p, "cpu"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p), fused(p, "cpu"))


def test_autocast():
    p = block(grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = fused(p), composed(p)
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("k", [0, "dense"])
@pytest.mark.parametrize("return_routing", [False, True])
def test_without_routed_experts_the_router_is_not_looked_at(backend, k, return_routing):
    p = Case(k=k, T=B * S).build()
    p["x"] = p["x"].detach().view(B, S, -1).requires_grad_()
    p["router"].data.fill_(float("nan"))
    scale, shift = torch.randn(2, B, p["x"].shape[-1])
    y = moe_ffn(**p, top_k=k, shared=8, modulation=(scale, shift), backend=backend,
                return_routing=return_routing)  # fmt: skip
    y = y[0] if return_routing else y
    dx, drouter = torch.autograd.grad(y.sum(), (p["x"], p["router"]))
    assert y.isfinite().all() and dx.isfinite().all() and dx.any()
    assert torch.equal(drouter, torch.zeros_like(drouter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moe_ffn_with_a_router_of_the_other_precision(dtype):
    case = Case(T=B * S, D=8, dtype=torch.float64)
    p = {n: t.detach().to(dtype) for n, t in case.build(grad=False).items()}
    p["router"] = p["router"].to(torch.float32 if dtype == torch.float64 else torch.float64)
    p = {n: t.requires_grad_() for n, t in p.items()}
    scale, shift = torch.randn(2, 1, 8, dtype=dtype)
    for modulation in (None, (scale, shift)):
        y = moe_ffn(**p, top_k=2, shared=8, modulation=modulation)
        same = p | {"router": p["router"].to(dtype)}
        expected = moe_ffn(**same, top_k=2, shared=8, modulation=modulation)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        (drouter,) = torch.autograd.grad(y.sum(), p["router"])
        (known,) = torch.autograd.grad(expected.sum(), p["router"])
        torch.testing.assert_close(drouter, known, rtol=1e-4, atol=1e-5)


def test_the_cuda_back_end_rounds_a_wider_modulation_once(monkeypatch):
    """Its kernel reads scale and shift in x's dtype; others are modulated before it."""
    from d2m_kernels.backends import cuda, native, reference

    monkeypatch.setattr(native, "cuda_route_permute", reference.route)
    p = inputs(torch.bfloat16)
    scale, shift = p["scale"].float() + 1e-4, p["shift"].float() + 1e-4
    x_TD = p["x"].reshape(B * S, D)
    modulated, *_ = cuda.modulate_route(x_TD, scale, shift, 1e-6, p["router"], 2)
    exact = plain(p["x"].double(), scale.double(), shift.double()).view(B * S, D)
    assert torch.equal(modulated, exact.to(torch.bfloat16))
