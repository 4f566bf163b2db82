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
from d2m_kernels.backends.triton.launch import launch, numbered, power_of_two, product, tickets
from d2m_kernels.backends.triton.operands import (
    NO_WEIGHTS,
    Descriptors,
    Stream,
    Weights,
    rows_descriptor,
    rows_of,
    stacked,
)
from d2m_kernels.backends.triton.pieces import _corner_of, _group_of, _row_tiles
from d2m_kernels.backends.triton.tile import _grouped_gemm_tile


@triton.jit
def _grouped_gemm_tiles(tile, first, s, d, T, M, N, K, S, E, corners, ticket_ptr,
                        GATHER_DIV: tl.constexpr, BLOCK_E: tl.constexpr,
                        P: tl.constexpr):  # fmt: skip
    """This program's tiles, from `tile` on, of a stream whose first has the number `first`.

    Returns the program's next tile and the number after the stream's last.
    """
    SHARED: tl.constexpr = s.out_shared is not None
    HALF: tl.constexpr = P.M // 2
    WHOLE: tl.constexpr = P.M
    HALVES: tl.constexpr = P.HALVES
    spans = _row_tiles(s.offsets, T, M, N, S, E, SHARED, BLOCK_E, P, HALVES)
    last = first + spans.total
    while tile < last:
        g = _group_of(tile - first, spans, T, N, S, corners, SHARED, HALVES)
        depth = tl.where(g.expert == E, 0, K)  # the tail has no product: it is stored as zero
        r0, n0 = _corner_of(g, P, HALVES)
        if g.half:  # the descriptor's box is a whole tile
            rows_by_name = Descriptors(None, d.w, d.gate)
            tile = _grouped_gemm_tile(s, rows_by_name, g, tile, ticket_ptr, r0, n0, K, depth,
                                      GATHER_DIV, P, HALF)  # fmt: skip
        else:
            tile = _grouped_gemm_tile(s, d, g, tile, ticket_ptr, r0, n0, K, depth, GATHER_DIV, P,
                                      WHOLE)  # fmt: skip
    return tile, last


@triton.jit(do_not_specialize=["T", "M", "T_2", "M_2"])
def _grouped_gemm_fwd_kernel(
    s, T, M, x_desc, w_desc, gate_desc, s_2, T_2, M_2, x_desc_2, w_desc_2, gate_desc_2,
    N, K, S, E, corners, ticket_ptr, PAIR: tl.constexpr, GATHER_DIV: tl.constexpr,
    BLOCK_E: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[r] = act(x[row(r)] W_e^T + b_e) for the rows of every expert e, zero past offsets[E].

    GATED: out = (x W^T + b) * act(x G^T + b_g). DUAL: out = x[:, :K] W + x[:, K:2K] G instead, one
    sum over both halves. The shared expert (out_shared given) is a group of all T rows, S wide.
    A PAIR's second stream continues the list of tiles where the first one ends.
    """
    tile, last = _grouped_gemm_tiles(
        tl.program_id(0), 0, s, Descriptors(x_desc, w_desc, gate_desc), T, M, N, K, S, E, corners,
        ticket_ptr, GATHER_DIV, BLOCK_E, P,
    )  # fmt: skip
    if PAIR:
        _grouped_gemm_tiles(
            tile, last, s_2, Descriptors(x_desc_2, w_desc_2, gate_desc_2), T_2, M_2, N, K, S, E,
            corners, ticket_ptr, GATHER_DIV, BLOCK_E, P,
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

    def arguments(self, config, K: int, trans: bool) -> dict:
        w, gate = self.weights, self.gate or NO_WEIGHTS
        consecutive = self.gather is None
        if self.out_shared is not None:  # its rows are, whichever way the experts' are found
            consecutive = config.shared_tma and self.gate is None
        s = Stream(
            *rows_of(self.x), self.gather, self.offsets, *w[:2], *gate[:2], self.bias,
            self.bias_gate, self.out, self.z, self.out_shared, self.z_shared,
        )  # fmt: skip
        return dict(
            s=s, T=self.shared[0], M=self.out.shape[0],
            x_desc=rows_descriptor(config, self.x, K) if consecutive else None,
            w_desc=w.describe(config, K, trans), gate_desc=gate.describe(config, K, trans),
        )  # fmt: skip


def grouped_matmul(
    stage, streams: list[Operands], ticket, *, N, K, gather_div=1, activation=None, trans=False,
    dual=False,
):  # fmt: skip
    """Launches the kernel for one or two streams, which differ in tensors and rows alone."""
    streams = sorted((s for s in streams if s.work()), key=Operands.work)
    if not streams:
        return
    large = streams[-1]  # its sizes choose the tile, and its half tiles come last
    (T, S), M, E, x = large.shared, large.out.shape[0], large.offsets.shape[0] - 1, large.x
    gated = large.gate is not None and not dual

    def arguments(config):
        return numbered([s.arguments(config, K, trans) for s in streams]) | dict(
            N=N, K=K, S=S, E=E, corners=large.weights.corners, GATHER_DIV=gather_div,
            BLOCK_E=power_of_two(E + 2),
            P=product(config, x, (N, S), K, 32, trans, activation, gated, dual,
                      approx=config.approx and x.dtype == torch.bfloat16),
        )  # fmt: skip

    rows, width = (T, S) if T * S > M * N else (M / E, N)
    config = configs.select(stage, x, rows, width, (N, K, S))
    if dual and K % config.block_k:
        config = configs.unbounded(config)
    launch(_grouped_gemm_fwd_kernel, stage, config, x.device, arguments, ticket)


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
    w = stacked(w_ENK, 0 if any_bias is None else any_bias.stride(0))
    gate = None if w_gate is None else stacked(w_gate)
    operands = Operands(x, offsets, w, out, gate, gather, bias_EN, bias_gate)
    stage = "up" if w_gate is None else "up_gated"
    grouped_matmul(stage, [operands], next(tickets(x.device, 1)), N=N, K=K, activation=activation)
    return out
