"""Down-projection of the shared expert, with the combine in its epilogue.

Shapes: T tokens, D model, S shared neurons, K top-k, N = T*K slots. The routed experts' rows y2
[N, D] (in expert order) come from an earlier launch; these tiles gather and add them while their
own sum is still in registers, which saves writing and re-reading [T, D] (2 x 28 MB of 208 MB at
T = 4608). In the backward pass the same launch makes dx: h is then dz, w2 is w1 read the other way.
"""

import triton
import triton.language as tl

from d2m_kernels.triton_ import configs
from d2m_kernels.triton_.combine import _add_routed
from d2m_kernels.triton_.common import _grouped, _matmul, _parts, _rounded, even, precision
from d2m_kernels.triton_.launch import launch, rows_descriptor
from d2m_kernels.triton_.weights import Weights


@triton.jit
def _add_and_store(
    acc, y2_ptr, inverse_ptr, weights_ptr, bias_ptr, adaln_ptr, residual_ptr, out_ptr, t, T, n0, D,
    live, top_k, scale, stride_yn, stride_ab, stride_rt, tokens_per_sample, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t] = residual[t] + adaln[sample of t] * (acc + bias + the routed rows of t)."""
    offs_n = n0 + tl.arange(0, WIDTH)
    t_ok = t < T
    n_ok = offs_n < D
    mask = t_ok[:, None] & n_ok[None, :]
    t_long = t.to(tl.int64)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if y2_ptr is not None:
        acc = _add_routed(acc, y2_ptr, inverse_ptr, weights_ptr, t, t_ok, offs_n, n_ok, live, D,
                          stride_yn, scale, top_k)  # fmt: skip
    if adaln_ptr is not None:
        sample = t_long // tokens_per_sample
        ptrs = adaln_ptr + (sample * stride_ab)[:, None] + offs_n[None, :]
        acc *= tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        ptrs = residual_ptr + (t_long * stride_rt)[:, None] + offs_n[None, :]
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (t_long * D)[:, None] + offs_n[None, :]
    tl.store(out_ptrs, _rounded(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _down_fwd_kernel(
    h_ptr, h_desc, w_ptr, w_desc, gate_ptr, gate_desc,
    y2_ptr, inverse_ptr, weights_ptr, offsets_ptr, bias_ptr, adaln_ptr, residual_ptr, out_ptr,
    T, D, S, E, top_k, scale, stride_ht, stride_wn, stride_gn, stride_yn, stride_ab, stride_rt,
    tokens_per_sample,
    PRECISION: tl.constexpr, DUAL: tl.constexpr, TRANS_W: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = h[:, :S] W (+ h[:, S:] G when DUAL) + bias + scale * sum_j weights[:, j] * y2[...]."""
    tiles_m = tl.cdiv(T, BLOCK_M)
    tiles_n = tl.cdiv(D, BLOCK_N)
    live = 0
    if y2_ptr is not None:
        live = tl.load(offsets_ptr + E)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _grouped(tile, tiles_m, tiles_n, GROUP_M)
        t = m * BLOCK_M + tl.arange(0, BLOCK_M)
        n0 = n * BLOCK_N
        source = tl.minimum(t, T - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = _matmul(
            acc,
            h_ptr,
            h_desc,
            source,
            m * BLOCK_M,
            stride_ht,
            0,
            w_ptr,
            w_desc,
            0,
            0,
            stride_wn,
            n0,
            D,
            S,
            PRECISION,
            TRANS_W,
            EVEN_N,
            EVEN_K,
            BLOCK_N,
            BLOCK_K,
        )
        if DUAL:
            acc = _matmul(acc, h_ptr, h_desc, source, m * BLOCK_M, stride_ht, S, gate_ptr,
                          gate_desc, 0, 0, stride_gn, n0, D, S, PRECISION, TRANS_W, EVEN_N, EVEN_K,
                          BLOCK_N, BLOCK_K)  # fmt: skip
        pieces = _parts(acc, PARTS)
        for i in tl.static_range(PARTS):
            _add_and_store(pieces[i], y2_ptr, inverse_ptr, weights_ptr, bias_ptr, adaln_ptr,
                           residual_ptr, out_ptr, t, T, n0 + i * (BLOCK_N // PARTS), D, live, top_k,
                           scale, stride_yn, stride_ab, stride_rt, tokens_per_sample,
                           BLOCK_N // PARTS)  # fmt: skip


def down_shared(
    stage, h, weights: Weights, out, offsets, *, K, y2=None, inverse_TK=None, weights_TK=None,
    bias=None, scale=1.0, gate: Weights | None = None, trans=False, adaln_BD=None,
    residual_TD=None,
):  # fmt: skip
    """Launches the kernel: out [T, D] from h [T, K or 2K] and the first K neurons of `weights`."""
    T, D = out.shape
    if T == 0 or D == 0:
        return

    def arguments(config):
        describe = lambda w: None if w is None else w.describe(config, D, K, trans)  # noqa: E731
        return dict(
            h_ptr=h, h_desc=rows_descriptor(config, h, K), w_ptr=weights.matrix,
            w_desc=describe(weights), gate_ptr=None if gate is None else gate.matrix,
            gate_desc=describe(gate), y2_ptr=y2, inverse_ptr=inverse_TK, weights_ptr=weights_TK,
            offsets_ptr=offsets, bias_ptr=bias, adaln_ptr=adaln_BD, residual_ptr=residual_TD,
            out_ptr=out, T=T, D=D, S=K, E=offsets.shape[0] - 1,
            top_k=0 if inverse_TK is None else inverse_TK.shape[1], scale=float(scale),
            stride_ht=h.stride(0), stride_wn=weights.stride,
            stride_gn=0 if gate is None else gate.stride,
            stride_yn=0 if y2 is None else y2.stride(0),
            stride_ab=0 if adaln_BD is None else adaln_BD.stride(0),
            stride_rt=0 if residual_TD is None else residual_TD.stride(0),
            tokens_per_sample=1 if adaln_BD is None else T // adaln_BD.shape[0],
            PRECISION=precision(h.dtype), DUAL=gate is not None, TRANS_W=trans,
            EVEN_N=even(D, config.block_n), EVEN_K=even(K, config.block_k),
            PARTS=config.parts(32 if adaln_BD is None and residual_TD is None else 16),
        )  # fmt: skip

    config = configs.select(stage, h, T, D)
    launch(_down_fwd_kernel, stage, config, h.device, arguments)
