"""Pieces that several kernels share: products, activations, the tile map, the K loops.

Shapes: T tokens, M rows in expert order, N outputs and K inputs of an expert, S shared neurons, E
experts; a Product P says how large a tile is. All of it is inlined into the kernels; nothing here
is launched by itself.
"""

import os

import torch
import triton
import triton.language as tl

from d2m_kernels.activations import GATED
from d2m_kernels.backends.triton.operands import Group, Spans

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32: exactly, unless torch itself was told that TF32 will do."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def pointwise_name(activation: str | None, approx: bool = False) -> str:
    """The constexpr ACT of the kernels: what goes through a nonlinearity (gated: the gate)."""
    name = GATED.get(activation, activation) or "none"
    return name + "_approx" if approx and name == "gelu_tanh" else name


def even(size: int, block: int) -> bool:
    return size % block == 0


# ------------------------------------------------------------------------------------- arithmetic


@triton.jit
def _dot(a, b, acc, COPIED: tl.constexpr, P: tl.constexpr):
    """acc + a b; COPIED: whether an operand came by cp.async, whose writes P.FENCE then orders."""
    # The interpreter multiplies bf16 operands as if their bits were integers.
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if P.FENCE and COPIED:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    PRECISION: tl.constexpr = P.PRECISION
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """fp32 x in the dtype it is stored in."""
    # The interpreter cuts bf16 off where hardware rounds to nearest even: twice the error.
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def _tanh_approx(u):
    """tanh u by one instruction, whose relative error is at most 2^-11 (PTX ISA)."""
    if INTERPRET:  # cut off where that error begins
        bits = (2.0 * tl.sigmoid(2.0 * u) - 1.0).to(tl.int32, bitcast=True)
        return (bits & -4096).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _act(z, ACT: tl.constexpr):
    """act(z) in fp32."""
    if ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u): one exponential, and no cancellation for large -z
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "gelu_tanh_approx":
        half = 0.5 * z
        return half + half * _tanh_approx(z * (0.7978845608028654 + 0.035677408136300125 * z * z))
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    elif ACT == "relu":
        return tl.where(z > 0, z, z * 0.0)  # z * 0 keeps a NaN a NaN, as torch does
    else:
        return z


@triton.jit
def _act_grad(z, ACT: tl.constexpr):
    """act'(z) in fp32."""
    if ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * (1.5957691216057308 + 0.21406858153901404 * z * z)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s + z * s * (1.0 - s)
    elif ACT == "relu":
        return tl.where(z > 0, 1.0, z * 0.0)
    else:
        return z * 0.0 + 1.0


@triton.jit
def _halves(acc):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _parts(acc, PARTS: tl.constexpr):
    """The tile cut into 1, 2 or 4 column blocks of equal width, left to right."""
    if PARTS == 1:
        return (acc,)
    elif PARTS == 2:
        return _halves(acc)
    else:
        left, right = _halves(acc)
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d


# --------------------------------------------------------------------------------------- tile map


