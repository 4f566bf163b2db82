"""One output tile of a grouped GEMM: its rows, its products, its epilogue.

Shapes: T tokens, M rows in expert order, N outputs and K inputs of an expert, S shared neurons.
"""

import triton
import triton.language as tl

from d2m_kernels.backends.triton.pieces import (  # fmt: skip
    _act,
    _dot,
    _load_a,
    _load_w,
    _matmul,
    _parts,
    _rounded,
)


@triton.jit
def _grouped_gemm_tile(
    x_ptr, x_desc, rows_ptr, out_shared_ptr, w_ptr, w_desc, gate_ptr, gate_desc, bias_ptr,
    bias_gate_ptr, out_ptr, z_ptr, r0, row_hi, n0, width, gathered, row, col, bias_off, k_end, K,
    stride_xt, stride_wn, stride_gn,
    ACT: tl.constexpr, PRECISION: tl.constexpr, GATHER_DIV: tl.constexpr, GATED: tl.constexpr,
    DUAL: tl.constexpr, TRANS_W: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile: rows r0 .. of a group that ends at row_hi, columns n0 .. of its width."""
    r = r0 + tl.arange(0, BLOCK_M)
    source = tl.minimum(r, row_hi - 1)  # rows past the group repeat its last, unstored
    if rows_ptr is not None:
        if out_shared_ptr is not None:  # the shared expert's rows are x's own
            named = source < gathered
            slot = tl.load(rows_ptr + source, mask=named, other=0)
            source = tl.where(named, slot // GATHER_DIV, source)
        else:
            source = tl.load(rows_ptr + source) // GATHER_DIV

    # -- the products
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GATED:
        acc_gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(0, k_end, BLOCK_K):
            a = _load_a(x_ptr, x_desc, source, r0, stride_xt, 0, K, k0, EVEN_K, BLOCK_K)
            w = _load_w(w_ptr, w_desc, row, col, stride_wn, n0, width, K, k0, TRANS_W,
                        EVEN_N, EVEN_K, BLOCK_N, BLOCK_K)  # fmt: skip
            g = _load_w(gate_ptr, gate_desc, row, col, stride_gn, n0, width, K, k0, TRANS_W,
                        EVEN_N, EVEN_K, BLOCK_N, BLOCK_K)  # fmt: skip
            acc = _dot(a, w, acc, PRECISION)
            acc_gate = _dot(a, g, acc_gate, PRECISION)
    else:
        acc = _matmul(acc, x_ptr, x_desc, source, r0, stride_xt, 0, w_ptr, w_desc, row, col,
                      stride_wn, n0, width, k_end, PRECISION, TRANS_W, EVEN_N, EVEN_K,
                      BLOCK_N, BLOCK_K)  # fmt: skip
        if DUAL:
            acc = _matmul(acc, x_ptr, x_desc, source, r0, stride_xt, K, gate_ptr, gate_desc,
                          row, col, stride_gn, n0, width, k_end, PRECISION, TRANS_W, EVEN_N,
                          EVEN_K, BLOCK_N, BLOCK_K)  # fmt: skip

    # -- bias, pre-activation, activation: in parts: the whole tile overflows the registers
    bias_width = tl.where(k_end > 0, width, 0)
    pieces = _parts(acc, PARTS)
    gates = pieces
    if GATED:
        gates = _parts(acc_gate, PARTS)
    for i in tl.static_range(PARTS):
        _finish(pieces[i], gates[i], out_ptr, z_ptr, bias_ptr, bias_gate_ptr, bias_off, r,
                row_hi, n0 + i * (BLOCK_N // PARTS), width, bias_width, ACT, GATED,
                BLOCK_N // PARTS)  # fmt: skip


@triton.jit
def _finish(acc, acc_gate, out_ptr, z_ptr, bias_ptr, bias_gate_ptr, bias_off, r, row_hi, n0, width,
            bias_width, ACT: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Epilogue of columns n0 .. n0 + WIDTH: stores z (where wanted) and the activated output."""
    offs_n = n0 + tl.arange(0, WIDTH)
    mask = (r < row_hi)[:, None] & (offs_n < width)[None, :]
    r_long = r.to(tl.int64)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + bias_off + offs_n, mask=offs_n < bias_width, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if bias_gate_ptr is not None:
        bias = tl.load(bias_gate_ptr + bias_off + offs_n, mask=offs_n < bias_width, other=0.0)
        acc_gate += bias.to(tl.float32)[None, :]
    if z_ptr is not None:
        dtype = z_ptr.dtype.element_ty
        if GATED:
            z_ptrs = z_ptr + (r_long * (2 * width))[:, None] + offs_n[None, :]
            tl.store(z_ptrs, _rounded(acc, dtype), mask=mask)
            tl.store(z_ptrs + width, _rounded(acc_gate, dtype), mask=mask)
        else:
            z_ptrs = z_ptr + (r_long * width)[:, None] + offs_n[None, :]
            tl.store(z_ptrs, _rounded(acc, dtype), mask=mask)
    if GATED:
        acc = acc * _act(acc_gate, ACT)
    else:
        acc = _act(acc, ACT)
    out_ptrs = out_ptr + (r_long * width)[:, None] + offs_n[None, :]
    tl.store(out_ptrs, _rounded(acc, out_ptr.dtype.element_ty), mask=mask)
