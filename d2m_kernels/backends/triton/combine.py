"""Combine: every token gathers its K rows and sums them in a fixed order, in fp32.

Shapes: T tokens, D model, K top-k, N = T*K slots, y in expert order. No atomics, so two runs are
bitwise equal. The fused form of this sits in the epilogue of the down-projection (`ffn.py`); this
launch serves `combine` itself and layers without a shared expert.
"""

import triton
import triton.language as tl

from d2m_kernels.backends.triton.launch import power_of_two
from d2m_kernels.backends.triton.operands import Routed, rows_of
from d2m_kernels.backends.triton.pieces import _rounded


@triton.jit
def _add_routed(acc, s, live, t, t_ok, offs_d, d_ok, top_k, scale):
    """acc[t] += scale * sum_j weights[t, j] * y[inverse[t*K + j]] over the rows below `live`."""
    for j in tl.range(0, top_k):
        slot = t * top_k + j
        row = tl.load(s.inverse + slot, mask=t_ok, other=2147483647)
        here = row < live
        factor = tl.full(t.shape, 1.0, tl.float32) * scale
        if s.weights is not None:
            factor = tl.load(s.weights + slot, mask=here, other=0.0) * scale
        ptrs = s.y2 + (row.to(tl.int64) * s.stride_yn)[:, None] + offs_d[None, :]
        y = tl.load(ptrs, mask=here[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
        # A row that is not there adds nothing, though its factor be NaN.
        acc += tl.where(here, factor, 0.0)[:, None] * y
    return acc


@triton.jit(do_not_specialize=["T"])
def _combine_fwd_kernel(
    s, base_ptr, stride_bt, bias_ptr, out_ptr, T, D, E, top_k, scale, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = base[t] + bias + scale * sum_j weights[t, j] * y[inverse[t*K + j]]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t_ok = t < T
    d_ok = offs_d < D
    mask = t_ok[:, None] & d_ok[None, :]
    live = tl.load(s.offsets + E)
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    acc = _add_routed(acc, s, live, t, t_ok, offs_d, d_ok, top_k, scale)
    if base_ptr is not None:
        ptrs = base_ptr + (t.to(tl.int64) * stride_bt)[:, None] + offs_d[None, :]
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (t.to(tl.int64) * D)[:, None] + offs_d[None, :]
    tl.store(out_ptrs, _rounded(acc, out_ptr.dtype.element_ty), mask=mask)


def combine(y_ND, inverse_TK, weights_TK, offsets, base_TD=None, bias_D=None, scale: float = 1.0):
    """out[t] = base[t] + bias + scale * sum_j weights[t, j] * y[inverse[t, j]], in y's dtype."""
    out = y_ND.new_empty(inverse_TK.shape[0], y_ND.shape[1])
    combine_into(out, y_ND, inverse_TK, weights_TK, offsets, base_TD, bias_D, scale)
    return out


def combine_into(out, y_ND, inverse_TK, weights_TK, offsets, base_TD=None, bias_D=None, scale=1.0):
    (T, D), top_k = out.shape, inverse_TK.shape[1]
    if out.numel() == 0:
        return
    # 128 threads x 16 bytes cover 1024 columns of a row; four rows keep four loads in flight.
    BLOCK_D = min(power_of_two(D, 16), 1024)
    BLOCK_T = max(1, 4096 // BLOCK_D) if T > 1 else 1
    _combine_fwd_kernel[(triton.cdiv(T, BLOCK_T), triton.cdiv(D, BLOCK_D))](
        Routed(*rows_of(y_ND), inverse_TK, weights_TK, offsets), *rows_of(base_TD), bias_D, out, T,
        D, offsets.shape[0] - 1, top_k, float(scale), BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
