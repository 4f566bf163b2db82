"""Every CUDA kernel compiled for sm_80 and sm_90a, by nvcc and by NVRTC: no spills, within limits.

None of it needs a GPU. The table of registers and shared memory goes to $D2M_ARTIFACTS (default
build/artifacts) as cuda_resources.txt.
"""

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from d2m_kernels.backends import native, nvrtc

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90a")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}
KERNELS = {
    "route": ["d2m::route_select_kernel"]
    + [
        f"d2m::modulate_kernel<{x}, {vec}>"
        for x, wide in [("float", 4), ("d2m::bf16", 8), ("d2m::f16", 8)]
        for vec in (1, wide)
    ]
    + [
        f"d2m::route_kernel<{x}, {w}, {group}, {vec}>"
        for x, w in [
            ("float", "float"),
            ("d2m::bf16", "d2m::bf16"),
            ("d2m::bf16", "float"),
            ("d2m::f16", "d2m::f16"),
            ("d2m::f16", "float"),
        ]
        for group, vec in [
            (4, "true, true"),
            (8, "true, true"),
            (8, "true, false"),
            (12, "true, true"),
            (12, "true, false"),
            (4, "false, true"),
            (4, "false, false"),
        ]
    ],
    "permute": ["d2m::permute_count_kernel", "d2m::permute_rank_kernel"],
    "combine": [
        f"d2m::combine_kernel<{y}, {vec}>"
        for y, wide in [("float", 4), ("d2m::bf16", 8), ("d2m::f16", 8)]
        for vec in (1, wide)
    ],
}


def dynamic_shared(kernel: str) -> int:
    """Bytes the launcher asks for: RouteShared::kBytes of csrc/cuda/route.cuh."""
    m = re.match(r"d2m::route_kernel<[\w:]+, ([\w:]+), (\d+),", kernel)
    if m is None:
        return 0
    c = nvrtc.constants()
    tile, size, group = c["kTokens"] * c["kTokenWarps"], 4 if m[1] == "float" else 2, int(m[2])
    stages = 2 * group * c["kStep"] * c["kDepthWarps"] * size
    return max(stages, (c["kDepthWarps"] + 1) * tile * group * 4) + (group + 1) * 4


def parse_ptxas(text: str):
    """{(kernel, arch): (registers, static shared, stack, spilled bytes)} from -Xptxas -v."""
    found = {}
    for block in text.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\S+)' for '(\S+)'", block).groups()
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
            ).groups(),
        )
        shared = re.search(r"(\d+) bytes smem", block)
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        found[name, arch] = (registers, int(shared[1]) if shared else 0, stack, stores + loads)
    return found


