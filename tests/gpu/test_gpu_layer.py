"""`moe_ffn` and its stages on a GPU: the CPU tests' comparisons, and what only a GPU can show.

Skipped as a whole where there is no GPU. `tests/gpu/run.sh` builds and runs all of it offline.
"""

from __future__ import annotations

import fcntl
import gc
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.cases import (
    Case,
    available,
    call,
    checkpointed,
    compare,
    compare_pair,
    run,
    run_pair,
    stream,
)

from d2m_kernels import (
    Stream,
    grouped_gemm,
    modulate_route,
    moe_ffn,
    moe_ffn_pair,
    permute,
    route,
    why_two_calls,
)
from d2m_kernels.eager import modulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BACKENDS = ["triton", "cuda", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if torch.cuda.is_available() and not available(request.param, "cuda", torch.bfloat16):
        pytest.skip(f"the back-end {request.param} is not available")
    return request.param


def serves(backend, dtype):
    if not available(backend, "cuda", dtype):
        pytest.skip(f"{backend} does not serve {dtype} on CUDA")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [0, 1, 2, 4, "dense"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_dtypes_and_top_k(backend, dtype, k, activation):
    serves(backend, dtype)
    compare(Case(k=k, dtype=dtype, activation=activation, scale=2.0, device="cuda"), backend)


@pytest.mark.parametrize("T", [0, 1, 127, 128, 129, 1536])
@pytest.mark.parametrize(
    "D,S,H,E,k",
    [
        (1, 1, 1, 1, 1),
        (5, 0, 1, 7, 2),
        (33, 5, 3, 3, 3),
        (100, 33, 5, 14, 2),
        (130, 64, 40, 64, 7),
        (256, 256, 64, 12, 2),
        (192, 128, 128, 2, 1),
        (64, 32, 8, 256, 5),
    ],
)
def test_shapes(backend, T, D, S, H, E, k):
    compare(Case(T=T, D=D, S=S, H=H, E=E, k=k, dtype=torch.bfloat16, device="cuda"), backend)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "geglu", "geglu_tanh"])
def test_other_activations_without_bias(backend, activation):
    case = Case(T=200, D=128, S=0, H=64, activation=activation, bias=False, dtype=torch.bfloat16,
                device="cuda")  # fmt: skip
    compare(case, backend)


def test_flux_shape(backend):
    case = Case(T=1536, D=3072, S=3072, H=768, E=12, k=2, dtype=torch.bfloat16, device="cuda")
    compare(case, backend)


def test_all_tokens_to_one_expert(backend):
    router = torch.zeros(4, 64, dtype=torch.float64)
    router[2, 0] = 50
    x = torch.randn(3000, 64, dtype=torch.float64)
    x[:, 0] = 1
    case = Case(T=3000, D=64, S=32, H=64, k=1, tensors={"router": router, "x": x},
                dtype=torch.bfloat16, device="cuda")  # fmt: skip
    compare(case, backend)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_one_rows_problem(backend, bad):
    case = Case(T=300, D=64, S=32, H=32, dtype=torch.bfloat16, device="cuda")
    p = case.build(grad=False)
    clean = call(case, backend)(p)
    p["x"][17] = bad
    y, routing = call(case, backend, return_routing=True)(p)
    assert 0 <= routing.ids.min().item() and routing.ids.max().item() < case.E
    others = torch.arange(300, device="cuda") != 17
    assert torch.equal(y[others], clean[others])


def test_masked_tokens(backend):
    case = Case(T=300, D=64, S=32, H=32, dtype=torch.bfloat16, device="cuda")
    p = case.build()
    mask = torch.rand(300, device="cuda") < 0.6
    y, r = call(case, backend, token_mask=mask, return_routing=True)(p)
    full, shared = call(case, backend)(p), call(case, backend, top_k=0)(p)
    torch.testing.assert_close(y[mask], full[mask], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y[~mask], shared[~mask], rtol=2e-2, atol=2e-2)
    assert r.offsets[-1] == 2 * mask.sum() and (r.ids[~mask] == -1).all()


