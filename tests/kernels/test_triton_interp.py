"""The Triton kernels run under Triton's interpreter and compared with the reference.

Collected as usual this file starts pytest on itself with TRITON_INTERPRET=1 (see triton_cases.py);
there the tests below exist.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from helpers.triton_cases import INTERPRETED, run_interpreted

pytest.importorskip("triton")
PARTS = 4  # processes that share the tests
ONE_OF_EACH = (
    "random_numbers[None-dtype0]",
    "permute[12-2-127]",
    "grouped_gemm[70-64-64-2-swiglu-True-True-None-dtype0-small]",
    "grouped_gemm_backward[70-64-64-2-swiglu-True-True-dtype0-small]",
    "combine[129-100-7-2-dtype0]",
    "modulate_route[66-100-12-2-3-30-dtype0]",
    "gradients_with_every_kind_of_tile[gelu_tanh-small-dtype0]",
)

if not INTERPRETED:

    @pytest.mark.long
    def test_one_tile_of_every_op():
        printed = run_interpreted(__file__, "-k", " or ".join(ONE_OF_EACH))
        assert f"{len(ONE_OF_EACH)} passed" in printed

    @pytest.mark.slow
    @pytest.mark.parametrize("part", range(PARTS))
    def test_kernels_under_the_interpreter(part):
        run_interpreted(__file__, f"--part={part}/{PARTS}")


if INTERPRETED:
    import triton
    import triton.language as tl
    from helpers.cases import (
        Case,
        assert_as_good_as_torch,
        call,
        compare,
        compare_closely,
        compare_pair,
        run,
        run_pair,
        stream,
    )
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from d2m_kernels import Stream, combine, moe_ffn, moe_ffn_pair, why_two_calls
    from d2m_kernels.activations import pointwise
    from d2m_kernels.backends import reference
    from d2m_kernels.backends import triton as triton_backend
    from d2m_kernels.backends.triton import configs
    from d2m_kernels.backends.triton.down import Shared, down_shared
    from d2m_kernels.backends.triton.operands import Corners, neuron_columns
    from d2m_kernels.backends.triton.pieces import _corner_of, _group_of, _row_tiles
    from d2m_kernels.contract import FFNAttrs, FFNGrads, FFNInputs
    from d2m_kernels.eager import modulate

    pytestmark = [
        pytest.mark.usefixtures("poisoned"),
        pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy, about the NaN rows
        pytest.mark.filterwarnings("ignore:.*All-NaN.*:RuntimeWarning"),
    ]

    @triton.jit
    def _list_tiles_kernel(
        offsets_ptr, out_ptr, T, M, N, S, E, SHARED: tl.constexpr, BLOCK_E: tl.constexpr,
        P: tl.constexpr,
    ):  # fmt: skip
        """Group, row, column, half of a tile and the number of all, as the kernels find them."""
        tile = tl.program_id(0)
        spans = _row_tiles(offsets_ptr, T, M, N, S, E, SHARED, BLOCK_E, P, P.HALVES)
        tl.store(out_ptr + tile * 5 + 4, spans.total)
        if tile < spans.total:
            corners = Corners(0, 0, 0, 0, 0, 0)
            g = _group_of(tile, spans, T, N, S, corners, SHARED, P.HALVES)
            r0, n0 = _corner_of(g, P, P.HALVES)
            tl.store(out_ptr + tile * 5, tl.where(g.routed, g.expert, -1))
            tl.store(out_ptr + tile * 5 + 1, r0 - g.first)
            tl.store(out_ptr + tile * 5 + 2, n0)
            tl.store(out_ptr + tile * 5 + 3, tl.where(g.half, 1, 0))


TMA = "64x128x64w4s4p2tma"  # the smallest tile that goes through descriptors
PINS = ("small", TMA, "up=64x64x64w4s4p2tma,up_gated=64x64x64w4s4p2tma")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*size, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)


def random_ids(T, E, K, seed=0, masked=0.0):
    """[T, K] distinct ids, skewed toward expert 0; a share of the tokens masked."""
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(T, E, generator=g) + (torch.arange(E) == 0) * 0.5
    ids = score.argsort(-1, descending=True)[:, :K]
    off = torch.rand(T, generator=g) < masked
    return ids.masked_fill(off[:, None], -1).to(torch.int32)


def equal_integers(actual, expected, names):
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, e), name


def interpreted(function):
    """Defines a test only in the process that has the interpreter."""
    return function if INTERPRETED else None


# --------------------------------------------------------------------------------- route, permute


@interpreted
@pytest.mark.parametrize("T", [0, 1, 127, 129])
@pytest.mark.parametrize(
    "D,E,K", [(1, 1, 1), (5, 2, 2), (33, 3, 0), (100, 7, 2), (130, 12, 12), (33, 14, 3), (5, 64, 2)]
)
def test_route_equals_the_reference_on_exact_numbers(T, D, E, K):
    """Small integers make every sum exact, so that ids must agree to the last tie."""
    g = torch.Generator().manual_seed(T + D)
    x = torch.randint(-2, 3, (T, D), generator=g).to(torch.bfloat16)
    router = torch.randint(-1, 2, (E, D), generator=g).to(torch.bfloat16)
    mask = torch.rand(T, generator=g) < 0.7
    for mask_T, dtype in ((None, torch.bfloat16), (mask, torch.float32)):
        actual = triton_backend.route(x, router.to(dtype), K, mask_T)
        expected = reference.route(x, router, K, mask_T)
        equal_integers(actual[2:], expected[2:], ("ids", "offsets", "order", "inverse"))
        for a, e in zip(actual[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", [None, torch.float32])
def test_route_on_random_numbers(dtype, router_dtype):
    T, D, E, K = 129, 100, 12, 2
    x, router = randn(T, 2 * D, dtype=dtype)[:, 4 : 4 + D], randn(E, D, dtype=router_dtype or dtype)
    probs, weights, ids, offsets, order, inverse = triton_backend.route(x, router, K)
    logits = x.double() @ router.double().T
    torch.testing.assert_close(probs, logits.softmax(-1).float(), rtol=1e-4, atol=1e-6)
    chosen = logits.gather(-1, ids.long())
    torch.testing.assert_close(weights, chosen.softmax(-1).float(), rtol=1e-4, atol=1e-6)
    best = logits.sort(-1, descending=True).values
    clear = (best[:, :K] - best[:, 1 : K + 1]).amin(-1) > 1e-5
    assert clear.sum() > T // 2
    assert torch.equal(ids[clear].long(), reference.select(logits, K)[clear])
    equal_integers((offsets, order, inverse), reference.permute(ids, E), "oni")


@interpreted
def test_route_keeps_bad_rows_to_themselves():
    T, D, E, K = 70, 33, 7, 3
    x, router = randn(T, D), randn(E, D)
    clean = triton_backend.route(x, router, K)
    bad = x.clone()
    bad[3], bad[40, 5], bad[41] = float("nan"), float("inf"), 1e38
    broken = triton_backend.route(bad, router, K)
    rest = torch.ones(T, dtype=torch.bool)
    rest[[3, 40, 41]] = False
    for a, b in zip(clean[:3], broken[:3], strict=True):
        assert torch.equal(a[rest], b[rest])
    ids = broken[2]
    assert ids.min() >= 0 and ids.max() < E
    assert all(len(set(row)) == K for row in ids.tolist())
    expected = reference.route(bad, router, K)
    assert torch.equal(ids[3], expected[2][3])  # all NaN: the lowest ids
    equal_integers(broken[3:], reference.permute(ids, E), ("offsets", "order", "inverse"))


@interpreted
def test_ties_zeros_and_nan_logits_are_ordered_as_in_the_reference():
    D = E = 9
    x = torch.eye(D)[:1].repeat(6, 1)
    router = torch.zeros(E, D)
    router[:, 0] = torch.tensor([0.0, -0.0, 2.0, float("nan"), 2.0, -1.0, float("-inf"), 0.0, 2.0])
    x[:, 1:] = 0
    router[:, 1:] = 0
    for K in (1, 4, 9):
        actual, expected = triton_backend.route(x, router, K), reference.route(x, router, K)
        equal_integers(actual[2:], expected[2:], ("ids", "offsets", "order", "inverse"))


@interpreted
@pytest.mark.parametrize("T", [0, 1, 127, 300])
@pytest.mark.parametrize("E,K", [(1, 1), (2, 1), (3, 3), (12, 2), (64, 5), (256, 4)])
def test_permute(T, E, K):
    for masked in (0.0, 0.3, 1.0):
        ids = random_ids(T, E, K, seed=T + E, masked=masked)
        names = ("offsets", "order", "inverse")
        equal_integers(triton_backend.permute(ids, E), reference.permute(ids, E), names)


# -------------------------------------------------------------------------- grouped GEMM, combine


def own_grouped_gemm(x, w, offsets, w_gate, gather, bias, bias_gate, activation):
    """torch's own arithmetic in x's dtype, an expert at a time."""
    x = x if gather is None else x[gather.long()]
    out = x.new_zeros(x.shape[0], w.shape[1])
    for e, lo, hi in reference.spans(offsets):
        z = torch.nn.functional.linear(x[lo:hi], w[e], None if bias is None else bias[e])
        if w_gate is not None:
            b = None if bias_gate is None else bias_gate[e]
            gate = torch.nn.functional.linear(x[lo:hi], w_gate[e], b)
            out[lo:hi] = z * pointwise(activation, gate)
        else:
            out[lo:hi] = z if activation is None else pointwise(activation, z)
    return out


@interpreted
@pytest.mark.parametrize("pin", PINS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "M,K,N,E,activation,bias,gathered,view",
    [
        (129, 33, 100, 7, None, True, False, None),
        (127, 128, 130, 3, "gelu_tanh", False, True, "rows"),
        (70, 64, 64, 2, "swiglu", True, True, None),
        (200, 64, 33, 12, "geglu", False, False, "columns"),
        (1, 5, 1, 1, "relu", True, False, None),
        (0, 5, 4, 3, "silu", True, False, None),
        (64, 1, 5, 3, "gelu", True, True, "padded"),
    ],
)
def test_grouped_gemm(pin, dtype, M, K, N, E, activation, bias, gathered, view, monkeypatch):
    monkeypatch.setenv(configs.ENV, pin)
    gated = activation in ("swiglu", "geglu")

    def weights(seed):
        if view == "rows":  # E x N neurons inside a larger matrix
            return randn(E * N + 8, K, dtype=dtype, seed=seed)[8:].view(E, N, K)
        if view == "columns":  # expert e's K columns of one [N, E*K + 8] matrix
            w = randn(N, E * K + 8, dtype=dtype, seed=seed)
            return w[:, 8:].unflatten(1, (E, K)).transpose(0, 1)
        if view == "padded":
            return randn(E, N + 3, K + 5, dtype=dtype, seed=seed)[:, 1 : N + 1, 2 : K + 2]
        return randn(E, N, K, dtype=dtype, seed=seed)

    g = torch.Generator().manual_seed(M)
    x = randn(M, 2 * K, dtype=dtype)[:, :K]
    gather = torch.randint(0, M, (M + 3,), generator=g, dtype=torch.int32) if gathered else None
    R = M + 3 if gathered else M
    cuts = torch.randint(0, max(R - 2, 1), (E,), generator=g).sort().values  # the last rows: a tail
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts]).to(torch.int32)
    w, w_gate = weights(1), weights(2) if gated else None
    b = randn(E, N, dtype=dtype, seed=3) if bias else None
    b_gate = randn(E, N, dtype=dtype, seed=4) if bias and gated else None
    out = triton_backend.grouped_gemm(x, w, offsets, w_gate, gather, b, b_gate, activation)
    assert out.dtype == dtype and not out[int(offsets[-1]) :].any()
    wide = [None if t is None else t.double() for t in (x, w, w_gate, b, b_gate)]
    x64, w64, *rest = wide
    exact = reference.grouped_gemm(x64, w64, offsets, rest[0], gather, *rest[1:], activation)
    own = own_grouped_gemm(x, w, offsets, w_gate, gather, b, b_gate, activation)
    assert_as_good_as_torch(out, exact, own, "grouped_gemm")


@interpreted
@pytest.mark.parametrize("pin", PINS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "M,K,N,E,activation,bias,gathered",
    [
        (129, 33, 100, 7, None, True, False),
        (127, 128, 64, 3, "gelu_tanh", True, True),
        (70, 64, 64, 2, "swiglu", True, True),
        (90, 40, 33, 12, "geglu", False, False),
        (0, 5, 4, 3, "silu", True, False),
        (9, 1, 1, 2, None, True, True),
    ],
)
def test_grouped_gemm_backward(pin, dtype, M, K, N, E, activation, bias, gathered, monkeypatch):
    monkeypatch.setenv(configs.ENV, pin)
    gated = activation in ("swiglu", "geglu")
    g = torch.Generator().manual_seed(M)
    x = randn(M, 2 * K, dtype=dtype)[:, :K]
    gather = torch.randint(0, M, (M + 3,), generator=g, dtype=torch.int32) if gathered else None
    R = M + 3 if gathered else M
    cuts = torch.randint(0, max(R - 2, 1), (E,), generator=g).sort().values  # the last rows: a tail
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts]).to(torch.int32)
    w = randn(E, N + 3, K + 5, dtype=dtype, seed=1)[:, 1 : N + 1, 2 : K + 2]
    w_gate = randn(E, N, K, dtype=dtype, seed=2) if gated else None
    b = randn(E, N, dtype=dtype, seed=3) if bias else None
    b_gate = randn(E, N, dtype=dtype, seed=4) if bias and gated else None
    dout = randn(R, N, dtype=dtype, seed=5)
    dout[int(offsets[-1]) :] = float("nan")  # of rows that no expert owns
    needs = [True, True, gated, bias, bias and gated]
    tensors = (dout, x, w, offsets, w_gate, gather, b, b_gate)
    actual = triton_backend.grouped_gemm_bwd(*tensors, activation, needs)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    exact = reference.grouped_gemm_bwd(*wide, activation, needs)
    # torch's own: autograd through its arithmetic in this dtype
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, w_gate, b, b_gate)]
    out = own_grouped_gemm(
        leaves[0], leaves[1], offsets, leaves[2], gather, *leaves[3:], activation
    )
    live = torch.where(dout.isnan(), 0, dout)
    leaves = [t for t in leaves if t is not None]
    loss = (out * live).sum() + sum((t * 0).sum() for t in leaves)  # without rows: still a graph
    own = iter(torch.autograd.grad(loss, leaves))
    for name, a, e in zip(("x", "w", "w_gate", "b", "b_gate"), actual, exact, strict=True):
        if e is None:
            assert a is None
        else:
            assert_as_good_as_torch(a, e, next(own), f"{name} {activation}")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,D,E,K", [(129, 100, 7, 2), (1, 1, 1, 1), (0, 5, 3, 2), (9, 1030, 3, 3)])
def test_combine(dtype, T, D, E, K):
    ids = random_ids(T, E, K, masked=0.3)
    offsets, _, inverse = reference.permute(ids, E)
    y = randn(T * K, D + 3, dtype=dtype)[:, 1 : D + 1]
    y[int(offsets[-1]) :] = float("nan")  # rows of masked tokens must not be read into the sum
    weights, base, bias = randn(T, K).softmax(-1), randn(T, D, dtype=dtype), randn(D, dtype=dtype)
    inverse = inverse.view(T, K)
    for w, base_TD, bias_D in ((weights, base, bias), (None, None, None), (weights, None, bias)):
        out = triton_backend.combine(y, inverse, w, offsets, base_TD, bias_D, 1.7)
        wide = [None if t is None else t.double() for t in (y, w, base_TD, bias_D)]
        exact = reference.combine(wide[0], inverse, wide[1], offsets, *wide[2:], 1.7)
        own = reference.combine(y, inverse, w, offsets, base_TD, bias_D, 1.7)
        assert_as_good_as_torch(out, exact, own, "combine")


# -------------------------------------------------------------------------------------- the layer


@interpreted
@pytest.mark.parametrize(
    "pin,dtype",
    [*((PINS[0], d) for d in DTYPES), *((TMA, d) for d in DTYPES[:2]), (PINS[2], torch.bfloat16)],
)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_layer_and_gradients_with_every_kind_of_tile(pin, dtype, activation, monkeypatch):
    monkeypatch.setenv(configs.ENV, pin)
    # 130 tokens and 72 neurons leave ragged tiles; D = 64 and aligned rows let TMA in
    case = Case(T=130, D=64, S=64, H=72, E=3, k=2, activation=activation, dtype=dtype, scale=1.3)
    compare(case, "triton")


@interpreted
@pytest.mark.parametrize("k", [0, 1, 2, "E", "dense"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "geglu", "geglu_tanh"])
def test_layer_for_every_top_k(k, activation):
    case = Case(T=37, D=33, S=5, H=8, E=4, k=4 if k == "E" else k, activation=activation)
    compare(case, "triton")


@interpreted
@pytest.mark.parametrize("T", [0, 1, 127, 129])
@pytest.mark.parametrize(
    "D,S,H,E,k",
    [(1, 1, 1, 1, 1), (5, 0, 1, 7, 2), (33, 5, 3, 3, 3), (100, 33, 5, 12, 2), (130, 64, 4, 14, 2)],
)
def test_layer_on_odd_shapes(T, D, S, H, E, k):
    case = Case(T=T, D=D, S=S, H=H, E=E, k=k, seed=T + D)
    if H > 1:  # one neuron gives too few numbers to compare two bf16 errors by
        case.dtype = torch.bfloat16
        compare(case, "triton")
    else:
        compare_closely(case, "triton")


@interpreted
def test_many_experts_and_all_tokens_to_one():
    compare(Case(T=90, D=16, S=0, H=2, E=64, k=3), "triton")
    skew = Case(T=90, D=16, S=8, H=8, E=5, k=1)
    router = skew.build()["router"].detach().double()
    x = skew.build()["x"].detach().double()
    x[:, 0], router[:, 0] = 1.0, torch.tensor([0.0, 0.0, 90.0, 0.0, 0.0])
    skew.tensors = {"x": x, "router": router}
    compare(skew, "triton")


def layer_arguments(T=70, D=33, S=20, H=9, E=4, K=2, masked=0.3, activation="swiglu", seed=0):
    """dy, stream, z and attrs of ffn_bwd in fp32, with pre-activations drawn at random."""
    gated = activation in ("geglu", "geglu_tanh", "swiglu")
    F = S + E * H
    ids = random_ids(T, E, K, seed, masked)
    offsets, order, inverse = reference.permute(ids, E)
    weights = randn(T, K, seed=seed).softmax(-1).masked_fill(ids < 0, 0)
    gate = randn(F, D, seed=seed + 4) if gated else None
    stream = FFNInputs(
        randn(T, D, seed=seed + 2), randn(F, D, seed=seed + 3), gate, randn(D, F, seed=seed + 5),
        None, None, None, weights, offsets, order, inverse,
    )  # fmt: skip
    zs = tuple(
        randn(*size, seed=seed + i)
        for i, size in ((6, (T, S * (1 + gated))), (7, (T * K, H * (1 + gated))))
    )
    return randn(T, D, seed=seed + 1), stream, zs, FFNAttrs(S, activation, scale=1.3)


def gradients(back_end, arguments, frozen, skip=()):
    dy, s, zs, attrs = arguments
    like = s._replace(b_up=s.up[:, 0], b_gate=s.up[:, 0], b2=s.w2[:, 0])
    absent = {*skip} | ({"gate", "b_gate"} if s.gate is None else set())
    grads = FFNGrads(*(
        None if name in absent else torch.full_like(getattr(like, name), float("nan"))
        for name in FFNGrads._fields
    ))  # fmt: skip
    back_end.ffn_bwd([dy], [s], [zs], attrs._replace(frozen=frozen), [grads])
    return {name: g for name, g in grads._asdict().items() if g is not None}


@interpreted
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("frozen", [0, 7, 20])
@pytest.mark.parametrize("masked", [0.3, 1.0])
def test_backward_fills_every_buffer(activation, frozen, masked):
    """Frozen neurons, masked tokens, experts without tokens: written as zero, never left out."""
    arguments = layer_arguments(activation=activation, masked=masked)
    actual = gradients(triton_backend, arguments, frozen)
    expected = gradients(reference, arguments, frozen)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    assert not actual["up"][:frozen].any() and not actual["w2"][:, :frozen].any()
    if masked == 1.0:
        assert not actual["up"][20:].any() and not actual["weights"].any()


@interpreted
@pytest.mark.parametrize(
    "skip",
    [("x",), ("up", "gate", "b_up", "b_gate"), ("w2",), ("weights",),
     ("x", "up", "gate", "b_up", "b_gate", "w2"), ("x", "up", "gate", "w2", "weights")],
)  # fmt: skip
def test_backward_of_a_part(skip):
    arguments = layer_arguments()
    expected = gradients(reference, arguments, 20)
    for name, grad in gradients(triton_backend, arguments, 20, skip).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@interpreted
def test_incoming_gradient_of_any_strides():
    arguments = layer_arguments()
    expected = gradients(triton_backend, (torch.ones(70, 33), *arguments[1:]), 0)
    one, row, flipped = torch.ones(1), torch.ones(1, 33), torch.ones(33, 70)
    for dy in (one.expand(70, 33), row.expand(70, 33), flipped.T):
        for name, grad in gradients(triton_backend, (dy, *arguments[1:]), 0).items():
            assert torch.equal(grad, expected[name]), name


@interpreted
def test_down_projection_with_gate_and_residual_of_the_block():
    """residual + gate[sample] * (h W^T + b + routed rows), as a DiT block ends."""
    T, D, S, E, K = 60, 33, 20, 4, 2
    ids = random_ids(T, E, K, masked=0.3)
    offsets, _, inverse = reference.permute(ids, E)
    h, w2, y2 = randn(T, S), randn(D, S + 8), randn(T * K, D)
    bias, gate, residual = randn(D), randn(3, D), randn(T, D + 1)[:, 1:]
    weights, inverse = randn(T, K).softmax(-1), inverse.view(T, K)
    out = torch.full((T, D), float("nan"))
    end = Shared(
        h, neuron_columns(w2, S, 2), out, offsets, y2=y2, inverse_TK=inverse, weights_TK=weights,
        bias=bias, adaln_BD=gate, residual_TD=residual,
    )  # fmt: skip
    down_shared("down_combine", [end], None, S=S, scale=1.3)
    inner = reference.combine(y2, inverse, weights, offsets, h @ w2[:, :S].T, bias, 1.3)
    expected = residual + gate.repeat_interleave(T // 3, 0) * inner
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_two_runs_are_bitwise_equal():
    case = Case(T=90, D=33, S=20, H=9, E=4, k=2, activation="swiglu", dtype=torch.bfloat16)
    first, second = (call(case, "triton")(case.build(grad=False)) for _ in range(2))
    assert torch.equal(first, second)
    arguments = layer_arguments()
    first, second = (gradients(triton_backend, arguments, 0) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@interpreted
def test_a_bad_row_stays_that_rows_problem():
    case = Case(T=70, D=33, S=20, H=9, E=4, k=2)
    p = case.build(grad=False)
    clean = call(case, "triton")(p)
    sound = p["x"].clone()
    p["x"][11], p["x"][50, 3] = float("nan"), float("inf")
    broken, routing = call(case, "triton", return_routing=True)(p)
    rest = torch.ones(70, dtype=torch.bool)
    rest[[11, 50]] = False
    torch.testing.assert_close(broken[rest], clean[rest], rtol=1e-5, atol=1e-5)
    assert not broken[11].isfinite().any()
    # Finite rows in the places of the bad ones: what these hold reaches no other row's rounding.
    broken, same_places = (
        call(case, "triton", routing=routing)({**p, "x": x}) for x in (p["x"], sound)
    )
    assert torch.equal(broken[rest], same_places[rest])


@interpreted
def test_masked_tokens_get_the_shared_expert_only():
    case = Case(T=40, D=16, S=8, H=8, E=4, k=2)
    p = case.build(grad=False)
    mask = torch.arange(40) % 3 != 0
    y = call(case, "triton", token_mask=mask)(p)
    shared = call(case, "triton", top_k=0)(p)
    torch.testing.assert_close(y[~mask], shared[~mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, call(case, "reference", token_mask=mask)(p), rtol=1e-4, atol=1e-5)


@interpreted
def test_dense_equals_the_dense_ffn_and_slices_of_stacked_weights():
    case = Case(T=40, D=32, S=16, H=8, E=4, k="dense")
    p = case.build(grad=False)
    p["w1"] = torch.cat([randn(3, 32), p["w1"]])[3:]
    p["w2"] = torch.cat([randn(32, 5), p["w2"]], dim=1)[:, 5:]  # as in proj_out: [attention | mlp]
    hidden = pointwise("gelu_tanh", p["x"] @ p["w1"].T + p["b1"])
    expected = hidden @ p["w2"].T + p["b2"]
    torch.testing.assert_close(call(case, "triton")(p), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_public_combine_and_its_gradient():
    case = Case(T=20, D=16, S=0, H=8, E=4, k=2)
    p = case.build(grad=False)
    _, routing = moe_ffn(**p, **case.kwargs(), backend="triton", return_routing=True)
    y = randn(40, 16).requires_grad_()
    for back_end in ("triton", "reference"):
        out = combine(y, routing, backend=back_end)
        (grad,) = torch.autograd.grad(out.square().sum(), y)
        if back_end == "triton":
            first = out, grad
    torch.testing.assert_close(first, (out, grad), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- two streams


@interpreted
@pytest.mark.parametrize("pin", PINS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu"])
def test_two_streams_with_every_kind_of_tile(pin, activation, monkeypatch):
    monkeypatch.setenv(configs.ENV, pin)
    size = dict(D=64, S=64, H=72, E=3, k=2, activation=activation, dtype=torch.bfloat16, scale=1.3)
    cases = Case(T=130, seed=1, **size), Case(T=21, seed=2, **size)
    streams = [stream(c, c.build()) for c in cases]
    assert why_two_calls(*streams, backend="triton") is None
    compare_pair(cases, "triton")


@interpreted
@pytest.mark.parametrize("tokens", [(0, 9), (70, 0), (0, 0), (1, 70)])
@pytest.mark.parametrize(
    "D,S,H,E,k", [(1, 1, 1, 1, 1), (33, 0, 5, 7, 2), (5, 8, 3, 3, 0), (20, 8, 4, 2, "dense")]
)
def test_two_streams_of_odd_shapes(tokens, D, S, H, E, k):
    size = dict(D=D, S=S, H=H, E=E, k=k)
    cases = [Case(T=T, seed=T + i, **size) for i, T in enumerate(tokens)]
    inputs = [case.build() for case in cases]
    for ours, case, p in zip(run_pair(cases, inputs, "triton"), cases, inputs, strict=True):
        for name, value in run(call(case, "triton"), p).items():
            assert torch.equal(ours[name], value), name


@interpreted
def test_two_streams_equal_two_calls_bitwise():
    """With masks, a frozen shared expert, a bias in one of them and all tokens to one expert."""
    size = dict(D=32, S=16, H=8, E=4, k=2, activation="swiglu")
    cases = Case(T=90, seed=1, bias=False, **size), Case(T=30, seed=2, **size)
    router = torch.zeros(4, 32, dtype=torch.float64)
    router[2, 0] = router[3, 1] = 50
    cases[1].tensors = {"router": router, "x": torch.ones(30, 32, dtype=torch.float64)}
    inputs = [case.build() for case in cases]
    masks = [torch.arange(c.T) % 3 != 0 for c in cases]
    extra = [dict(token_mask=m, freeze_shared=True) for m in masks]
    together = run_pair(cases, inputs, "triton", extra)
    for ours, case, p, e in zip(together, cases, inputs, extra, strict=True):
        for name, value in run(call(case, "triton", **e), p).items():
            assert torch.equal(ours[name], value), name


@interpreted
def test_two_streams_take_one_launch_a_stage(monkeypatch):
    stages = []
    for name in ("act_bwd", "down", "grouped_gemm", "weight_grads"):
        module = importlib.import_module(f"d2m_kernels.backends.triton.{name}")
        plain = module.launch

        def counted(kernel, stage, *args, plain=plain):
            stages.append(stage)
            return plain(kernel, stage, *args)

        monkeypatch.setattr(module, "launch", counted)
    size = dict(D=16, S=8, H=8, E=4, k=2)
    cases = Case(T=20, seed=1, **size), Case(T=9, seed=2, **size)
    run_pair(cases, [case.build() for case in cases], "triton")
    assert stages == ["up", "down", "down_combine", "act_bwd", "dx", "dx_combine", *["wgrad"] * 2]


@interpreted
def test_a_bad_row_of_one_stream_leaves_the_other_alone():
    size = dict(D=16, S=8, H=8, E=4, k=2)
    cases = Case(T=20, seed=1, **size), Case(T=70, seed=2, **size)
    inputs = [case.build() for case in cases]
    clean = run_pair(cases, inputs, "triton")
    with torch.no_grad():
        inputs[0]["x"][11] = float("nan")
    broken = run_pair(cases, inputs, "triton")
    for name in clean[1]:
        assert torch.equal(clean[1][name], broken[1][name]), name
    assert broken[0]["y"][11].isnan().all()


# ------------------------------------------------------------- a block's AdaLN, gate and residual


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T,D,E,K,B,mean",
    [(1, 1, 1, 1, 1, 0), (10, 33, 3, 2, 2, 30), (66, 100, 12, 2, 3, 30), (130, 64, 14, 3, 1, 0),
     (9, 300, 64, 0, 3, 3), (0, 5, 3, 2, 1, 0), (4, 24, 256, 2, 2, 0)],
)  # fmt: skip
def test_modulate_route(dtype, T, D, E, K, B, mean):
    x = (randn(T, 2 * D, dtype=torch.float64)[:, :D] + mean).to(dtype)
    scale, shift = (randn(B, 3 * D, dtype=dtype, seed=i)[:, D : 2 * D] for i in (1, 2))
    router = randn(E, D)
    modulated, *routing = triton_backend.modulate_route(x, scale, shift, 1e-6, router, K)
    wide = modulate(x.double(), scale.double(), shift.double(), 1e-6)
    unit = torch.finfo(dtype).eps  # and fp32 knows x - mean to mean * 6e-8
    assert ((modulated.double() - wide).abs() <= unit * wide.abs() + 3e-6 * (1 + mean)).all()
    for a, e in zip(routing, triton_backend.route(modulated, router, K), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)


@interpreted
def test_modulated_rows_do_not_touch_each_other():
    x, router = randn(70, 33), randn(7, 33)
    scale, shift = randn(2, 33, seed=1), randn(2, 33, seed=2)
    clean = triton_backend.modulate_route(x, scale, shift, 1e-6, router, 3)
    x[3], x[40, 5] = float("nan"), float("inf")
    broken = triton_backend.modulate_route(x, scale, shift, 1e-6, router, 3)
    rest = torch.ones(70, dtype=torch.bool)
    rest[[3, 40]] = False
    for a, b in zip(clean[:4], broken[:4], strict=True):
        assert torch.equal(a[rest], b[rest])
    assert broken[3].min() >= 0 and broken[3].max() < 7


@interpreted
@pytest.mark.parametrize("S,k", [(8, 2), (0, 2), (8, 0), (8, "dense")])
@pytest.mark.parametrize("pair", [False, True])
def test_block_in_the_layers_launches(S, k, pair, monkeypatch):
    """LayerNorm, modulation, gate and residual, fused, against the block written out."""
    case = Case(T=36, D=32, S=S, H=8, E=4, k=k, scale=1.3)
    p = case.build(grad=False)
    x, residual, six = p.pop("x").view(3, 12, 32) + 1, randn(3, 12, 32), randn(3, 4 * 32)
    scale, shift, gate, _ = six.chunk(4, -1)
    ffn = importlib.import_module("d2m_kernels.ffn")
    monkeypatch.setattr(ffn, "finish_block", None)  # not to be needed
    ends = dict(modulation=(scale, shift), gate=gate, residual=residual)
    if pair:
        first = Stream(x, **p, **case.kwargs(), **ends)
        second = Stream(x[:, :2], **p, **case.kwargs())
        y, other = moe_ffn_pair(first, second, backend="triton")
        alone = moe_ffn(**vars(second), backend="reference")
        torch.testing.assert_close(other, alone, rtol=1e-4, atol=1e-5)
    else:
        y = moe_ffn(x, **p, **case.kwargs(), **ends, backend="triton")
    modulated = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    modulated = modulated * (1 + scale[:, None]) + shift[:, None]
    inner = moe_ffn(modulated, **p, **case.kwargs(), backend="reference")
    torch.testing.assert_close(y, residual + gate[:, None] * inner, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ many experts


@interpreted
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_forward_with_256_experts(activation):
    case = Case(T=40, D=8, S=4, H=2, E=256, k=3, activation=activation)
    p = case.build(grad=False)
    y, r = call(case, "triton", return_routing=True)(p)
    expected, routing = call(case, "reference", return_routing=True)(p)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    equal_integers(
        (r.ids, r.offsets, r.order), (routing.ids, routing.offsets, routing.order), "ioo"
    )
    h = randn(256, 6, 8)
    gemm = (p["x"], h, r.offsets, None, r.order // 3, None, None, "silu")
    out = triton_backend.grouped_gemm(*gemm)
    torch.testing.assert_close(out, reference.grouped_gemm(*gemm), rtol=1e-4, atol=1e-5)
    y = randn(120, 8)
    slots = (y, r.inverse.view(40, 3), r.weights, r.offsets)
    torch.testing.assert_close(triton_backend.combine(*slots), reference.combine(*slots))


# --------------------------------------------------------------- a group's last rows in half a tile


@interpreted
@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu"])
def test_half_tiles_give_the_same_bits(activation, monkeypatch):
    """Experts with 1, 64, 65, 0 and 190 rows, a shared expert with 160: all kinds of last tile."""
    wide = configs.named("128x128x64w8s4p1halftma")
    assert wide.halves
    size = dict(D=16, S=16, H=16, E=5, k=2, activation=activation, dtype=torch.bfloat16)
    case = Case(T=160, **size)
    p = case.build(grad=False)
    counts = torch.tensor([1, 64, 65, 0, 190])
    flat = torch.arange(5).repeat_interleave(counts)
    ids = torch.stack([flat[:160], flat[160:]], dim=1).to(torch.int32)
    p["x"] = torch.zeros_like(p["x"])
    p["x"][:, :5] = 4.0 * (torch.nn.functional.one_hot(ids.long(), 5).sum(1) > 0)
    p["router"] = torch.eye(16)[:5].to(torch.bfloat16) + torch.arange(5)[:, None] * 1e-2
    results = []
    for name in ("128x128x64w8s4p1tma", wide.name, "small"):
        monkeypatch.setenv(configs.ENV, name)
        results.append(call(case, "triton", return_routing=True)(p))
    assert torch.equal(results[0][0], results[1][0])
    rows = results[0][1].offsets.diff()
    assert (rows % 128 > 64).any() and ((rows % 128 <= 64) & (rows % 128 > 0)).any()
    assert_as_good_as_torch(
        results[1][0], call(case, "reference")({n: t.double() for n, t in p.items()}),
        results[2][0], "half tiles",
    )  # fmt: skip
    experts, gather = p["w2"].T.reshape(6, 16, 16)[1:], results[0][1].order // 2
    gemm = (p["x"], experts, results[0][1].offsets, None, gather, None, None, None)
    monkeypatch.setenv(configs.ENV, wide.name)
    out = triton_backend.grouped_gemm(*gemm)
    monkeypatch.setenv(configs.ENV, "128x128x64w8s4p1tma")
    assert torch.equal(out, triton_backend.grouped_gemm(*gemm))


@interpreted
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("counts", [(1, 64, 65, 0, 190), (0, 0, 320, 0, 0)])
@pytest.mark.parametrize("T", [0, 130, 1300])
def test_tiles_come_in_the_order_that_is_simulated(T, counts, halves):
    """Every tile once; whole ones of all groups first."""
    from harness.schedule import tiles_of

    from d2m_kernels.backends.triton.launch import product

    config = configs.named("128x64x32w4s2" + "half" * halves)
    M, N, S = sum(counts), 100, 200
    P = product(config, randn(1, dtype=torch.bfloat16), (N, S), 32, 32)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    expected = tiles_of([(n, N) for n in counts], (T, S) if T else None, config, halves)
    found = torch.full((len(expected) + 1, 5), -9, dtype=torch.int32)
    _list_tiles_kernel[(len(found),)](offsets, found, T, M, N, S, len(counts), T > 0, 8, P)
    assert found[-1].tolist() == [-9, -9, -9, -9, len(expected)]
    assert [tuple(row[:4]) for row in found[:-1].tolist()] == [tuple(map(int, t)) for t in expected]


# ------------------------------------------------------------------------------- the table of tiles


@interpreted
def test_pinning_understands_stages_and_ignores_nonsense(monkeypatch):
    x = torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setenv(configs.ENV, f"up={TMA},wgrad=small")
    assert configs.select("up", x, 1e6, 64, (64, 33)).name == TMA
    assert configs.select("wgrad", x, 1e6, 64, (64, 48)) is configs.SMALL
    for nonsense in ("up=nothing", "side=small", "up=128x96x64w8s3", "up=128x16x64w8s3"):
        monkeypatch.setenv(configs.ENV, nonsense)
        with pytest.warns(UserWarning, match=f"ignored '{nonsense}'; .*expected"):
            config = configs.select("up", x, 1e6, 64, (64,))
        assert config is configs.SMALL  # the CPU's only wide tile
    monkeypatch.setenv(configs.ENV, TMA)
    assert {configs.select(s, x, 1, 1, (1,)).name for s in configs.STAGES} == {TMA}


@interpreted
def test_any_tile_can_be_pinned_by_its_name():
    full = "256x64x128w16s5p3g4r96halftmaatmastaticnofenceexact"
    config = configs.named(full)
    assert config.name == full and (config.group_m, config.max_registers) == (4, 96)
    assert config.shared_tma and not (config.tickets or config.fence or config.approx)
    for arch in configs.TABLE:
        for stage in configs.STAGES:
            for config in configs.candidates(stage, arch):
                assert configs.named(config.name) == config
                assert configs.named(configs.without_halves(config).name).halves is False


@interpreted
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_every_stage_has_a_rule_for_any_size(arch, monkeypatch):
    monkeypatch.setattr(configs, "arch_of", lambda *_: arch)
    x = torch.zeros(1, dtype=torch.bfloat16)
    for stage in configs.STAGES:
        sizes = [(r, w, (w, 3072)) for r in (1, 200, 1e5) for w in (16, 3072)]
        chosen = {configs.select(stage, x, *size) for size in sizes}
        assert chosen <= set(configs.candidates(stage, arch)) - {configs.SMALL}
        assert configs.select(stage, x, 1e5, 3072, (3072, 3080)) is configs.RAGGED


@interpreted
def test_a_tile_that_does_not_fit_falls_back(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from d2m_kernels.backends.triton import launch

    used = []

    class Kernel:
        def __getitem__(self, grid):
            def run(columns, ticket_ptr, **meta):
                used.append(columns)
                if columns > 64:
                    raise OutOfResources(250_000, 232_448, "shared memory")

            return run

    big = configs.named(TMA)
    with pytest.warns(RuntimeWarning, match="does not fit here"):
        arguments, cpu = lambda c: dict(columns=c.block_n), torch.device("cpu")
        launch.launch(Kernel(), "up", big, cpu, arguments, None)
    assert used == [128, 64]


# ------------------------------------------------------------------------------- any shape at all


if INTERPRETED:
    # No shrinking: at half a second an example it takes minutes; the shapes are printed anyway.
    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.reuse, Phase.generate), print_blob=True,
    )  # fmt: skip
    @given(
        T=st.integers(0, 140), D=st.integers(1, 70), S=st.integers(0, 70), H=st.integers(1, 40),
        E=st.integers(1, 9), k=st.integers(0, 9), seed=st.integers(0, 99),
        activation=st.sampled_from(["gelu_tanh", "relu", "geglu"]), pin=st.sampled_from(PINS),
    )  # fmt: skip
    def test_any_shape(T, D, S, H, E, k, seed, activation, pin):
        os.environ[configs.ENV] = pin
        try:
            case = Case(T=T, D=D, S=S, H=H, E=E, k=min(k, E), activation=activation, seed=seed)
            compare_closely(case, "triton")
        finally:
            del os.environ[configs.ENV]
