"""Grouped GEMM on the device's own offsets: one persistent launch over all groups' tiles.

Shapes: T tokens, E experts, M rows in expert order, N outputs and K inputs of an expert, S shared
neurons. Serves `grouped_gemm`, the up-projection (where the shared expert's tiles ride along and
the activation sits in the epilogue), the routed down-projection and the routed part of dx. Two
streams (image and text tokens, each with weights and a routing of its own) go in one launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.launch import (
    Weights,
    launch,
    numbered,
    power_of_two,
    rows_descriptor,
    stacked,
)
from d2m_kernels.backends.triton.pieces import (  # fmt: skip
    _expert_of,
    _expert_spans,
    _grouped,
    _next_start,
    even,
    pointwise_name,
    precision,
)
from d2m_kernels.backends.triton.tile import _grouped_gemm_tile


@triton.jit
def _grouped_gemm_tiles(
    start, x_ptr, x_desc, rows_ptr, offsets_ptr, w_ptr, w_desc, gate_ptr, gate_desc, bias_ptr,
    bias_gate_ptr, out_ptr, z_ptr, out_shared_ptr, z_shared_ptr, T, M, N, K, S, E, stride_xt,
    stride_wn, stride_gn, w_row, w_col, w_row_step, w_col_step, bias_at, bias_step,
    ACT: tl.constexpr, PRECISION: tl.constexpr, GATHER_DIV: tl.constexpr, GATED: tl.constexpr,
    DUAL: tl.constexpr, TRANS_W: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """This program's tiles of one stream, from tile `start` on; returns the next stream's start."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    e, lo, hi, tiles, ends = _expert_spans(offsets_ptr, E, M, tiles_n, BLOCK_M, BLOCK_E)
    shared_tiles = 0
    if out_shared_ptr is not None:
        shared_tiles = tl.cdiv(T, BLOCK_M) * tl.cdiv(S, BLOCK_N)
    total = shared_tiles + tl.sum(tiles, 0)
    for tile in tl.range(start, total, tl.num_programs(0)):
        # -- which group, which rows, which weights
        expert, row_lo, row_hi, local = _expert_of(tile - shared_tiles, e, lo, hi, tiles, ends)
        group_tiles_n = tiles_n
        width = N
        row = w_row + expert * w_row_step
        col = w_col + expert * w_col_step
        bias_off = bias_at + expert * bias_step
        k_end = tl.where(expert == E, 0, K)  # the tail has no product: it is stored as zero
        if out_shared_ptr is not None:
            routed = tile >= shared_tiles
            row_lo = tl.where(routed, row_lo, 0)
            row_hi = tl.where(routed, row_hi, T)
            local = tl.where(routed, local, tile)
            group_tiles_n = tl.where(routed, tiles_n, tl.cdiv(S, BLOCK_N))
            width = tl.where(routed, N, S)
            row = tl.where(routed, row, 0)
            col = tl.where(routed, col, 0)
            bias_off = tl.where(routed, bias_off, 0)
            k_end = tl.where(routed, k_end, K)
        tiles_m = tl.cdiv(row_hi - row_lo, BLOCK_M)
        m, n = _grouped(local, tiles_m, group_tiles_n, GROUP_M)
        n0 = n * BLOCK_N
        r0 = row_lo + m * BLOCK_M
        gathered = M
        if out_shared_ptr is not None:
            gathered = tl.where(routed, M, 0)
        out_base = out_ptr
        z_base = z_ptr
        if out_shared_ptr is not None:
            out_base = tl.where(routed, out_ptr, out_shared_ptr)
            if z_ptr is not None:
                z_base = tl.where(routed, z_ptr, z_shared_ptr)
        if HALVES:
            few = row_hi - r0 <= BLOCK_M // 2
        else:
            few = False
        if few:
            _grouped_gemm_tile(
                x_ptr, None, rows_ptr, out_shared_ptr, w_ptr, w_desc, gate_ptr, gate_desc,
                bias_ptr, bias_gate_ptr, out_base, z_base, r0, row_hi, n0, width, gathered, row,
                col, bias_off, k_end, K, stride_xt, stride_wn, stride_gn, ACT, PRECISION,
                GATHER_DIV, GATED, DUAL, TRANS_W,
                EVEN_N, EVEN_K, BLOCK_M // 2, BLOCK_N, BLOCK_K, PARTS,
            )  # fmt: skip
        else:
            _grouped_gemm_tile(
                x_ptr, x_desc, rows_ptr, out_shared_ptr, w_ptr, w_desc, gate_ptr, gate_desc,
                bias_ptr, bias_gate_ptr, out_base, z_base, r0, row_hi, n0, width, gathered, row,
                col, bias_off, k_end, K, stride_xt, stride_wn, stride_gn, ACT, PRECISION,
                GATHER_DIV,
                GATED, DUAL, TRANS_W, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
            )  # fmt: skip
    return _next_start(start, total)


