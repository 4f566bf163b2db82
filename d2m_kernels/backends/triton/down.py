"""Down-projection of the shared expert, with the combine in its epilogue.

Shapes: T tokens, D model, S shared neurons, K top-k, N = T*K slots. The routed experts' rows y2
[N, D] (in expert order) come from an earlier launch; these tiles gather and add them while their
own sum is still in registers, which saves writing and re-reading [T, D] (2 x 28 MB of 208 MB at
T = 4608). In the backward pass the same launch makes dx: h is then dz, w2 is w1 read the other way.
Two streams, each with weights of its own, go in one launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.combine import _add_routed
from d2m_kernels.backends.triton.launch import Weights, launch, numbered, rows_descriptor
from d2m_kernels.backends.triton.pieces import (
    _grouped,
    _matmul,
    _next_start,
    _parts,
    _rounded,
    even,
    precision,
)


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


@triton.jit
def _down_tiles(
    start, h_ptr, h_desc, w_ptr, w_desc, gate_ptr, gate_desc, y2_ptr, inverse_ptr, weights_ptr,
    offsets_ptr, bias_ptr, adaln_ptr, residual_ptr, out_ptr, T, D, S, E, top_k, scale, stride_ht,
    stride_wn, stride_gn, stride_yn, stride_ab, stride_rt, tokens_per_sample,
    PRECISION: tl.constexpr, DUAL: tl.constexpr, TRANS_W: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """This program's tiles of one stream, from tile `start` on; returns the next stream's start."""
    tiles_m = tl.cdiv(T, BLOCK_M)
    tiles_n = tl.cdiv(D, BLOCK_N)
    live = 0
    if y2_ptr is not None:
        live = tl.load(offsets_ptr + E)
    for tile in tl.range(start, tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _grouped(tile, tiles_m, tiles_n, GROUP_M)
        t = m * BLOCK_M + tl.arange(0, BLOCK_M)
        n0 = n * BLOCK_N
        source = tl.minimum(t, T - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = _matmul(acc, h_ptr, h_desc, source, m * BLOCK_M, stride_ht, 0, w_ptr, w_desc, 0, 0,
                      stride_wn, n0, D, S, PRECISION, TRANS_W, EVEN_N, EVEN_K, BLOCK_N,
                      BLOCK_K)  # fmt: skip
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
    return _next_start(start, tiles_m * tiles_n)


@triton.jit(do_not_specialize=["T", "T_2"])
def _down_fwd_kernel(
    h_ptr, h_desc, w_ptr, w_desc, gate_ptr, gate_desc, y2_ptr, inverse_ptr, weights_ptr,
    offsets_ptr, bias_ptr, adaln_ptr, residual_ptr, out_ptr, T, stride_ht, stride_wn, stride_gn,
    stride_yn, stride_ab, stride_rt, tokens_per_sample,
    h_ptr_2, h_desc_2, w_ptr_2, w_desc_2, gate_ptr_2, gate_desc_2, y2_ptr_2, inverse_ptr_2,
    weights_ptr_2, offsets_ptr_2, bias_ptr_2, adaln_ptr_2, residual_ptr_2, out_ptr_2, T_2,
    stride_ht_2, stride_wn_2, stride_gn_2, stride_yn_2, stride_ab_2, stride_rt_2,
    tokens_per_sample_2,
    D, S, E, top_k, scale,
    PRECISION: tl.constexpr, DUAL: tl.constexpr, TRANS_W: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = h[:, :S] W (+ h[:, S:] G when DUAL) + bias + scale * sum_j weights[:, j] * y2[...].

    A second stream (h_ptr_2 given) continues the list of tiles where the first one ends.
    """
    start = _down_tiles(
        tl.program_id(0), h_ptr, h_desc, w_ptr, w_desc, gate_ptr, gate_desc, y2_ptr, inverse_ptr,
        weights_ptr, offsets_ptr, bias_ptr, adaln_ptr, residual_ptr, out_ptr, T, D, S, E, top_k,
        scale, stride_ht, stride_wn, stride_gn, stride_yn, stride_ab, stride_rt, tokens_per_sample,
        PRECISION, DUAL, TRANS_W, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PARTS,
    )  # fmt: skip
    if h_ptr_2 is not None:
        _down_tiles(
            start, h_ptr_2, h_desc_2, w_ptr_2, w_desc_2, gate_ptr_2, gate_desc_2, y2_ptr_2,
            inverse_ptr_2, weights_ptr_2, offsets_ptr_2, bias_ptr_2, adaln_ptr_2, residual_ptr_2,
            out_ptr_2, T_2, D, S, E, top_k, scale, stride_ht_2, stride_wn_2, stride_gn_2,
            stride_yn_2, stride_ab_2, stride_rt_2, tokens_per_sample_2, PRECISION, DUAL, TRANS_W,
            EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PARTS,
        )  # fmt: skip


