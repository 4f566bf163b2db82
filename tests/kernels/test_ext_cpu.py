"""The C++ extension against plain numpy / torch written here, at shapes that do not divide evenly.

Shapes: T tokens, D model, E experts, K top-k, N = T*K slots.
"""

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from d2m_kernels.backends import native

pytestmark = pytest.mark.skipif(
    native.cpu_available() is not None, reason=str(native.cpu_available())
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def top_ids(logits_TE, K):
    """Descending, ties to the lowest id, NaN after -Inf: by sorting python tuples."""
    rows = []
    for row in logits_TE.tolist():
        key = [(v != v, 0.0 if v != v else -v, e) for e, v in enumerate(row)]
        rows.append([e for *_, e in sorted(key)[:K]])
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, K)


def strided(shape, dtype, pad, generator):
    """A matrix whose rows lie `pad` elements further apart than they have to."""
    full = torch.randn(shape[0], shape[1] + pad, generator=generator).to(dtype)
    return full[:, : shape[1]]


ROUTE_CASES = [
    (1, 1, 1, 1, 0),
    (3, 5, 2, 1, 3),
    (17, 33, 7, 7, 1),
    (31, 100, 12, 2, 0),
    (16, 257, 3, 2, 5),
    (129, 130, 14, 3, 0),
    (40, 512, 64, 8, 7),
    (9, 96, 256, 256, 0),
    (1000, 320, 12, 2, 0),
    (5, 1, 4, 0, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,D,E,K,pad", ROUTE_CASES)
def test_route_values(T, D, E, K, pad, dtype):
    g = torch.Generator().manual_seed(T * 1000 + D)
    x = strided((T, D), dtype, pad, g)
    for router_dtype in DTYPES:
        router = strided((E, D), router_dtype, pad, g)
        probs, weights, ids = native.cpu_route(x, router, K)
        logits = x.double() @ router.double().T
        assert probs.dtype == weights.dtype == torch.float32 and ids.dtype == torch.int32
        atol = 4e-7 * logits.abs().max().clamp(min=1).item() * (1 + D**0.5)
        torch.testing.assert_close(probs.double(), logits.softmax(-1), atol=atol, rtol=1e-5)
        # Chosen by a logit that is as good as the exact k-th, in the right order.
        chosen = logits.gather(1, ids.long())
        best = logits.sort(dim=1, descending=True).values[:, :K]
        torch.testing.assert_close(chosen, best, atol=atol, rtol=1e-6)
        assert all(len(set(row)) == K for row in ids.tolist())
        torch.testing.assert_close(weights.double(), chosen.softmax(-1), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_route_ties_and_specials(dtype):
    """Logits chosen exactly (x is one-hot rows of a table), so ids have to be exact."""
    inf, nan = float("inf"), float("nan")
    table = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 2.0, 2.0, -1.0, 2.0],
            [-0.0, 0.0, -0.0, 0.0, -0.0],
            [-3.0, -1.0, -2.0, -1.0, -2.0],
            [nan, 1.0, nan, 2.0, -5.0],
            [nan, nan, nan, nan, nan],
            [inf, 1.0, inf, -inf, 0.0],
            [-inf, nan, -inf, nan, -inf],
            [60000.0, -60000.0, 59968.0, 0.0, 60000.0],
        ]
    ).to(dtype)
    for K in range(1, 6):
        # D = 1: the logit of expert e is x * router[e], one row of the table at a time.
        for row in table:
            x = torch.ones(3, 1, dtype=dtype)
            probs, weights, ids = native.cpu_route(x, row[:, None].clone(), K)
            expected = top_ids(row[None].float(), K).expand(3, K)
            assert torch.equal(ids, expected), (row, K)
            torch.testing.assert_close(
                probs, row.float().softmax(-1).expand(3, 5), equal_nan=True, rtol=1e-6, atol=1e-7
            )
            chosen = row.float()[expected[0].long()]
            torch.testing.assert_close(
                weights, chosen.softmax(-1).expand(3, K), equal_nan=True, rtol=1e-6, atol=1e-7
            )