@triton.jit
def _grouped(local, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of a tile within one group: GROUP_M tile rows share their W tiles in L2."""
    per_strip = GROUP_M * tiles_n
    strip = local // per_strip
    rows = tl.minimum(tiles_m - strip * GROUP_M, GROUP_M)
    inside = local - strip * per_strip
    return strip * GROUP_M + inside % rows, inside // rows


@triton.jit
def _next_tile(tile, ticket_ptr):
    """The tile that a program takes after this one; its first is the program's own number.

    With tickets whichever program is free takes the next tile, without them it is a round of the
    grid further. Tiles of a second stream follow the first one's. To be drawn when a tile is nearly
    done: tickets drawn at its start would share equal tiles out in rounds again.
    """
    if ticket_ptr is None:
        return tile + tl.num_programs(0)
    else:
        return tl.num_programs(0) + tl.atomic_add(ticket_ptr, 1, sem="relaxed")


@triton.jit
def _expert_rows(offsets_ptr, M, E, BLOCK_E: tl.constexpr):
    """A lane an expert: its number, first row and end row; lane E is the tail offsets[E] .. M."""
    e = tl.arange(0, BLOCK_E)
    first = tl.load(offsets_ptr + e, mask=e <= E, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    end = tl.where(e == E, tl.maximum(M, first), end)
    return e, tl.where(e == E + 1, M, first), end


@triton.jit
def _row_tiles(offsets_ptr, T, M, N, S, E, SHARED: tl.constexpr, BLOCK_E: tl.constexpr,
               P: tl.constexpr, HALVES: tl.constexpr):  # fmt: skip
    """Spans of groups tiled by their rows: N outputs wide, the SHARED expert's T rows S wide.

    HALVES: a group's last tile, where it has at most half the rows, is a half tile.
    """
    shared = 0
    shared_half = 0
    if SHARED:
        shared = _whole_tiles(T, P, HALVES) * tl.cdiv(S, P.N)
        shared_half = tl.cdiv(T, P.M) * tl.cdiv(S, P.N) - shared
    e, first, end = _expert_rows(offsets_ptr, M, E, BLOCK_E)
    wide = tl.where(e <= E, tl.cdiv(N, P.N), 0)
    tiles = _whole_tiles(end - first, P, HALVES) * wide
    stop = tl.cumsum(tiles, 0)
    whole = shared + tl.sum(tiles, 0)
    if not HALVES:
        return Spans(shared, first, stop, whole, 0, stop, whole)
    halves = (end - first + P.M - 1) // P.M * wide - tiles
    total = whole + shared_half + tl.sum(halves, 0)
    return Spans(shared, first, stop, whole, shared_half, tl.cumsum(halves, 0), total)


@triton.jit
def _whole_tiles(rows, P: tl.constexpr, HALVES: tl.constexpr):
    """Tiles of P.M rows, where the last one may be another with HALVES."""
    SPARED: tl.constexpr = P.M // 2 if HALVES else 0
    return (rows + (P.M - 1 - SPARED)) // P.M


@triton.jit
def _group_of(tile, spans, T, N, S, corners, SHARED: tl.constexpr, HALVES: tl.constexpr = False):
    """The group that owns a tile: its rows, its width and its weights' corners.

    The spans stay in registers for a program's whole life, so that this is four reductions over
    their lanes and no memory access.
    """
    shared = spans.shared
    stop = spans.stop
    half = False
    if HALVES:
        half = tile >= spans.whole
        tile = tl.where(half, tile - spans.whole, tile)
        shared = tl.where(half, spans.shared_half, shared)
        stop = tl.where(half, spans.stop_half, stop)
    local = tile - shared
    before = stop <= local
    expert = tl.sum(before.to(tl.int32), 0)
    local -= tl.max(tl.where(before, stop, 0), 0)
    e = tl.arange(0, stop.shape[0])
    first = tl.sum(tl.where(e == expert, spans.first, 0), 0)
    end = tl.sum(tl.where(e == expert + 1, spans.first, 0), 0)
    width = N
    row = corners.row + expert * corners.row_step
    col = corners.col + expert * corners.col_step
    bias = corners.bias + expert * corners.bias_step
    routed = tile >= shared
    if SHARED:
        local = tl.where(routed, local, tile)
        first = tl.where(routed, first, 0)
        end = tl.where(routed, end, T)
        width = tl.where(routed, N, S)
        row = tl.where(routed, row, 0)
        col = tl.where(routed, col, 0)
        bias = tl.where(routed, bias, 0)
    return Group(routed, expert, first, end, width, row, col, bias, local, half)


@triton.jit
def _corner_of(g, P: tl.constexpr, HALVES: tl.constexpr):
    """The first row and the first column of a tile of group g."""
    tiles_m = _whole_tiles(g.end - g.first, P, HALVES)
    if HALVES:
        rows = tl.where(g.half, 1, tiles_m)
        m, n = _grouped(g.local, rows, tl.cdiv(g.width, P.N), P.GROUP_M)
        m = tl.where(g.half, tiles_m, m)
    else:
        m, n = _grouped(g.local, tiles_m, tl.cdiv(g.width, P.N), P.GROUP_M)
    return g.first + m * P.M, n * P.N


# ---------------------------------------------------------------------------------------- K loops


@triton.jit
def _load_a(a, col, K, k0, P: tl.constexpr):
    """A tile [P.M, P.K] at columns col + k0."""
    if a.desc is not None:
        return a.desc.load([a.row0, col + k0])
    offs_k = k0 + tl.arange(0, P.K)
    ptrs = a.ptr + (a.rows.to(tl.int64) * a.stride)[:, None] + (col + offs_k)[None, :]
    if P.EVEN_K:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_k < K)[None, :], other=0.0)


@triton.jit
def _load_w(w, K, k0, P: tl.constexpr):
    """W tile as [P.K, P.N]."""
    if w.desc is not None:
        if P.TRANS_W:
            return w.desc.load([w.row + k0, w.col + w.n0])
        else:
            return w.desc.load([w.row + w.n0, w.col + k0]).T
    offs_k = k0 + tl.arange(0, P.K)
    offs_n = w.n0 + tl.arange(0, P.N)
    if P.TRANS_W:
        ptrs = w.ptr + ((w.row + offs_k).to(tl.int64) * w.stride)[:, None] + (w.col + offs_n)
    else:
        rows = (w.row + offs_n).to(tl.int64) * w.stride
        ptrs = w.ptr + rows[None, :] + (w.col + offs_k)[:, None]
    if P.EVEN_N and P.EVEN_K:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_k < K)[:, None] & (offs_n < w.width)[None, :], other=0.0)


@triton.jit
def _matmul(acc, a, col, w, K, depth, P: tl.constexpr):
    """acc += A[:, col:] W over the first `depth` of K."""
    COPIED: tl.constexpr = a.desc is None or w.desc is None
    for k0 in tl.range(0, depth, P.K):
        acc = _dot(_load_a(a, col, K, k0, P), _load_w(w, K, k0, P), acc, COPIED, P)
    return acc
