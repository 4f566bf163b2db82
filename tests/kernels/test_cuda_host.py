"""The CUDA C++ sources run on the CPU: compiled for the host behind tests/simt/simt.h, under ASan
and UBSan, and compared with numpy and torch.

Shapes: T tokens, D model, E experts, K top-k, N = T*K slots.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = ["forward", "reverse", "shuffled"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def compile_host(out: Path, *flags: str) -> None:
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("no g++ to compile the host build with")
    probe = out.with_suffix(".probe.cpp")
    probe.write_text("#include <sanitizer/common_interface_defs.h>\nint main() {}\n")
    command = [gxx, "-std=c++17", *SANITIZE]
    run = subprocess.run([*command, str(probe), "-o", str(out)], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"g++ cannot build with ASan and UBSan: {run.stderr.strip()[:200]}")
    source = TESTS / "simt" / "main.cpp"
    # -ffp-contract=off: the host's fused multiply-adds depend on its flags
    command += ["-O1", "-g", "-ffp-contract=off", "-Wall", "-Werror"]
    command += ["-Wno-unknown-pragmas", *flags, str(source)]
    run = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    out = tmp_path_factory.mktemp("simt") / "simt"
    compile_host(out)
    return out


class Job:
    """One call for the host build: the line that describes it, its arrays, its outputs."""

    def __init__(self, line, inputs, outputs):
        self.line, self.inputs, self.outputs = line, inputs, outputs


def raw(t: torch.Tensor) -> bytes:
    if t.dtype in (torch.bfloat16, torch.float16):
        t = t.view(torch.int16)
    return np.ascontiguousarray(t.numpy()).tobytes()


def padded(t: torch.Tensor, stride: int) -> bytes:
    """Rows `stride` elements apart with NaN between them; nothing after the last row."""
    T, D = t.shape
    full = torch.full((T, stride), float("nan"), dtype=t.dtype)
    full[:, :D] = t
    return raw(full.reshape(-1)[: (T - 1) * stride + D].clone())


def execute(machine: Path, tmp_path: Path, jobs: list[Job], expect: int = 0):
    job_file, result_file = tmp_path / "jobs", tmp_path / "results"
    with open(job_file, "wb") as f:
        for job in jobs:
            f.write(job.line.encode() + b"\n")
            for data in job.inputs:
                f.write(data)
    # verify_asan_link_order=0: a preloaded library on the machine is none of our business
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
    run = subprocess.run(
        [str(machine), str(job_file), str(result_file)],
        capture_output=True, text=True, timeout=600, env=env,
    )  # fmt: skip
    if expect:
        return run
    assert run.returncode == 0, run.stderr[-4000:]
    data, at, results = result_file.read_bytes(), 0, []
    for job in jobs:
        values = []
        for shape, dtype in job.outputs:
            stored = torch.int16 if dtype in (torch.bfloat16, torch.float16) else dtype
            count = int(np.prod(shape, dtype=np.int64))
            size = count * torch.empty(0, dtype=dtype).element_size()
            chunk = torch.frombuffer(bytearray(data[at : at + size] or b"\0\0\0\0"), dtype=stored)
            values.append(chunk[:count].view(dtype).reshape(shape))
            at += size
        results.append(values)
    assert at == len(data)
    return results


# ---------------------------------------------------------------------------------------- route


def route_job(
    x, router, K, mask=None, x_pad=0, router_pad=0, offset=0, order="forward", blocks=1024
):
    (T, D), E = x.shape, router.shape[0]
    line = (
        f"route {order} {blocks} {T} {D} {E} {K} {CODE[x.dtype]} {D + x_pad} "
        f"{CODE[router.dtype]} {D + router_pad} {int(mask is not None)} {offset}"
    )
    inputs = [padded(x, D + x_pad), padded(router, D + router_pad)]
    inputs += [] if mask is None else [raw(mask.to(torch.uint8))]
    f32, i32 = torch.float32, torch.int32
    outputs = [((T, E), f32), ((T, K), f32), ((T, K), i32)]
    return Job(line, inputs, [*outputs, ((E + 1,), i32), ((T * K,), i32), ((T * K,), i32)])


def top_ids(logits_TE, K):
    rows = []
    for row in logits_TE.tolist():
        key = [(v != v, 0.0 if v != v else -v, e) for e, v in enumerate(row)]
        rows.append([e for *_, e in sorted(key)[:K]])
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, K)


def check_permutation(ids, E, offsets, order, inverse):
    flat = ids.reshape(-1).numpy()
    expected = np.argsort(np.where((flat < 0) | (flat >= E), E, flat), kind="stable")
    np.testing.assert_array_equal(order.numpy(), expected)
    np.testing.assert_array_equal(inverse.numpy()[expected], np.arange(flat.size))
    counts = np.bincount(flat[(flat >= 0) & (flat < E)], minlength=E)
    np.testing.assert_array_equal(offsets.numpy(), np.concatenate([[0], np.cumsum(counts)]))


def check_route(x, router, K, mask, result):
    probs, weights, ids, offsets, order, inverse = result
    E = router.shape[0]
    live = torch.ones(x.shape[0], dtype=torch.bool) if mask is None else mask
    logits = x[live].double() @ router.double().T
    atol = 4e-7 * max(1, logits.abs().amax().item() if live.any() else 0) * (1 + x.shape[1] ** 0.5)
    torch.testing.assert_close(probs[live].double(), logits.softmax(-1), atol=atol, rtol=1e-5)
    chosen = logits.gather(1, ids[live].long())
    best = logits.sort(dim=1, descending=True).values[:, :K]
    torch.testing.assert_close(chosen, best, atol=atol, rtol=1e-6)
    assert all(len(set(row)) == K for row in ids[live].tolist())
    torch.testing.assert_close(weights[live].double(), chosen.softmax(-1), atol=atol, rtol=1e-5)
    assert (ids[~live] == -1).all() and (weights[~live] == 0).all() and (probs[~live] == 0).all()
    check_permutation(ids, E, offsets, order, inverse)


# T, D, E, K, x_pad, router_pad: aligned and odd rows, one and several tiles, 4 / 8 / 12 experts a
# group and several groups, more chunks than buffers.
ROUTE_CASES = [
    (1, 1, 1, 1, 0, 0),
    (1, 8, 1, 1, 0, 0),
    (5, 33, 3, 2, 0, 0),
    (37, 256, 4, 1, 8, 16),
    (40, 520, 7, 2, 0, 0),
    (36, 1032, 12, 2, 0, 0),
    (75, 1544, 12, 2, 8, 8),
    (35, 130, 12, 12, 1, 3),
    (10, 512, 14, 3, 0, 8),
    (12, 264, 64, 2, 0, 0),
    (3, 24, 256, 256, 0, 0),
    (20, 100, 5, 0, 0, 0),
]


def combos(dtype):
    return [torch.float32] if dtype == torch.float32 else [dtype, torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route(machine, tmp_path, dtype, order):
    g = torch.Generator().manual_seed(CODE[dtype])
    jobs, checks = [], []
    for i, (T, D, E, K, x_pad, router_pad) in enumerate(ROUTE_CASES):
        for router_dtype in combos(dtype):
            x = torch.randn(T, D, generator=g).to(dtype)
            router = torch.randn(E, D, generator=g).to(router_dtype)
            mask = torch.rand(T, generator=g) > 0.3 if i % 2 else None
            # Few blocks: of up to four token warps, and several tiles each. Many: of one.
            blocks = 2 if order == "reverse" else 1024
            jobs.append(
                route_job(x, router, K, mask, x_pad, router_pad, order=order, blocks=blocks)
            )
            checks.append((x, router, K, mask))
    for check, result in zip(checks, execute(machine, tmp_path, jobs), strict=True):
        check_route(*check, result)


def test_route_does_not_need_alignment(machine, tmp_path):
    """A view that starts in the middle of 16 bytes takes the element-wise path."""
    g = torch.Generator().manual_seed(9)
    x, router = torch.randn(7, 264, generator=g).bfloat16(), torch.randn(6, 264, generator=g)
    (result,) = execute(machine, tmp_path, [route_job(x, router, 2, offset=1)])
    check_route(x, router, 2, None, result)


@pytest.mark.slow
def test_route_many_blocks(machine, tmp_path):
    """More tiles than the counting sort takes blocks, so a block has several tiles."""
    g = torch.Generator().manual_seed(10)
    for E in (2, 13):
        x, router = torch.randn(36 * 7 + 5, 12, generator=g), torch.randn(E, 12, generator=g)
        mask = torch.rand(x.shape[0], generator=g) > 0.2
        jobs = [route_job(x, router, 2, mask, blocks=blocks) for blocks in (1, 3, 1024)]
        results = execute(machine, tmp_path, jobs)
        check_route(x, router, 2, mask, results[0])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("E", [5, 40])
def test_route_ties_and_specials(machine, tmp_path, E):
    inf, nan = float("inf"), float("nan")
    table = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 2.0, 2.0, -1.0, 2.0],
            [-0.0, 0.0, -0.0, 0.0, -0.0],
            [nan, 1.0, nan, 2.0, -5.0],
            [nan, nan, nan, nan, nan],
            [inf, 1.0, inf, -inf, 0.0],
            [-inf, nan, -inf, nan, -inf],
        ]
    ).repeat(1, E // 5)
    for K in (1, 3, E):
        jobs = [route_job(torch.ones(2, 1), row[:, None].clone(), K) for row in table]
        for row, result in zip(table, execute(machine, tmp_path, jobs), strict=True):
            probs, weights, ids, offsets, order, inverse = result
            expected = top_ids(row[None], K).expand(2, K)
            assert torch.equal(ids, expected), (row, K)
            close = {"equal_nan": True, "rtol": 1e-6, "atol": 1e-7}
            torch.testing.assert_close(probs, row.softmax(-1).expand(2, E), **close)
            chosen = row[expected[0].long()].softmax(-1)
            torch.testing.assert_close(weights, chosen.expand(2, K), **close)
            check_permutation(ids, E, offsets, order, inverse)


def test_route_bad_rows_stay_alone(machine, tmp_path):
    g = torch.Generator().manual_seed(11)
    x, router = torch.randn(50, 72, generator=g), torch.randn(12, 72, generator=g)
    bad = torch.tensor([0, 5, 36, 49])  # neighbours in a warp's registers, and both tiles
    dirty = x.clone()
    dirty[bad[0]], dirty[bad[1], 3] = float("nan"), float("inf")
    dirty[bad[2], 71], dirty[bad[3]] = -float("inf"), 3e38
    clean, got = execute(machine, tmp_path, [route_job(x, router, 2), route_job(dirty, router, 2)])
    others = torch.ones(50, dtype=torch.bool)
    others[bad] = False
    for a, b in zip(clean[:3], got[:3], strict=True):
        assert torch.equal(a[others], b[others])
    assert got[2].min() >= 0 and got[2].max() < 12
    check_permutation(got[2], 12, *got[3:])


def test_orders_agree_bitwise(machine, tmp_path):
    g = torch.Generator().manual_seed(12)
    x, router = torch.randn(45, 600, generator=g).bfloat16(), torch.randn(12, 600, generator=g)
    jobs = [route_job(x, router, 3, order=order) for order in ORDERS]
    first, *others = execute(machine, tmp_path, jobs)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# --------------------------------------------------------------------- AdaLN in front of route


def modulate_job(
    x, scale, shift, router, K, eps, x_pad=0, adaln_pad=0, order="forward", blocks=1024
):
    (T, D), E, B = x.shape, router.shape[0], scale.shape[0]
    line = (
        f"modulate_route {order} {blocks} {T} {D} {E} {K} {CODE[x.dtype]} {D + x_pad} {B} "
        f"{D + adaln_pad} {eps} {CODE[router.dtype]}"
    )
    inputs = [padded(x, D + x_pad), padded(scale, D + adaln_pad), padded(shift, D + adaln_pad)]
    outputs = route_job(x, router, K).outputs
    return Job(line, [*inputs, raw(router)], [((T, D), x.dtype), *outputs])


# T, D, E, K, B, x_pad, adaln_pad: in the route kernel (E <= 12) and before it, aligned and odd
# rows, samples that end inside a tile, several chunks of columns.
MODULATE_CASES = [
    (1, 1, 1, 1, 1, 0, 0),
    (6, 33, 3, 2, 2, 0, 1),
    (40, 520, 7, 2, 4, 8, 8),
    (75, 1032, 12, 2, 3, 0, 2064),
    (20, 100, 5, 0, 1, 1, 0),
    (10, 512, 14, 3, 5, 0, 8),
    (4, 24, 256, 7, 2, 0, 0),
    (9, 35, 6, 2, 3, 0, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulate_route(machine, tmp_path, dtype):
    """x with a mean of 20 standard deviations, where a plain sum of squares would lose digits."""
    g = torch.Generator().manual_seed(CODE[dtype])
    jobs, wants = [], []
    for i, (T, D, E, K, B, x_pad, adaln_pad) in enumerate(MODULATE_CASES):
        x = (torch.randn(T, D, generator=g) + (20 if i % 2 else 0)).to(dtype)
        scale, shift = (torch.randn(B, D, generator=g).to(dtype) for _ in range(2))
        router = torch.randn(E, D, generator=g).to(combos(dtype)[i % len(combos(dtype))])
        order, blocks = ORDERS[i % 3], (1, 3, 1024)[i % 3]
        job = modulate_job(x, scale, shift, router, K, 1e-6, x_pad, adaln_pad, order, blocks)
        jobs.append(job)
        wide = x.double()
        normed = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, False)[:, None] + 1e-6).sqrt()
        rows = torch.arange(T) // (T // B)
        factor = 1 + scale.double()[rows]
        # fp32 knows the mean, and x less the mean, to the mean's last digits.
        room = 1e-6 * (1 + wide.abs().amax(1, keepdim=True)) * (1 + factor.abs())
        wants.append((normed * factor + shift.double()[rows], room, router, K))
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    results = execute(machine, tmp_path, jobs)
    for (want, room, router, K), (out, *routed) in zip(wants, results, strict=True):
        assert not out.isnan().any()
        assert ((out.double() - want).abs() <= unit * want.abs() + room).all()
        check_route(out, router, K, None, routed)


def test_modulated_rows_do_not_touch_each_other(machine, tmp_path):
    g = torch.Generator().manual_seed(16)
    x, router = torch.randn(50, 72, generator=g), torch.randn(12, 72, generator=g)
    scale, shift = torch.randn(2, 72, generator=g), torch.randn(2, 72, generator=g)
    dirty = x.clone()
    dirty[[0, 5, 36]], dirty[49, 3] = float("nan"), float("inf")
    clean, got = execute(
        machine, tmp_path, [modulate_job(t, scale, shift, router, 2, 1e-6) for t in (x, dirty)]
    )
    others = torch.ones(50, dtype=torch.bool)
    others[[0, 5, 36, 49]] = False
    for a, b in zip(clean[:4], got[:4], strict=True):
        assert torch.equal(a[others], b[others])
    assert got[3].min() >= 0 and got[3].max() < 12
    check_permutation(got[3], 12, *got[4:])


# -------------------------------------------------------------------------------------- permute


def permute_job(ids, E, order="forward", blocks=1024):
    N, i32 = ids.numel(), torch.int32
    outputs = [((E + 1,), i32), ((N,), i32), ((N,), i32)]
    return Job(f"permute {order} {blocks} {N} {E}", [raw(ids)], outputs)


@pytest.mark.parametrize("order", ORDERS)
def test_permute(machine, tmp_path, order):
    g = torch.Generator().manual_seed(13)
    jobs, checks = [], []
    cases = [(1, 1), (31, 2), (256, 3), (257, 12), (1000, 256), (3000, 12), (700, 31), (700, 32)]
    for N, E in cases:
        for low in (0, -1):
            ids = torch.randint(low, E, (N,), generator=g, dtype=torch.int32)
            ids[ids == 1] = 0  # an expert without tokens
            jobs.append(permute_job(ids, E, order))
            checks.append((ids, E))
    for everywhere in (4, -1):
        ids = torch.full((300,), everywhere, dtype=torch.int32)
        jobs.append(permute_job(ids, 7, order))
        checks.append((ids, 7))
    for check, result in zip(checks, execute(machine, tmp_path, jobs), strict=True):
        check_permutation(*check, *result)


def test_permute_many_blocks(machine, tmp_path):
    """More blocks than a warp has lanes, and several passes a block."""
    g = torch.Generator().manual_seed(14)
    ids = torch.randint(-1, 3, (40 * 256 + 3,), generator=g, dtype=torch.int32)
    jobs = [permute_job(ids, 3, blocks=blocks) for blocks in (1, 7, 1024)]
    for result in execute(machine, tmp_path, jobs):
        check_permutation(ids, 3, *result)


# -------------------------------------------------------------------------------------- combine


def combine_job(y, inverse, weights, routed, base, bias, scale, y_pad=0, base_pad=0):
    (T, K), (rows, D) = inverse.shape, y.shape
    base_dtype = -1 if base is None else CODE[base.dtype]
    bias_dtype = -1 if bias is None else CODE[bias.dtype]
    line = (
        f"combine forward 1024 {T} {D} {K} {rows} {CODE[y.dtype]} {D + y_pad} "
        f"{int(weights is not None)} {base_dtype} {D + base_pad} {bias_dtype} {scale}"
    )
    inputs = [padded(y, D + y_pad), raw(inverse)]
    inputs += [raw(weights)] if weights is not None else []
    inputs += [raw(torch.tensor([routed], dtype=torch.int32))]
    inputs += [padded(base, D + base_pad)] if base is not None else []
    inputs += [raw(bias)] if bias is not None else []
    return Job(line, inputs, [((T, D), y.dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(machine, tmp_path, dtype):
    g = torch.Generator().manual_seed(15)
    unit = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    jobs, wants = [], []
    cases = [(1, 1, 1, 0), (9, 64, 2, 8), (5, 33, 3, 0), (3, 264, 1, 1), (4, 16, 0, 0)]
    for T, D, K, y_pad in cases:
        N = T * K
        inverse = torch.randperm(N, generator=g).to(torch.int32).reshape(T, K)
        routed = N - N // 3
        y = torch.randn(max(routed, 1), D, generator=g).to(dtype)  # what is not routed is not there
        weights = torch.rand(T, K, generator=g)
        base, bias = torch.randn(T, D, generator=g).to(dtype), torch.randn(D, generator=g)
        for w in (weights, None):
            for b in (base, base.float(), None):
                for v in (bias, bias.to(dtype), None):
                    jobs.append(combine_job(y, inverse, w, routed, b, v, 1.5, y_pad, y_pad))
                    want = torch.zeros(T, D, dtype=torch.float64)
                    for t in range(T):
                        for j in range(K):
                            if inverse[t, j] < routed:
                                factor = 1.0 if w is None else w[t, j].double()
                                want[t] += factor * y[inverse[t, j]].double()
                    want *= 1.5
                    for extra in (b, v):
                        want = want if extra is None else want + extra.double()
                    wants.append(want)
    for want, (got,) in zip(wants, execute(machine, tmp_path, jobs), strict=True):
        assert not got.isnan().any()
        assert ((got.double() - want).abs() <= unit * want.abs() + 6e-6).all()


# ------------------------------------------------------------------- the machine itself is honest


@pytest.mark.slow
def test_planted_write_past_the_end_is_caught(tmp_path):
    out = tmp_path / "planted"
    compile_host(out, "-DD2M_PLANT_OOB", "-DSIMT_PERMUTE_ONLY")
    ids = torch.zeros(100, dtype=torch.int32)
    run = execute(out, tmp_path, [permute_job(ids, 2)], expect=1)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr and "WRITE of size 4" in run.stderr
    assert "permute_rank_kernel" in run.stderr


def test_a_missing_barrier_shows(machine, tmp_path):
    """Without its __syncthreads a neighbour reads what is not written yet: the order decides."""
    outputs = [((64,), torch.int32)]
    jobs = [Job(f"broken {order} 1024 0", [], outputs) for order in ("forward", "reverse")]
    want = torch.arange(1, 65, dtype=torch.int32) % 64
    results = execute(machine, tmp_path, jobs)
    assert not all(torch.equal(got, want) for (got,) in results)


def test_a_divergent_barrier_is_refused(machine, tmp_path):
    run = execute(machine, tmp_path, [Job("broken forward 1024 1", [], [])], expect=1)
    assert run.returncode == 3 and "deadlock" in run.stderr