@triton.jit(do_not_specialize=["T", "M", "T_2", "M_2"])
def _grouped_gemm_fwd_kernel(
    x_ptr, x_desc, rows_ptr, offsets_ptr, w_ptr, w_desc, gate_ptr, gate_desc, bias_ptr,
    bias_gate_ptr, out_ptr, z_ptr, out_shared_ptr, z_shared_ptr, T, M, stride_xt, stride_wn,
    stride_gn,
    x_ptr_2, x_desc_2, rows_ptr_2, offsets_ptr_2, w_ptr_2, w_desc_2, gate_ptr_2, gate_desc_2,
    bias_ptr_2, bias_gate_ptr_2, out_ptr_2, z_ptr_2, out_shared_ptr_2, z_shared_ptr_2, T_2, M_2,
    stride_xt_2, stride_wn_2, stride_gn_2,
    N, K, S, E, w_row, w_col, w_row_step, w_col_step, bias_at, bias_step,
    ACT: tl.constexpr, PRECISION: tl.constexpr, GATHER_DIV: tl.constexpr, GATED: tl.constexpr,
    DUAL: tl.constexpr, TRANS_W: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """out[r] = act(x[row(r)] W_e^T + b_e) for the rows of every expert e, zero past offsets[E].

    GATED: out = (x W^T + b) * act(x G^T + b_g). DUAL: out = x[:, :K] W + x[:, K:2K] G instead, one
    sum over both halves. The shared expert (out_shared_ptr given) is a group of all T rows, S wide.
    A second stream (x_ptr_2 given) continues the list of tiles where the first one ends. HALVES: a
    group's last tile, where it has at most half the rows, is computed as half a tile.
    """
    start = _grouped_gemm_tiles(
        tl.program_id(0), x_ptr, x_desc, rows_ptr, offsets_ptr, w_ptr, w_desc, gate_ptr, gate_desc,
        bias_ptr, bias_gate_ptr, out_ptr, z_ptr, out_shared_ptr, z_shared_ptr, T, M, N, K, S, E,
        stride_xt, stride_wn, stride_gn, w_row, w_col, w_row_step, w_col_step, bias_at, bias_step,
        ACT, PRECISION, GATHER_DIV, GATED, DUAL, TRANS_W, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        BLOCK_E, GROUP_M, PARTS, HALVES,
    )  # fmt: skip
    if x_ptr_2 is not None:
        _grouped_gemm_tiles(
            start, x_ptr_2, x_desc_2, rows_ptr_2, offsets_ptr_2, w_ptr_2, w_desc_2, gate_ptr_2,
            gate_desc_2, bias_ptr_2, bias_gate_ptr_2, out_ptr_2, z_ptr_2, out_shared_ptr_2,
            z_shared_ptr_2, T_2, M_2, N, K, S, E, stride_xt_2, stride_wn_2, stride_gn_2, w_row,
            w_col, w_row_step, w_col_step, bias_at, bias_step, ACT, PRECISION, GATHER_DIV, GATED,
            DUAL, TRANS_W, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP_M, PARTS,
            HALVES,
        )  # fmt: skip


@dataclass
class Operands:
    """One stream's tensors of a launch; `gate` is the second matrix of a gated or dual product."""

    x: torch.Tensor
    offsets: torch.Tensor
    weights: Weights
    out: torch.Tensor  # [M, N]
    gate: Weights | None = None
    gather: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bias_gate: torch.Tensor | None = None
    z: torch.Tensor | None = None
    out_shared: torch.Tensor | None = None  # [T, S]
    z_shared: torch.Tensor | None = None

    @property
    def shared(self) -> tuple[int, int]:
        return (0, 0) if self.out_shared is None else tuple(self.out_shared.shape)

    def work(self) -> int:
        T, S = self.shared
        return self.out.numel() + T * S

    def arguments(self, config, N: int, K: int, trans: bool) -> dict:
        describe = lambda w: None if w is None else w.describe(config, N, K, trans)  # noqa: E731
        consecutive = self.gather is None and self.out_shared is None
        gate = self.gate
        return dict(
            x_ptr=self.x, x_desc=rows_descriptor(config, self.x, K) if consecutive else None,
            rows_ptr=self.gather, offsets_ptr=self.offsets, w_ptr=self.weights.matrix,
            w_desc=describe(self.weights), gate_ptr=None if gate is None else gate.matrix,
            gate_desc=describe(gate), bias_ptr=self.bias, bias_gate_ptr=self.bias_gate,
            out_ptr=self.out, z_ptr=self.z, out_shared_ptr=self.out_shared,
            z_shared_ptr=self.z_shared, T=self.shared[0], M=self.out.shape[0],
            stride_xt=self.x.stride(0), stride_wn=self.weights.stride,
            stride_gn=0 if gate is None else gate.stride,
        )  # fmt: skip


def grouped_matmul(
    stage, streams: list[Operands], *, N, K, gather_div=1, bias_at=0, bias_step=0, activation=None,
    trans=False, dual=False,
):  # fmt: skip
    """Launches the kernel for one or two streams, which differ in tensors and rows alone."""
    streams = [s for s in streams if s.work()]
    if not streams:
        return
    large = max(streams, key=Operands.work)  # its sizes choose the tile
    (T, S), M, E = large.shared, large.out.shape[0], large.offsets.shape[0] - 1
    rows, width = (T, S) if T * S > M * N else (M / E, N)
    w, x = large.weights, large.x

    def arguments(config):
        per_stream = [s.arguments(config, N, K, trans) for s in streams]
        return numbered(per_stream) | dict(
            N=N, K=K, S=S, E=E, w_row=w.row, w_col=w.col, w_row_step=w.row_step,
            w_col_step=w.col_step, bias_at=bias_at, bias_step=bias_step,
            ACT=pointwise_name(activation), PRECISION=precision(x.dtype), GATHER_DIV=gather_div,
            GATED=large.gate is not None and not dual, DUAL=dual, TRANS_W=trans,
            EVEN_N=even(N, config.block_n) and even(S, config.block_n),
            EVEN_K=even(K, config.block_k), BLOCK_E=power_of_two(E + 1), PARTS=config.parts(32),
            HALVES=config.halves,
        )  # fmt: skip

    config = configs.select(stage, x, rows, width, (N, K, S))
    launch(_grouped_gemm_fwd_kernel, stage, config, x.device, arguments)


def grouped_gemm(
    x, w_ENK, offsets, w_gate=None, gather=None, bias_EN=None, bias_gate=None, activation=None
):
    """Row r of expert e: act(x[gather[r]] w[e]^T + bias[e]); rows past offsets[E] are zero."""
    E, N, K = w_ENK.shape
    out = x.new_empty(x.shape[0] if gather is None else gather.shape[0], N)
    if w_gate is not None and w_gate.stride() != w_ENK.stride():
        w_ENK, w_gate = w_ENK.contiguous(), w_gate.contiguous()
    if bias_gate is not None and bias_EN is not None and bias_gate.stride(0) != bias_EN.stride(0):
        bias_EN, bias_gate = bias_EN.contiguous(), bias_gate.contiguous()
    any_bias = bias_EN if bias_EN is not None else bias_gate
    gate = None if w_gate is None else stacked(w_gate)
    operands = Operands(x, offsets, stacked(w_ENK), out, gate, gather, bias_EN, bias_gate)
    grouped_matmul(
        "up" if w_gate is None else "up_gated", [operands], N=N, K=K,
        bias_step=0 if any_bias is None else any_bias.stride(0), activation=activation,
    )  # fmt: skip
    return out