@pytest.mark.parametrize("E", [2, 12, 64, 256])
@pytest.mark.parametrize("T", [1, 129, 4608])
def test_route_is_the_references(backend, T, E):
    # Small integers: every logit is exact, so ties are real and the ids must be the same.
    g = torch.Generator().manual_seed(T + E)
    x = torch.randint(-3, 4, (T, 96), generator=g).to("cuda", torch.bfloat16)
    router = torch.randint(-2, 3, (E, 96), generator=g).float().cuda()
    r = route(x, router, top_k=2, backend=backend)
    expected = route(x, router, top_k=2, backend="reference")
    for name in ("ids", "offsets", "order", "inverse"):
        assert torch.equal(getattr(r, name), getattr(expected, name)), name
    torch.testing.assert_close(r.probs, expected.probs)
    torch.testing.assert_close(r.weights, expected.weights)


@pytest.mark.parametrize("T", [0, 7, 4608, 200_000])
def test_permute_is_a_stable_sort(backend, T):
    ids = torch.randint(-1, 12, (T, 2), dtype=torch.int32, device="cuda")
    offsets, order, inverse = permute(ids, 12, backend=backend)
    key = torch.where(ids < 0, 12, ids).reshape(-1)
    assert torch.equal(order.long(), key.argsort(stable=True))
    assert torch.equal(order[inverse.long()].long(), torch.arange(2 * T, device="cuda"))
    assert offsets.tolist() == [0, *torch.bincount(key, minlength=13)[:12].cumsum(0).tolist()]


def test_two_streams_of_work_and_poisoned_memory(backend):
    """Freed memory full of NaN is what the next call's buffers are made of."""
    case = Case(T=513, D=128, S=64, H=64, E=12, dtype=torch.bfloat16, device="cuda")
    first = run(call(case, backend), case.build())
    poison = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    del poison
    second = run(call(case, backend), case.build())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        third = run(call(case, backend), case.build())
    side.synchronize()
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], third[name]), name


def test_a_hundred_runs_are_bitwise_equal(backend):
    case = Case(T=1000, D=256, S=256, H=64, E=12, dtype=torch.bfloat16, device="cuda")
    p = case.build()
    first = run(call(case, backend), p)
    for _ in range(99):
        again = run(call(case, backend), p)
        for name in first:
            assert torch.equal(first[name], again[name]), name


def test_no_host_sync(backend):
    case = Case(T=512, D=128, S=64, H=64, dtype=torch.bfloat16, device="cuda")
    p = case.build()
    run(call(case, backend), p)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(case, backend)(p).backward(torch.ones(512, 128, device="cuda", dtype=torch.bfloat16))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_follows_changed_routing(backend):
    case = Case(T=512, D=128, S=64, H=64, E=12, dtype=torch.bfloat16, device="cuda")
    p = case.build(grad=False)
    for _ in range(3):
        call(case, backend)(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(case, backend)(p)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        p["x"].copy_(torch.randn_like(p["x"]))
        p["router"].copy_(torch.randn_like(p["router"]))  # other experts, other counts
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, call(case, backend)(p))


def two_streams(first, second, **changes):
    sizes = dict(D=128, S=64, H=64, E=12, dtype=torch.bfloat16, device="cuda") | changes
    return Case(T=first, seed=1, **sizes), Case(T=second, seed=2, **sizes)


@pytest.mark.parametrize("tokens", [(4096, 512), (1000, 77), (0, 129), (130, 0), (1, 1)])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_two_streams(backend, tokens, activation):
    compare_pair(two_streams(*tokens, activation=activation), backend)


@pytest.mark.parametrize("k", [0, 1, "dense"])
def test_two_streams_of_odd_sizes(backend, k):
    compare_pair(two_streams(333, 50, D=33, S=5, H=40, E=3, k=k, scale=2.0), backend)


def test_two_streams_of_the_flux_shape(backend):
    cases = two_streams(4096, 512, D=3072, S=3072, H=768)
    if backend == "triton":
        streams = [stream(c, c.build(grad=False)) for c in cases]
        assert why_two_calls(*streams, backend=backend) is None
    compare_pair(cases, backend)


def test_two_streams_equal_two_calls(backend):
    """One text expert gets every token; masks, and a bias in one stream only."""
    cases = two_streams(1000, 200)
    cases[1].bias = False
    inputs = [case.build() for case in cases]
    with torch.no_grad():
        inputs[1]["router"].zero_()
    extra = [dict(token_mask=torch.arange(c.T, device="cuda") % 3 != 0) for c in cases]
    together = run_pair(cases, inputs, backend, extra)
    for ours, case, p, e in zip(together, cases, inputs, extra, strict=True):
        for name, value in run(call(case, backend, **e), p).items():
            torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-2, msg=name)


