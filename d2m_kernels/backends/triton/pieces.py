"""Pieces that several kernels share: products, activations, the tile map, the K loops.

Shapes: T tokens, D model, F hidden, E experts, N = T*K slots; BLOCK_* are tile edges. All of it is
inlined into the kernels; nothing here is launched by itself.
"""

import os

import torch
import triton
import triton.language as tl

from d2m_kernels.activations import GATED

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32: exactly, unless torch itself was told that TF32 will do."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def pointwise_name(activation: str | None) -> str:
    """The constexpr ACT of the kernels: what goes through a nonlinearity (gated: the gate)."""
    return GATED.get(activation, activation) or "none"


def even(size: int, block: int) -> bool:
    return size % block == 0


# ------------------------------------------------------------------------------------- arithmetic


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    # The interpreter multiplies bf16 operands as if their bits were integers.
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
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
def _act(z, ACT: tl.constexpr):
    """act(z) in fp32."""
    if ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u): one exponential, and no cancellation for large -z
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
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
def _next_start(start, total):
    """Where a program goes on in the next list of tiles, having walked `total` from `start` on.

    Two lists then share the programs out as one list of both would.
    """
    steps = tl.cdiv(tl.maximum(total - start, 0), tl.num_programs(0))
    return start + steps * tl.num_programs(0) - total


@triton.jit
def _expert_spans(offsets_ptr, E, M, tiles_n, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Vectors over e: first row, end row, end of its tiles. Lane E is the tail offsets[E] .. M.

    Kept in registers for a program's whole life, so that finding a tile's expert is three
    reductions over BLOCK_E lanes and no memory access.
    """
    e = tl.arange(0, BLOCK_E)
    lo = tl.load(offsets_ptr + e, mask=e <= E, other=0)
    hi = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    hi = tl.where(e == E, tl.maximum(M, lo), hi)
    tiles = tl.where(e <= E, (hi - lo + BLOCK_M - 1) // BLOCK_M * tiles_n, 0)
    return e, lo, hi, tiles, tl.cumsum(tiles, 0)


@triton.jit
def _expert_of(tile, e, lo, hi, tiles, ends):
    """(expert, first row, end row, tile's number within the expert)."""
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    here = e == expert
    row_lo = tl.sum(tl.where(here, lo, 0), 0)
    row_hi = tl.sum(tl.where(here, hi, 0), 0)
    local = tile - tl.sum(tl.where(here, ends - tiles, 0), 0)
    return expert, row_lo, row_hi, local


# ---------------------------------------------------------------------------------------- K loops


@triton.jit
def _load_a(a_ptr, a_desc, rows, row0, stride_at, col, K, k0, EVEN_K: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_K] at columns col + k0: by TMA from row0 on, else of these rows."""
    if a_desc is not None:
        return a_desc.load([row0, col + k0])
    offs_k = k0 + tl.arange(0, BLOCK_K)
    ptrs = a_ptr + (rows.to(tl.int64) * stride_at)[:, None] + (col + offs_k)[None, :]
    if EVEN_K:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_k < K)[None, :], other=0.0)


@triton.jit
def _load_w(w_ptr, w_desc, w_row, w_col, stride_wn, n0, N, K, k0, TRANS_W: tl.constexpr,
            EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """W tile as [BLOCK_K, BLOCK_N]: W is [N, K] in memory, or [K, N] when TRANS_W.

    Its corner lies at (w_row, w_col) of the matrix w_ptr points to, whatever group owns it.
    """
    if w_desc is not None:
        if TRANS_W:
            return w_desc.load([w_row + k0, w_col + n0])
        else:
            return w_desc.load([w_row + n0, w_col + k0]).T
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    if TRANS_W:
        ptrs = w_ptr + ((w_row + offs_k).to(tl.int64) * stride_wn)[:, None] + (w_col + offs_n)
    else:
        ptrs = w_ptr + ((w_row + offs_n).to(tl.int64) * stride_wn)[None, :] + (
            w_col + offs_k
        )[:, None]  # fmt: skip
    if EVEN_N and EVEN_K:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_k < K)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def _matmul(acc, a_ptr, a_desc, rows, row0, stride_at, a_col, w_ptr, w_desc, w_row, w_col,
            stride_wn, n0, N, K, PRECISION: tl.constexpr, TRANS_W: tl.constexpr,
            EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """acc += A W over K."""
    for k0 in tl.range(0, K, BLOCK_K):
        a = _load_a(a_ptr, a_desc, rows, row0, stride_at, a_col, K, k0, EVEN_K, BLOCK_K)
        w = _load_w(w_ptr, w_desc, w_row, w_col, stride_wn, n0, N, K, k0, TRANS_W, EVEN_N, EVEN_K,
                    BLOCK_N, BLOCK_K)  # fmt: skip
        acc = _dot(a, w, acc, PRECISION)
    return acc