def demangle(names):
    tool = shutil.which("c++filt")
    if tool is None:
        pytest.skip("no c++filt to read the kernels' names with")
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    plain = (re.sub(r"^void ", "", line).split("(")[0] for line in text.splitlines())
    return dict(zip(names, plain, strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{stage: what ptxas said}, all files at once."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    folder = tmp_path_factory.mktemp("nvcc")
    gencode = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHS]
    running = {
        stage: subprocess.Popen(
            [nvcc, "-std=c++17", "-O3", *gencode, "-Xptxas", "-v", "-Werror", "all-warnings",
             "-c", str(ROOT / "csrc" / "cuda" / f"{stage}.cu"), "-o", str(folder / f"{stage}.o")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for stage in KERNELS
    }  # fmt: skip
    said = {stage: process.communicate(timeout=500)[0] for stage, process in running.items()}
    for stage, process in running.items():
        assert process.returncode == 0, said[stage]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("stage", KERNELS)
def test_nvcc(compiled, stage):
    found = parse_ptxas(compiled[stage])
    plain = demangle(sorted({name for name, _ in found}))
    assert {(plain[n], a) for n, a in found} == {(k, a) for k in KERNELS[stage] for a in ARCHS}
    lines = [f"{'kernel':<62} {'arch':<7} registers  static smem  dynamic smem"]
    for (name, arch), (registers, static, stack, spilled) in sorted(found.items()):
        kernel = plain[name]
        dynamic = dynamic_shared(kernel)
        lines.append(f"{kernel:<62} {arch:<7} {registers:>9}  {static:>11}  {dynamic:>12}")
        assert (stack, spilled) == (0, 0), f"{kernel} for {arch} spills: {compiled[stage]}"
        assert static + dynamic <= SHARED_LIMIT[arch]
        assert registers * 256 <= 65536, "a block of 256 threads has to fit"
    folder = Path(os.environ.get("D2M_ARTIFACTS") or ROOT / "build" / "artifacts")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"cuda_resources_{stage}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("stage", KERNELS)
def test_nvrtc(stage, arch):
    """The sources are what NVRTC takes: no include, no host code. Without a driver."""
    if nvrtc.library() is None:
        pytest.skip("libnvrtc is not here (pip install nvidia-cuda-nvrtc)")
    for kernel in KERNELS[stage][:: 7 if arch == "sm_90" else 12]:
        cubin, name = nvrtc.compile_kernel(kernel, f"{stage}.cuh", arch)
        assert cubin[:4] == b"\x7fELF" and name.encode() in cubin
        assert demangle([name])[name] == kernel


@pytest.mark.slow
@pytest.mark.parametrize("stage", KERNELS)
def test_nvrtc_takes_every_kernel(stage):
    if nvrtc.library() is None:
        pytest.skip("libnvrtc is not here (pip install nvidia-cuda-nvrtc)")
    names = {}
    for kernel in KERNELS[stage]:
        cubin, name = nvrtc.compile_kernel(kernel, f"{stage}.cuh", "sm_90a")
        assert cubin[:4] == b"\x7fELF" and name.encode() in cubin
        names[name] = kernel
    assert demangle(sorted(names)) == names


def test_nvrtc_errors_are_told():
    if nvrtc.library() is None:
        pytest.skip("libnvrtc is not here (pip install nvidia-cuda-nvrtc)")
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        nvrtc.compile_kernel("d2m::no_such_kernel", "permute.cuh", "sm_80")


def test_nvrtc_cache(tmp_path, monkeypatch):
    if nvrtc.library() is None:
        pytest.skip("libnvrtc is not here (pip install nvidia-cuda-nvrtc)")
    monkeypatch.setenv("D2M_CACHE_DIR", str(tmp_path / "cache"))
    job = ("d2m::permute_count_kernel", "permute.cuh", "sm_80")
    path, name = nvrtc.cached_kernel(*job)
    assert path.parent == tmp_path / "cache" and path.read_bytes()[:4] == b"\x7fELF"

    def no_compiler(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(nvrtc, "compile_kernel", no_compiler)
    assert nvrtc.cached_kernel(*job) == (path, name)
    with pytest.raises(AssertionError, match="compiled again"):
        nvrtc.cached_kernel(job[0], job[1], "sm_90")  # another GPU is another file


def test_nvrtc_cache_in_an_unwritable_place(tmp_path, monkeypatch):
    if nvrtc.library() is None:
        pytest.skip("libnvrtc is not here (pip install nvidia-cuda-nvrtc)")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D2M_CACHE_DIR", str(tmp_path / "file" / "cache"))
    path, _ = nvrtc.cached_kernel("d2m::permute_count_kernel", "permute.cuh", "sm_80")
    assert path.read_bytes()[:4] == b"\x7fELF"


# ------------------------------------------- what is launched, with a CuPy that only takes notes


KINDS = {"pointer": "uint64", "int": "int32", "long long": "int64", "float": "float32"}


def parameters(kernel: str):
    """The numpy types a kernel of the sources takes, in order."""
    text = "".join(p.read_text() for p in nvrtc.source_dir().glob("*.cuh"))
    short = kernel.removeprefix("d2m::").split("<")[0]
    listed = re.search(rf"\b{short}\s*\(([^)]*)\)", text)[1]
    kinds = []
    for entry in " ".join(listed.split()).split(", "):
        kind = "pointer" if "*" in entry else entry.removeprefix("const ").rsplit(" ", 1)[0]
        kinds.append(KINDS[kind])
    return kinds


@pytest.fixture
def launches(monkeypatch):
    notes = []

    class Kernel:
        max_dynamic_shared_size_bytes = 48 * 1024

        def __init__(self, name):
            self.name = name

        def __call__(self, grid, block, args, shared_mem=0):
            assert shared_mem <= self.max_dynamic_shared_size_bytes
            assert [type(a).__name__ for a in args] == parameters(self.name)
            notes.append((self.name, grid, block, shared_mem, ExternalStream.current))

    class ExternalStream:
        current = None

        def __init__(self, pointer):
            self.pointer = pointer

        def __enter__(self):
            ExternalStream.current = self.pointer

        def __exit__(self, *_):
            ExternalStream.current = None

    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(ExternalStream=ExternalStream)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(nvrtc, "_function", lambda name, header, arch: Kernel(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return notes


def route_launches(launches, E, *, x=1 << 20, D=3072, T=4608, K=2, router_dtype=0, order=1 << 20):
    launches.clear()
    p = 1 << 20
    nvrtc.route(x, 1, D, p, router_dtype, D, 0, T, D, E, K, p, p, p, p, order, p, p, 77)
    return launches


def test_launches_of_route(launches):
    route, rank = route_launches(launches, 12)
    assert route[0] == "d2m::route_kernel<d2m::bf16, float, 12, true, true>"
    assert route[1:] == ((128, 1), (256,), dynamic_shared(route[0]), 77)
    assert rank == ("d2m::permute_rank_kernel", (128, 1), (256,), 0, 77)
    for E, group, fused, groups in [
        (1, 4, "true", 1), (4, 4, "true", 1), (5, 8, "true", 1), (9, 12, "true", 1),
        (13, 8, "false", 2), (20, 12, "false", 2), (24, 12, "false", 2), (64, 8, "false", 8),
        (256, 8, "false", 32),
    ]:  # fmt: skip
        first, *others = route_launches(launches, E, router_dtype=1)
        assert first[0] == f"d2m::route_kernel<d2m::bf16, d2m::bf16, {group}, true, {fused}>"
        assert first[1] == (128, groups)
        assert [o[0].split("::")[1] for o in others] == (
            ["route_select_kernel"] if fused == "false" else []
        ) + ["permute_rank_kernel"]
        assert first[0] in KERNELS["route"]
    odd = route_launches(launches, 12, D=33, order=0)
    assert [o[0] for o in odd] == [
        "d2m::route_kernel<d2m::bf16, float, 4, false, false>", "d2m::route_select_kernel"
    ]  # fmt: skip
    assert "false, true>" in route_launches(launches, 3, x=(1 << 20) + 2)[0][0]
    assert route_launches(launches, 12, T=200_000)[0][1:3] == ((926, 1), (256,))
    few = {T: route_launches(launches, 12, T=T)[0][1:3] for T in (1, 512, 1152, 1153, 2304, 2305)}
    assert few == {
        1: ((1, 1), (64,)), 512: ((57, 1), (64,)), 1152: ((128, 1), (64,)),
        1153: ((65, 1), (128,)), 2304: ((128, 1), (128,)), 2305: ((65, 1), (256,)),
    }  # fmt: skip


def test_launches_of_permute_and_combine(launches):
    p = 1 << 20
    nvrtc.permute(p, 9216, 12, p, p, p, p, 5)
    assert [n[:3] for n in launches] == [
        ("d2m::permute_count_kernel", (36, 1), (256,)),
        ("d2m::permute_rank_kernel", (36, 1), (256,)),
    ]
    launches.clear()
    nvrtc.combine(p, 1, 3072, p, p, p, 12, p, 1, 3072, 0, 0, 1.0, p, 4608, 3072, 2, 5)
    nvrtc.combine(p, 1, 3073, p, p, p, 12, 0, 0, 0, 0, 0, 1.0, p, 4608, 3072, 2, 5)
    nvrtc.combine(p, 0, 30, p, 0, p, 12, 0, 0, 0, 0, 0, 1.0, p, 10, 30, 2, 5)
    assert [n[:2] for n in launches] == [
        ("d2m::combine_kernel<d2m::bf16, 8>", (6912, 1)),
        ("d2m::combine_kernel<d2m::bf16, 1>", (55296, 1)),
        ("d2m::combine_kernel<float, 1>", (2, 1)),
    ]


def test_unavailable_says_why(monkeypatch):
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    assert "cupy" in nvrtc.unavailable()
    reason = native.cuda_available()
    if not torch.cuda.is_available():
        assert "_d2m_cuda" in reason or "CUDA device" in reason


def test_modulation_is_launched_apart_where_experts_are_spread(launches):
    p = 1 << 20

    def launch(E, scale):
        launches.clear()
        nvrtc.modulate_route(
            p, 1, 3072, scale, 3072, p, 3072, 4608, 1e-6, p, p, 0, 3072, 0, 4608, 3072, E, 2,
            p, p, p, p, p, p, p, 77,
        )  # fmt: skip
        return [note[:3] for note in launches]

    assert launch(12, p)[0][0] == "d2m::route_kernel<d2m::bf16, float, 12, true, true>"
    apart = launch(24, p)
    assert apart[0] == ("d2m::modulate_kernel<d2m::bf16, 8>", (576, 1), (256,))
    assert apart[1][0] == "d2m::route_kernel<d2m::bf16, float, 12, true, false>"
    assert launch(24, p + 2)[0][0] == "d2m::modulate_kernel<d2m::bf16, 1>"
    assert all(name in KERNELS["route"] for name, *_ in apart[:3])


def test_max_blocks_is_the_same_in_both():
    text = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    assert int(re.search(r"#define D2M_MAX_BLOCKS (\d+)", text)[1]) == nvrtc.MAX_BLOCKS