def test_two_streams_without_host_sync_and_in_a_graph(backend):
    cases = two_streams(512, 100)
    inputs = [case.build(grad=False) for case in cases]
    streams = [stream(c, p) for c, p in zip(cases, inputs, strict=True)]
    for _ in range(3):
        moe_ffn_pair(*streams, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_ffn_pair(*streams, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = moe_ffn_pair(*streams, backend=backend)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        for p in inputs:  # other experts, other counts
            p["x"].copy_(torch.randn_like(p["x"]))
            p["router"].copy_(torch.randn_like(p["router"]))
        for y in ys:
            y.fill_(float("nan"))
        graph.replay()
        expected = moe_ffn_pair(*streams, backend=backend)
        assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "T,D,E,k,B,mean",
    [
        (4608, 3072, 12, 2, 1, 0),
        (4096, 3072, 12, 2, 2, 5),
        (66, 100, 7, 2, 3, 20),
        (9, 33, 3, 1, 3, 0),
        (512, 256, 14, 3, 2, 0),
        (100, 64, 256, 5, 4, 0),
        (0, 8, 4, 2, 1, 0),
        (30_000, 64, 12, 2, 3, 0),
    ],
)
def test_modulate_route(backend, dtype, T, D, E, k, B, mean):
    serves(backend, dtype)
    g = torch.Generator().manual_seed(T)
    x = (torch.randn(T, D, generator=g) + mean).to("cuda", dtype)
    scale, shift, _ = torch.randn(B, 3 * D, generator=g).to("cuda", dtype).chunk(3, -1)
    router = torch.randn(E, D, generator=g).cuda()
    modulated, r = modulate_route(x, scale, shift, router, top_k=k, backend=backend)
    wide = modulate(x.double(), scale.double(), shift.double(), 1e-6)
    room = torch.finfo(dtype).eps * wide.abs() + 3e-6 * (1 + mean)
    assert ((modulated.double() - wide).abs() <= room).all()
    again = route(modulated, router, top_k=k, backend=backend)
    for name in ("ids", "offsets", "order", "inverse"):
        assert torch.equal(getattr(r, name), getattr(again, name)), name


@pytest.mark.parametrize("k", [0, 2, "dense"])
@pytest.mark.parametrize("S", [0, 128])
def test_a_blocks_adaln_gate_and_residual(backend, k, S):
    case = Case(T=600, D=256, S=S, H=64, E=12, k=k, dtype=torch.bfloat16, device="cuda")
    p = case.build(grad=False)
    x = p.pop("x").view(3, 200, 256)
    residual, six = torch.randn_like(x), torch.randn(3, 768, device="cuda").bfloat16()
    scale, shift, gate = six.chunk(3, -1)
    block = dict(modulation=(scale, shift), gate=gate, residual=residual)
    y = moe_ffn(x, **p, **case.kwargs(), **block, backend=backend)
    modulated, _ = modulate_route(x, scale, shift, p["router"], backend=backend)
    inner = moe_ffn(modulated, **p, **case.kwargs(), backend=backend)
    torch.testing.assert_close(y, residual + gate[:, None] * inner, rtol=3e-2, atol=6e-2)
    pair = (Stream(x, **p, **case.kwargs(), **block), Stream(x[:, :50], **p, **case.kwargs()))
    y_pair, bare = moe_ffn_pair(*pair, backend=backend)
    torch.testing.assert_close(y_pair, y, rtol=3e-2, atol=6e-2)
    torch.testing.assert_close(
        bare, moe_ffn(**vars(pair[1]), backend=backend), rtol=3e-2, atol=3e-2
    )


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("T", [700, 4608])
def test_half_tiles_give_the_same_result(activation, T, monkeypatch):
    """The variant of the tiles that skips the empty half of a group's last one."""
    configs = pytest.importorskip("d2m_kernels.backends.triton.configs")
    serves("triton", torch.bfloat16)
    case = Case(T=T, D=256, S=128, H=128, E=12, activation=activation, dtype=torch.bfloat16,
                device="cuda")  # fmt: skip
    p = case.build(grad=False)
    x, arch = p["x"], configs.arch_of("cuda", 0)
    for config in configs.candidates("up_gated" if case.gated else "up", arch):
        if not config.halves:
            continue
        ys = []
        for name in (config.name, configs.without_halves(config).name):
            monkeypatch.setenv(configs.ENV, f"up={name},up_gated={name},down={name}")
            ys.append(call(case, "triton")(p))
        torch.testing.assert_close(*ys, rtol=2e-2, atol=2e-2)
        assert ys[0].shape == x.shape


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("gathered", [False, True])
def test_grouped_gemm_backward(backend, activation, gathered):
    E, N, K, M = 5, 64, 128, 500
    g = torch.Generator().manual_seed(0)

    def new(*size):
        return (torch.randn(*size, generator=g) / size[-1] ** 0.5).cuda().bfloat16()

    cuts = torch.randint(0, M, (E,), generator=g).sort().values
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts]).to("cuda", torch.int32)
    gather = torch.randint(0, M, (M,), generator=g).to("cuda", torch.int32) if gathered else None
    tensors = [new(M, K), new(E, N, K), new(E, N, K) if activation == "swiglu" else None, new(E, N)]
    dout, grads = new(M, N), {}
    for name, dtype in ((backend, torch.bfloat16), ("reference", torch.float64)):
        x, w, w_gate, b = (None if t is None else t.to(dtype).requires_grad_() for t in tensors)
        bias = b if w_gate is None else (b, b)
        out = grouped_gemm(x, w, offsets, w_gate=w_gate, gather=gather, bias=bias,
                           activation=activation, backend=name)  # fmt: skip
        leaves = [t for t in (x, w, w_gate, b) if t is not None]
        grads[name] = torch.autograd.grad((out * dout.to(dtype)).sum(), leaves)
    for ours, exact in zip(grads[backend], grads["reference"], strict=True):
        rms = exact.square().mean().sqrt()
        assert ((ours.double() - exact).square().mean().sqrt() <= 2e-2 * rms).item()


