"""The CUDA kernels without nvcc: csrc/cuda/*.cuh compiled at first use by NVRTC, launched by CuPy.

Shapes: T tokens, D model, E experts, K top-k, N = T*K slots.

`route`, `permute`, `combine` and `workspace_ints` take what `_d2m_cuda`'s take, so `native.py` can
use this module in its place. NVRTC is called through ctypes and needs no driver; what it made is
kept in $D2M_CACHE_DIR (default ~/.cache/dense2moe), one cubin per kernel, GPU architecture and
source text.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

MAX_BLOCKS = 1024  # of the counting sort, as D2M_MAX_BLOCKS in csrc/cuda/launch.h
_TYPES = {0: "float", 1: "d2m::bf16", 2: "d2m::f16"}
_SIZES = {0: 4, 1: 2, 2: 2}
_OPTIONS = ("-std=c++17",)


def source_dir() -> Path:
    """csrc/cuda: beside the package in a clone, inside it when installed."""
    here = Path(__file__).resolve().parents[1]
    for path in (here.parent / "csrc" / "cuda", here / "csrc"):
        if (path / "route.cuh").is_file():
            return path
    raise FileNotFoundError(f"the CUDA sources (route.cuh) are not in {here.parent}/csrc or {here}")


@functools.cache
def constants() -> dict[str, int]:
    """The integer constants of the sources, e.g. {"kTokens": 9, ...}: the launches follow them."""
    text = "".join(p.read_text() for p in sorted(source_dir().glob("*.cuh")))
    found = re.findall(r"^constexpr int (k\w+) = (\d+);", text, re.MULTILINE)
    return {name: int(value) for name, value in found}


# --------------------------------------------------------------------------------------- compile


def _library_candidates():
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")  # in the process, or known to the linker
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():  # NVIDIA's wheels
        yield from sorted(map(str, Path(root).glob("*/lib/libnvrtc.so.*")), reverse=True)
    homes = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    for home in filter(None, homes):
        for lib in ("lib64", "lib"):
            yield from sorted(map(str, (Path(home) / lib).glob("libnvrtc.so.*")), reverse=True)


@functools.cache
def library():
    """libnvrtc, or None where there is none."""
    for path in _library_candidates():
        if "builtins" in path or ".alt." in path:
            continue
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def compile_kernel(expression: str, header: str, arch: str) -> tuple[bytes, str]:
    """Compile one kernel, e.g. ("d2m::permute_rank_kernel", "permute.cuh", "sm_90").

    -> (cubin, the kernel's name in it). Needs no GPU. Errors: RuntimeError with NVRTC's log.
    """
    lib = library()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = f'#include "{header}"\n'.encode()

    def call(name, *args):
        code = getattr(lib, name)(*args)
        if code:
            lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            what = lib.nvrtcGetErrorString(code).decode()
            if name == "nvrtcCompileProgram":
                lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
                log = ctypes.create_string_buffer(size.value)
                lib.nvrtcGetProgramLog(program, log)
                what += f"\n{log.value.decode(errors='replace')}"
            raise RuntimeError(f"{name} for {expression} on {arch}: {what}")

    options = [f"-arch={arch}", f"-I{source_dir()}", *_OPTIONS]
    argv = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    call("nvrtcCreateProgram", ctypes.byref(program), source, b"d2m.cu", 0, None, None)
    try:
        call("nvrtcAddNameExpression", program, expression.encode())
        call("nvrtcCompileProgram", program, len(options), argv)
        lowered = ctypes.c_char_p()
        call("nvrtcGetLoweredName", program, expression.encode(), ctypes.byref(lowered))
        name = lowered.value.decode()
        call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        call("nvrtcGetCUBIN", program, cubin)
        return cubin.raw, name
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def cached_kernel(expression: str, header: str, arch: str) -> tuple[Path, str]:
    """`compile_kernel`, kept on disk -> (path of the cubin, the kernel's name in it)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    text = "".join(p.read_text() for p in sorted(source_dir().glob("*.cuh")))
    parts = (expression, header, arch, *_OPTIONS, f"{major.value}.{minor.value}", text)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("D2M_CACHE_DIR") or Path.home() / ".cache" / "dense2moe")
    cubin, name = folder / f"{key}.cubin", folder / f"{key}.name"
    if cubin.is_file() and name.is_file():
        return cubin, name.read_text()
    code, symbol = compile_kernel(expression, header, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(cubin, code)
    except OSError:  # a read-only home: compiled again by the next process
        cubin = Path(tempfile.mkdtemp(prefix="d2m-")) / f"{key}.cubin"
        cubin.write_bytes(code)
    else:
        _write(name, symbol.encode())
    return cubin, symbol


def _write(path: Path, data: bytes) -> None:
    """All or nothing: other processes may be doing the same."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as f:
        f.write(data)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------- launch


def unavailable() -> str | None:
    """None if kernels can be compiled and launched this way, else the reason why not."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'dense2moe[cupy]')"
    if library() is None:
        return "libnvrtc is not found (pip install nvidia-cuda-nvrtc)"
    try:
        source_dir()
    except FileNotFoundError as error:
        return str(error)
    return None


@functools.cache
def _function(expression: str, header: str, arch: str):
    import cupy

    path, symbol = cached_kernel(expression, header, arch)
    return cupy.RawModule(path=str(path)).get_function(symbol)


def _launch(expression, header, grid, threads, args, stream, shared=0):
    import cupy
    import torch

    major, minor = torch.cuda.get_device_capability()
    kernel = _function(expression, header, f"sm_{major}{minor}")
    if shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared
    with cupy.cuda.ExternalStream(stream):
        kernel(grid, (threads,), args, shared_mem=shared)


_p, _i, _l, _f = np.uint64, np.int32, np.int64, np.float32  # pointer, int, long long, float


def _spans(items: int, grain: int) -> tuple[int, int]:
    """(blocks, span): `items` in spans of a multiple of `grain`, as in csrc/cuda/launch.h."""
    grains = -(-items // grain)
    per_block = max(1, -(-grains // MAX_BLOCKS))
    return -(-grains // per_block), per_block * grain


def _group(E: int, vec: bool) -> int:
    """Experts that a block of the route kernel takes together, as in csrc/cuda/route.cu."""
    if not vec or E <= 4:
        return 4
    padded_8, padded_12 = -(-E // 8) * 8, -(-E // 12) * 12
    return 8 if padded_8 < padded_12 else 12


def workspace_ints(E: int) -> int:
    return (E + 1) * MAX_BLOCKS


def modulate_route(
    x, x_dtype, x_stride, scale, scale_stride, shift, shift_stride, tokens, eps, modulated,
    router, router_dtype, router_stride, mask, T, D, E, K,
    probs, weights, ids, offsets, order, inverse, workspace, stream,
):  # fmt: skip
    c = constants()
    size, router_size = _SIZES[x_dtype], _SIZES[router_dtype]
    vec = D % (16 // size) == 0 and not (
        x % 16 or x_stride * size % 16 or router % 16 or router_stride * router_size % 16
        or scale % 16 or scale_stride * size % 16 or shift % 16 or shift_stride * size % 16
        or modulated % 16
    )  # fmt: skip
    eg = _group(E, vec)
    fused = eg >= E
    adaln = (_p(scale), _l(scale_stride), _p(shift), _l(shift_stride), _i(tokens), _f(eps))
    if modulated and not fused:
        warps = c["kModulateWarps"]
        _launch(
            f"d2m::modulate_kernel<{_TYPES[x_dtype]}, {16 // size if vec else 1}>", "route.cuh",
            (-(-T // warps), 1), 32 * warps,
            (_p(x), _l(x_stride), *adaln, _i(T), _i(D), _p(modulated)), stream,
        )  # fmt: skip
        x, x_stride, modulated = modulated, D, 0
    token_warps = c["kTokenWarps"]
    while token_warps > 1 and T <= c["kTokens"] * (token_warps // 2) * c["kRouteBlocks"]:
        token_warps //= 2
    tile = c["kTokens"] * token_warps
    blocks, span = _spans(T, tile)
    chunk = c["kStep"] * c["kDepthWarps"]
    partial = (c["kDepthWarps"] + 1) * c["kTokens"] * c["kTokenWarps"] * eg * 4
    shared = max(2 * eg * chunk * router_size, partial) + (eg + 1) * 4
    flags = f"{str(vec).lower()}, {str(fused).lower()}"
    _launch(
        f"d2m::route_kernel<{_TYPES[x_dtype]}, {_TYPES[router_dtype]}, {eg}, {flags}>",
        "route.cuh", (blocks, -(-E // eg)), 32 * token_warps * c["kDepthWarps"],
        (_p(x), _l(x_stride), _p(router), _l(router_stride), _p(mask), *adaln, _p(modulated),
         _i(T), _i(D), _i(E), _i(K), _i(span // tile), _p(probs), _p(weights), _p(ids),
         _p(workspace)),
        stream, shared,
    )  # fmt: skip
    if not fused:
        _launch(
            "d2m::route_select_kernel", "route.cuh", (blocks, 1), 32 * c["kSelectWarps"],
            (_p(mask), _i(T), _i(E), _i(K), _i(span), _p(probs), _p(weights), _p(ids),
             _p(workspace)),
            stream,
        )  # fmt: skip
    if order:
        _rank(ids, T * K, E, blocks, span * K, offsets, order, inverse, workspace, stream)


def route(x, x_dtype, x_stride, *rest):
    """`modulate_route` of x as it is; `rest`: its arguments from the router on."""
    modulate_route(x, x_dtype, x_stride, 0, 0, 0, 0, 1, 0.0, 0, *rest)


def _rank(ids, N, E, blocks, span, offsets, order, inverse, workspace, stream):
    args = (_p(ids), _p(workspace), _i(N), _i(E), _i(span), _p(offsets), _p(order), _p(inverse))
    threads = constants()["kPermuteThreads"]
    _launch("d2m::permute_rank_kernel", "permute.cuh", (blocks, 1), threads, args, stream)


def permute(ids, N, E, offsets, order, inverse, workspace, stream):
    threads = constants()["kPermuteThreads"]
    blocks, span = _spans(N, threads)
    args = (_p(ids), _i(N), _i(E), _i(span), _p(workspace))
    _launch("d2m::permute_count_kernel", "permute.cuh", (blocks, 1), threads, args, stream)
    _rank(ids, N, E, blocks, span, offsets, order, inverse, workspace, stream)


def combine(
    y, dtype, y_stride, inverse, weights, offsets, E, base, base_dtype, base_stride, bias,
    bias_dtype, scale, out, T, D, K, stream,
):  # fmt: skip
    size, threads = _SIZES[dtype], constants()["kCombineThreads"]
    unaligned = D * size % 16 or y % 16 or y_stride * size % 16 or out % 16
    if base and base_dtype == dtype:
        unaligned = unaligned or base % 16 or base_stride * size % 16
    vec = 1 if unaligned else 16 // size
    _launch(
        f"d2m::combine_kernel<{_TYPES[dtype]}, {vec}>", "combine.cuh",
        (-(-T * (D // vec) // threads), 1), threads,
        (_p(y), _l(y_stride), _p(inverse), _p(weights), _p(offsets + 4 * E), _p(base),
         _i(base_dtype), _l(base_stride), _p(bias), _i(bias_dtype), _f(scale), _p(out),
         _i(T), _i(D), _i(K)),
        stream,
    )  # fmt: skip
