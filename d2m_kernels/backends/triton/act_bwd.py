"""First launch of the backward: dA' = dy W2, and in its epilogue dz, the weighted h and dweight.

Shapes: T tokens, D model, S shared neurons, H neurons of an expert, E experts, K top-k, N = T*K
slots. h = act(z) is recomputed and y2 is never wanted: dweight = scale * rowsum((dy W2_e) * h).
Two streams, each with weights and a routing of its own, go in one launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.launch import Weights, launch, numbered, power_of_two
from d2m_kernels.backends.triton.pieces import (  # fmt: skip
    _act,
    _act_grad,
    _expert_of,
    _expert_spans,
    _grouped,
    _matmul,
    _next_start,
    _parts,
    _rounded,
    even,
    pointwise_name,
    precision,
)

LEAST_BLOCK_N = min(config.block_n for config in configs.by_name().values())


@triton.jit
def _differentiate(acc, z_ptr, dz_ptr, h_ptr, factor, r, row_hi, n0, width, h_width,
                   ACT: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Columns n0 .. n0 + WIDTH of dz = factor * dA' * act'(z) and factor * h; returns row sums."""
    offs_n = n0 + tl.arange(0, WIDTH)
    n_ok = offs_n < width
    mask = (r < row_hi)[:, None] & n_ok[None, :]
    r_long = r.to(tl.int64)
    weighted = acc * factor[:, None]
    if GATED:
        ptrs = (r_long * (2 * width))[:, None] + offs_n[None, :]
        up = tl.load(z_ptr + ptrs, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z_ptr + ptrs + width, mask=mask, other=0.0).to(tl.float32)
        active = _act(gate, ACT)
        h = up * active
        if dz_ptr is not None:
            dtype = dz_ptr.dtype.element_ty
            tl.store(dz_ptr + ptrs, _rounded(weighted * active, dtype), mask=mask)
            d_gate = weighted * up * _act_grad(gate, ACT)
            tl.store(dz_ptr + ptrs + width, _rounded(d_gate, dtype), mask=mask)
    else:
        ptrs = (r_long * width)[:, None] + offs_n[None, :]
        z = tl.load(z_ptr + ptrs, mask=mask, other=0.0).to(tl.float32)
        h = _act(z, ACT)
        if dz_ptr is not None:
            dz = weighted * _act_grad(z, ACT)
            tl.store(dz_ptr + ptrs, _rounded(dz, dz_ptr.dtype.element_ty), mask=mask)
    if h_ptr is not None:
        h_mask = (r < row_hi)[:, None] & (offs_n < h_width)[None, :]
        h_ptrs = h_ptr + (r_long * width)[:, None] + offs_n[None, :]
        tl.store(h_ptrs, _rounded(h * factor[:, None], h_ptr.dtype.element_ty), mask=h_mask)
    return tl.sum(tl.where(mask, acc * h, 0.0), axis=1)


