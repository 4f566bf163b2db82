"""One output tile of a grouped GEMM: its rows, its products, its epilogue.

Shapes: T tokens, M rows in expert order, N outputs and K inputs of an expert, S shared neurons.
"""

import triton
import triton.language as tl

from d2m_kernels.backends.triton.operands import Left, Right
from d2m_kernels.backends.triton.pieces import (  # fmt: skip
    _act,
    _dot,
    _load_a,
    _load_w,
    _matmul,
    _next_tile,
    _parts,
    _rounded,
)


@triton.jit
def _grouped_gemm_tile(s, d, g, tile, ticket_ptr, r0, n0, K, depth, GATHER_DIV: tl.constexpr,
                       P: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Rows r0 .. of group g, columns n0 .. of its width; the sum goes over `depth` of K.

    Returns the program's next tile.
    """
    N: tl.constexpr = P.N
    PARTS: tl.constexpr = P.PARTS
    r = r0 + tl.arange(0, BLOCK_M)
    source = tl.minimum(r, g.end - 1)  # rows past the group repeat its last, unstored
    if s.rows is not None:
        if s.out_shared is not None:  # the shared expert's rows are x's own
            named = source < tl.where(g.routed, g.end, 0)
            slot = tl.load(s.rows + source, mask=named, other=0)
            source = tl.where(named, slot // GATHER_DIV, source)
        else:
            source = tl.load(s.rows + source) // GATHER_DIV

    # -- the products
    a = Left(s.x, s.stride_xt, d.a, source, r0)
    w = Right(s.w, s.stride_wn, d.w, g.row, g.col, n0, g.width)
    gate = Right(s.gate, s.stride_gn, d.gate, g.row, g.col, n0, g.width)
    acc = tl.zeros((BLOCK_M, N), dtype=tl.float32)
    if P.GATED:
        acc_gate = tl.zeros((BLOCK_M, N), dtype=tl.float32)
        COPIED: tl.constexpr = d.a is None or d.w is None or d.gate is None
        for k0 in tl.range(0, depth, P.K):
            a_tile = _load_a(a, 0, K, k0, P)
            w_tile = _load_w(w, K, k0, P)
            gate_tile = _load_w(gate, K, k0, P)
            acc = _dot(a_tile, w_tile, acc, COPIED, P)
            acc_gate = _dot(a_tile, gate_tile, acc_gate, COPIED, P)
    elif d.a is not None and s.rows is not None:  # the shared expert's rows alone are consecutive
        if g.routed:
            gathered = Left(s.x, s.stride_xt, None, source, r0)
            acc = _matmul(acc, gathered, 0, w, K, depth, P)
        else:
            acc = _matmul(acc, a, 0, w, K, depth, P)
    else:
        acc = _matmul(acc, a, 0, w, K, depth, P)
        if P.DUAL:
            acc = _matmul(acc, a, K, gate, K, depth, P)

    tile = _next_tile(tile, ticket_ptr)

    # -- bias, pre-activation, activation: in parts: the whole tile overflows the registers
    out = s.out
    z = s.z
    if s.out_shared is not None:
        out = tl.where(g.routed, s.out, s.out_shared)
        if s.z is not None:
            z = tl.where(g.routed, s.z, s.z_shared)
    bias_width = tl.where(depth > 0, g.width, 0)
    pieces = _parts(acc, PARTS)
    gates = pieces
    if P.GATED:
        gates = _parts(acc_gate, PARTS)
    for i in tl.static_range(PARTS):
        _finish(pieces[i], gates[i], s, g, out, z, r, n0 + i * (N // PARTS), bias_width,
                N // PARTS, P)  # fmt: skip
    return tile


@triton.jit
def _finish(acc, acc_gate, s, g, out_ptr, z_ptr, r, n0, bias_width, WIDTH: tl.constexpr,
            P: tl.constexpr):  # fmt: skip
    """Epilogue of columns n0 .. n0 + WIDTH: stores z (where wanted) and the activated output."""
    ACT: tl.constexpr = P.ACT
    offs_n = n0 + tl.arange(0, WIDTH)
    mask = (r < g.end)[:, None] & (offs_n < g.width)[None, :]
    r_long = r.to(tl.int64)
    if s.bias is not None:
        bias = tl.load(s.bias + g.bias + offs_n, mask=offs_n < bias_width, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if s.bias_gate is not None:
        bias = tl.load(s.bias_gate + g.bias + offs_n, mask=offs_n < bias_width, other=0.0)
        acc_gate += bias.to(tl.float32)[None, :]
    if z_ptr is not None:
        dtype = z_ptr.dtype.element_ty
        if P.GATED:
            z_ptrs = z_ptr + (r_long * (2 * g.width))[:, None] + offs_n[None, :]
            tl.store(z_ptrs, _rounded(acc, dtype), mask=mask)
            tl.store(z_ptrs + g.width, _rounded(acc_gate, dtype), mask=mask)
        else:
            z_ptrs = z_ptr + (r_long * g.width)[:, None] + offs_n[None, :]
            tl.store(z_ptrs, _rounded(acc, dtype), mask=mask)
    if P.GATED:
        acc = acc * _act(acc_gate, ACT)
    else:
        acc = _act(acc, ACT)
    out_ptrs = out_ptr + (r_long * g.width)[:, None] + offs_n[None, :]
    tl.store(out_ptrs, _rounded(acc, out_ptr.dtype.element_ty), mask=mask)