@dataclass
class Shared:
    """One stream's tensors of a launch: out [T, D] from h [T, S or 2S] and the routed rows y2."""

    h: torch.Tensor
    weights: Weights
    out: torch.Tensor
    offsets: torch.Tensor
    y2: torch.Tensor | None = None  # [N, D]
    inverse_TK: torch.Tensor | None = None
    weights_TK: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    gate: Weights | None = None  # second matrix of a sum over both halves of h
    adaln_BD: torch.Tensor | None = None
    residual_TD: torch.Tensor | None = None

    def arguments(self, config, D: int, S: int, trans: bool) -> dict:
        describe = lambda w: None if w is None else w.describe(config, D, S, trans)  # noqa: E731
        step = lambda t: 0 if t is None else t.stride(0)  # noqa: E731
        T, gate, adaln = self.out.shape[0], self.gate, self.adaln_BD
        return dict(
            h_ptr=self.h, h_desc=rows_descriptor(config, self.h, S), w_ptr=self.weights.matrix,
            w_desc=describe(self.weights), gate_ptr=None if gate is None else gate.matrix,
            gate_desc=describe(gate), y2_ptr=self.y2, inverse_ptr=self.inverse_TK,
            weights_ptr=self.weights_TK, offsets_ptr=self.offsets, bias_ptr=self.bias,
            adaln_ptr=adaln, residual_ptr=self.residual_TD, out_ptr=self.out, T=T,
            stride_ht=self.h.stride(0), stride_wn=self.weights.stride,
            stride_gn=0 if gate is None else gate.stride, stride_yn=step(self.y2),
            stride_ab=step(adaln), stride_rt=step(self.residual_TD),
            tokens_per_sample=1 if adaln is None else T // adaln.shape[0],
        )  # fmt: skip


def down_shared(stage, streams: list[Shared], *, S: int, scale=1.0, trans=False):
    """Launches the kernel for one or two streams, over the first S neurons of their weights."""
    streams = [s for s in streams if s.out.numel()]
    if not streams:
        return
    large = max(streams, key=lambda s: s.out.shape[0])  # its sizes choose the tile
    T, D = large.out.shape
    plain = all(s.adaln_BD is None and s.residual_TD is None for s in streams)

    def arguments(config):
        return numbered([s.arguments(config, D, S, trans) for s in streams]) | dict(
            D=D, S=S, E=large.offsets.shape[0] - 1,
            top_k=0 if large.inverse_TK is None else large.inverse_TK.shape[1], scale=float(scale),
            PRECISION=precision(large.h.dtype), DUAL=large.gate is not None, TRANS_W=trans,
            EVEN_N=even(D, config.block_n), EVEN_K=even(S, config.block_k),
            PARTS=config.parts(32 if plain else 16),
        )  # fmt: skip

    config = configs.select(stage, large.h, T, D, (D, S))
    launch(_down_fwd_kernel, stage, config, large.h.device, arguments)