def test_route_bad_rows_stay_alone():
    g = torch.Generator().manual_seed(0)
    x, router = torch.randn(100, 64, generator=g), torch.randn(12, 64, generator=g)
    clean = native.cpu_route(x, router, 2)
    dirty = x.clone()
    bad = torch.tensor([3, 16, 17, 99])
    dirty[bad[0]], dirty[bad[1], 5] = float("nan"), float("inf")
    dirty[bad[2], 7], dirty[bad[3], :] = -float("inf"), 3e38
    got = native.cpu_route(dirty, router, 2)
    others = torch.ones(100, dtype=torch.bool)
    others[bad] = False
    for a, b in zip(clean, got, strict=True):
        assert torch.equal(a[others], b[others])
    assert got[2].min() >= 0 and got[2].max() < 12
    assert got[0][bad[0]].isnan().all()


def test_route_mask():
    g = torch.Generator().manual_seed(1)
    x, router = torch.randn(50, 33, generator=g), torch.randn(7, 33, generator=g)
    mask = torch.rand(50, generator=g) > 0.4
    x[~mask] = float("nan")
    probs, weights, ids = native.cpu_route(x, router, 3, mask)
    assert (ids[~mask] == -1).all() and (weights[~mask] == 0).all() and (probs[~mask] == 0).all()
    alone = native.cpu_route(x[mask].contiguous(), router, 3)
    for a, b in zip((probs, weights, ids), alone, strict=True):
        assert torch.equal(a[mask], b)


def test_route_empty():
    probs, weights, ids = native.cpu_route(torch.empty(0, 8), torch.randn(4, 8), 2)
    assert probs.shape == (0, 4) and weights.shape == ids.shape == (0, 2)


@pytest.mark.parametrize("N,E", [(0, 3), (1, 1), (7, 2), (1000, 12), (3001, 256)])
@pytest.mark.parametrize("masked", [False, True])
def test_permute(N, E, masked):
    rng = np.random.default_rng(N + E)
    ids = rng.integers(-1 if masked else 0, E, N).astype(np.int32)
    if E > 2:
        ids[ids == 1] = 0  # an expert without tokens
    offsets, order, inverse = native.cpu_permute(torch.from_numpy(ids).reshape(-1, 1), E)
    expected = np.argsort(np.where(ids < 0, E, ids), kind="stable")
    np.testing.assert_array_equal(order.numpy(), expected)
    np.testing.assert_array_equal(inverse.numpy()[expected], np.arange(N))
    counts = np.bincount(ids[ids >= 0], minlength=E)
    np.testing.assert_array_equal(offsets.numpy(), np.concatenate([[0], np.cumsum(counts)]))