@pytest.mark.parametrize("k, recompute", [(2, False), (2, True), ("dense", False)])
def test_compiles_without_a_graph_break(backend, k, recompute):
    torch._dynamo.reset()
    case = Case(T=130, D=64, S=32, H=32, k=k, dtype=torch.bfloat16, device="cuda")
    layer = call(case, backend)
    eager = run(layer, case.build())
    function = checkpointed(layer) if recompute else layer
    compiled = run(torch.compile(function, fullgraph=True), case.build())
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=2e-2, atol=2e-2)


@pytest.fixture
def most_memory():
    """Holds back whoever else wants most of the GPU: run.sh runs several processes."""
    with open(Path(tempfile.gettempdir()) / "d2m-gpu-memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = torch.cuda.mem_get_info()[0]
        if free < 80e9:
            pytest.skip(f"needs 80 GB of GPU memory, {free / 1e9:.0f} GB are free")
        yield
        gc.collect()
        torch.cuda.empty_cache()


def test_more_than_two_billion_elements(backend, most_memory):
    """T * K * H past 2^31: offsets inside the kernels need 64 bits, forward and backward."""
    T, D, H, E, k = 150_000, 64, 8192, 2, 2
    assert T * k * H > 2**31
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    router = torch.randn(E, D, device="cuda")
    w1 = torch.randn(E * H, D, device="cuda", dtype=torch.bfloat16) / 8
    w2 = torch.randn(D, E * H, device="cuda", dtype=torch.bfloat16) / 90
    tail = slice(T - 100, T)
    dy = torch.zeros_like(x)  # only the last rows have a gradient: the rest adds exact zeros
    dy[tail] = torch.randn(100, D, device="cuda", dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, router, w1, w2)]
    y = moe_ffn(*leaves, top_k=k, backend=backend)
    grads = torch.autograd.grad(y, leaves, dy)
    assert not grads[0][: T - 100].any()
    wide = [t.detach()[tail].double() if t is x else t.detach().double() for t in leaves]
    wide = [t.requires_grad_() for t in wide]
    expected = moe_ffn(*wide, top_k=k, backend="reference")
    torch.testing.assert_close(y[tail].double(), expected, rtol=2e-2, atol=2e-2)
    exact = torch.autograd.grad(expected, wide, dy[tail].double())
    for name, ours, own in zip(("x", "router", "w1", "w2"), grads, exact, strict=True):
        ours = ours[tail] if name == "x" else ours
        error = (ours.double() - own).square().mean().sqrt()
        assert (error <= 3e-2 * own.square().mean().sqrt()).item(), f"{name}: {error}"