@triton.jit
def _down_bwd_tiles(
    start, dy_ptr, order_ptr, offsets_ptr, weights_ptr, w_ptr, w_desc, z_ptr, z_shared_ptr, dz_ptr,
    dz_shared_ptr, h_ptr, h_shared_ptr, partial_ptr, T, stride_dt, stride_wk, stride_ps, N, K, S,
    E, top_k, scale, shared_h_width,
    ACT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """This program's tiles of one stream, from tile `start` on; returns the next stream's start."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    e, lo, hi, tiles, ends = _expert_spans(offsets_ptr, E, 0, tiles_n, BLOCK_M, BLOCK_E)
    shared_tiles = 0
    if z_shared_ptr is not None:
        shared_tiles = tl.cdiv(T, BLOCK_M) * tl.cdiv(S, BLOCK_N)
    total = shared_tiles + tl.sum(tiles, 0)
    for tile in tl.range(start, total, tl.num_programs(0)):
        expert, row_lo, row_hi, local = _expert_of(tile - shared_tiles, e, lo, hi, tiles, ends)
        routed = tile >= shared_tiles
        row_lo = tl.where(routed, row_lo, 0)
        row_hi = tl.where(routed, row_hi, T)
        local = tl.where(routed, local, tile)
        group_tiles_n = tl.where(routed, tiles_n, tl.cdiv(S, BLOCK_N))
        width = tl.where(routed, N, S)
        col = tl.where(routed, S + expert * N, 0)
        h_width = tl.where(routed, N, shared_h_width)
        m, n = _grouped(local, tl.cdiv(row_hi - row_lo, BLOCK_M), group_tiles_n, GROUP_M)
        n0 = n * BLOCK_N
        r = row_lo + m * BLOCK_M + tl.arange(0, BLOCK_M)
        source = tl.minimum(r, row_hi - 1)
        gathered = source < tl.where(routed, row_hi, 0)
        slot = tl.load(order_ptr + source, mask=gathered, other=0)
        weight = tl.load(weights_ptr + slot, mask=gathered, other=1.0)
        factor = tl.where(gathered, scale * weight, 1.0)
        source = tl.where(gathered, slot // top_k, source)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = _matmul(acc, dy_ptr, None, source, 0, stride_dt, 0, w_ptr, w_desc, 0, col, stride_wk,
                      n0, width, K, PRECISION, True, EVEN_N, EVEN_K, BLOCK_N, BLOCK_K)  # fmt: skip

        z_base = z_ptr
        dz_base = dz_ptr
        h_base = h_ptr
        if z_shared_ptr is not None:
            z_base = tl.where(routed, z_ptr, z_shared_ptr)
            if dz_ptr is not None:
                dz_base = tl.where(routed, dz_ptr, dz_shared_ptr)
            if h_shared_ptr is not None:  # else the shared neurons are frozen: no h of theirs
                h_base = tl.where(routed, h_ptr, h_shared_ptr)
        pieces = _parts(acc, PARTS)
        sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for i in tl.static_range(PARTS):
            sums += _differentiate(pieces[i], z_base, dz_base, h_base, factor, r, row_hi,
                                   n0 + i * (BLOCK_N // PARTS), width, h_width, ACT, GATED,
                                   BLOCK_N // PARTS)  # fmt: skip
        if partial_ptr is not None:
            ptrs = partial_ptr + slot.to(tl.int64) * stride_ps + n
            tl.store(ptrs, scale * sums, mask=r < tl.where(routed, row_hi, 0))
    return _next_start(start, total)


@triton.jit(do_not_specialize=["T", "T_2"])
def _down_bwd_kernel(
    dy_ptr, order_ptr, offsets_ptr, weights_ptr, w_ptr, w_desc, z_ptr, z_shared_ptr, dz_ptr,
    dz_shared_ptr, h_ptr, h_shared_ptr, partial_ptr, T, stride_dt, stride_wk, stride_ps,
    dy_ptr_2, order_ptr_2, offsets_ptr_2, weights_ptr_2, w_ptr_2, w_desc_2, z_ptr_2,
    z_shared_ptr_2, dz_ptr_2, dz_shared_ptr_2, h_ptr_2, h_shared_ptr_2, partial_ptr_2, T_2,
    stride_dt_2, stride_wk_2, stride_ps_2,
    N, K, S, E, top_k, scale, shared_h_width,
    ACT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dA' = dy[token] W2_e; stores dz, factor * h and dweight's partial sums, one a column tile.

    factor = scale * weight for a routed row, 1 for the shared expert's (z_shared_ptr given).
    A second stream (dy_ptr_2 given) continues the list of tiles where the first one ends.
    """
    start = _down_bwd_tiles(
        tl.program_id(0), dy_ptr, order_ptr, offsets_ptr, weights_ptr, w_ptr, w_desc, z_ptr,
        z_shared_ptr, dz_ptr, dz_shared_ptr, h_ptr, h_shared_ptr, partial_ptr, T, stride_dt,
        stride_wk, stride_ps, N, K, S, E, top_k, scale, shared_h_width, ACT, PRECISION, GATED,
        EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP_M, PARTS,
    )  # fmt: skip
    if dy_ptr_2 is not None:
        _down_bwd_tiles(
            start, dy_ptr_2, order_ptr_2, offsets_ptr_2, weights_ptr_2, w_ptr_2, w_desc_2, z_ptr_2,
            z_shared_ptr_2, dz_ptr_2, dz_shared_ptr_2, h_ptr_2, h_shared_ptr_2, partial_ptr_2, T_2,
            stride_dt_2, stride_wk_2, stride_ps_2, N, K, S, E, top_k, scale, shared_h_width, ACT,
            PRECISION, GATED, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_E, GROUP_M, PARTS,
        )  # fmt: skip


@dataclass
class Activations:
    """One stream's tensors of the launch; without z_shared the shared expert takes no part."""

    dy: torch.Tensor  # [T, D]
    w2: Weights
    weights_TK: torch.Tensor
    offsets: torch.Tensor
    order_N: torch.Tensor
    z_shared: torch.Tensor | None
    z_routed: torch.Tensor
    dz_shared: torch.Tensor | None
    dz_routed: torch.Tensor | None
    h_shared: torch.Tensor | None
    h_routed: torch.Tensor | None
    partial: torch.Tensor | None  # [N, column tiles] fp32

    def arguments(self, config, widest: int, D: int) -> dict:
        partial = self.partial
        return dict(
            dy_ptr=self.dy, order_ptr=self.order_N, offsets_ptr=self.offsets,
            weights_ptr=self.weights_TK, w_ptr=self.w2.matrix,
            w_desc=self.w2.describe(config, widest, D, True), z_ptr=self.z_routed,
            z_shared_ptr=self.z_shared, dz_ptr=self.dz_routed, dz_shared_ptr=self.dz_shared,
            h_ptr=self.h_routed, h_shared_ptr=self.h_shared, partial_ptr=partial,
            T=self.dy.shape[0], stride_dt=self.dy.stride(0), stride_wk=self.w2.stride,
            stride_ps=0 if partial is None else partial.stride(0),
        )  # fmt: skip


def activations(
    streams: list[Activations], *, shared, shared_h_width, H, activation, gated, scale
) -> None:
    """Launches the kernel for one or two streams."""
    if not streams:
        return
    large = max(streams, key=lambda s: s.dy.shape[0])  # its sizes choose the tile
    (T, D), E = large.dy.shape, large.offsets.shape[0] - 1

    def arguments(config):
        return numbered([s.arguments(config, max(shared, H), D) for s in streams]) | dict(
            N=H, K=D, S=shared, E=E, top_k=max(large.weights_TK.shape[1], 1), scale=float(scale),
            shared_h_width=shared_h_width, ACT=pointwise_name(activation),
            PRECISION=precision(large.dy.dtype), GATED=gated,
            EVEN_N=even(H, config.block_n) and even(shared, config.block_n),
            EVEN_K=even(D, config.block_k), BLOCK_E=power_of_two(E + 1),
            PARTS=config.parts(16 if gated else 32),
        )  # fmt: skip

    routed = (large.order_N.shape[0] / E, H)
    rows, width = (T, shared) if large.z_shared is not None else routed
    config = configs.select("act_bwd", large.dy, rows, width, (H, D, shared))
    launch(_down_bwd_kernel, "act_bwd", config, large.dy.device, arguments)