def combine_double(y, inverse, weights, routed, base, bias, scale, K):
    out = torch.zeros(inverse.numel() // max(K, 1), y.shape[1], dtype=torch.float64)
    for t in range(out.shape[0]):
        for j in range(K):
            r = int(inverse.reshape(-1)[t * K + j])
            if r < routed:
                out[t] += (1.0 if weights is None else weights[t, j].double()) * y[r].double()
    out *= scale
    for extra in (base, bias):
        out = out if extra is None else out + extra.double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T,D,K,E",
    [(1, 1, 1, 1), (5, 33, 2, 3), (64, 130, 1, 7), (33, 1025, 3, 12), (9, 2100, 2, 4)],
)
def test_combine(T, D, K, E, dtype):
    g = torch.Generator().manual_seed(D)
    ids = torch.randint(0, E, (T, K), generator=g, dtype=torch.int32)
    if T > 4:
        ids[1] = -1  # a masked token, and one that is half masked
        ids[3, 0] = -1
    offsets, _, inverse = native.cpu_permute(ids, E)
    routed = int(offsets[E])
    y = strided((T * K, D), dtype, 3, g)
    y[routed:] = float("nan")
    base, bias = strided((T, D), dtype, 1, g), torch.randn(D, generator=g).to(dtype)
    weights = torch.rand(T, K, generator=g)
    unit = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for w, b, extra in itertools.product(
        (weights, None), (base, base.float(), None), (bias, bias.float(), None)
    ):
        got = native.cpu_combine(y, inverse.view(T, K), w, offsets, b, extra, 1.7)
        want = combine_double(y, inverse, w, routed, b, extra, 1.7, K)
        assert got.dtype == dtype and not got.isnan().any()
        error = (got.double() - want).abs()
        # half an ulp of the result, and K + 3 fp32 roundings of terms of size ~5
        assert (error <= unit * want.abs() + 6e-6).all()
        if b is base:  # written over its own base
            own = base.clone(memory_format=torch.contiguous_format)
            native.cpu_combine(y, inverse.view(T, K), w, offsets, own, extra, 1.7, out=own)
            assert torch.equal(own, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(dtype):
    """Every 16-bit pattern, and values between them, round as torch rounds them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    exact = every.float()
    between = torch.cat([exact, exact * 1.0009765625, exact * 1.00390625, exact * 0.99951171875])
    y = between.to(torch.float32)[None]
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    zero = torch.zeros(1, 1, dtype=torch.int32)
    blank = torch.zeros(1, y.shape[1], dtype=dtype)
    ones = torch.ones(1, 1)
    # fp32 enters as the base, is added to 0 and is rounded to the dtype of y.
    got = native.cpu_combine(blank, zero, ones, offsets, y, None, 1.0)
    want = (y + 0.0).to(dtype)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))
    # and every pattern survives the way up and down
    back = native.cpu_combine(every[None].contiguous(), zero, ones, offsets)
    assert torch.equal(back[~every.isnan()[None]], every[~every.isnan()])


def test_combine_empty_and_no_slots():
    y = torch.empty(0, 8)
    offsets = torch.zeros(4, dtype=torch.int32)
    none = torch.empty(0, 2, dtype=torch.int32)
    assert native.cpu_combine(y, none, None, offsets).shape == (0, 8)
    base = torch.randn(5, 8)
    no_slots = torch.empty(5, 0, dtype=torch.int32)
    assert torch.equal(native.cpu_combine(y, no_slots, torch.empty(5, 0), offsets, base), base)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gather_rows(dtype):
    g = torch.Generator().manual_seed(2)
    x = strided((300, 517), dtype, 11, g)
    idx = torch.randint(0, 900, (2000,), generator=g, dtype=torch.int32)
    assert torch.equal(native.cpu_gather_rows(x, idx, 3), x[(idx // 3).long()])
    assert native.cpu_gather_rows(x, idx[:0], 1).shape == (0, 517)


def test_threads_do_not_change_a_bit():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4099, 515, generator=g).bfloat16()
    router = torch.randn(13, 515, generator=g)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        probs, weights, ids = native.cpu_route(x, router, 2)
        offsets, order, inverse = native.cpu_permute(ids, 13)
        y = native.cpu_gather_rows(x, order, 2)
        out = native.cpu_combine(y, inverse.view(-1, 2), weights, offsets, x, None, 0.5)
        results.append((probs, weights, ids, y, out))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def run_python(code, **env):
    import os

    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=400, env={**os.environ, **env},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_every_instruction_set():
    """The narrower builds, which this processor would not choose, give the same answers."""
    code = """
        import torch, _d2m_cpu
        from d2m_kernels.backends import native
        g = torch.Generator().manual_seed(4)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(67, 301, generator=g).to(dtype)
            router = torch.randn(7, 301, generator=g)
            probs, weights, ids = native.cpu_route(x, router, 2)
            logits = x.float() @ router.T
            torch.testing.assert_close(probs, logits.softmax(-1), atol=2e-5, rtol=1e-4)
            offsets, order, inverse = native.cpu_permute(ids, 7)
            y = native.cpu_gather_rows(x, order, 2)
            out = native.cpu_combine(y, inverse.view(-1, 2), weights, offsets)
            torch.testing.assert_close(out, x, atol=1e-6, rtol=1e-2)  # weights sum to 1
        print(_d2m_cpu.isa())
    """
    assert run_python(code, D2M_CPU_ISA="base").split() == ["base"]
    for isa in ("avx2", "avx512"):
        assert run_python(code, D2M_CPU_ISA=isa).split()[0] in ("base", "avx2", "avx512")


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_works_after_fork():
    code = """
        import os, torch
        from d2m_kernels.backends import native
        torch.set_num_threads(2)
        x, router = torch.randn(3000, 400), torch.randn(12, 400)
        want = native.cpu_route(x, router, 2)[2]
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(native.cpu_route(x, router, 2)[2], want) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_python(code).strip() == "0"


def test_stale_extension_is_refused(tmp_path):
    (tmp_path / "_d2m_cpu.py").write_text("ABI = -1\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from d2m_kernels.backends import native
        print(native.cpu_available())
    """
    said = run_python(code)
    assert "ABI is -1" in said and "pip install" in said


def test_missing_extension_is_explained():
    code = """
        import sys
        sys.modules["_d2m_cpu"] = None
        from d2m_kernels.backends import native
        print(native.cpu_available())
    """
    assert "_d2m_cpu" in run_python(code)
