"""First launch of the backward: dA' = dy W2, and in its epilogue dz, the weighted h and dweight.

Shapes: T tokens, D model, S shared neurons, H neurons of an expert, E experts, K top-k, N = T*K
slots. h = act(z) is recomputed and y2 is never wanted: dweight = scale * rowsum((dy W2_e) * h).
Two streams, each with weights and a routing of its own, go in one launch.
"""

import triton
import triton.language as tl

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.launch import launch, numbered, power_of_two, product
from d2m_kernels.backends.triton.operands import Left, Right, Saved, neuron_columns
from d2m_kernels.backends.triton.pieces import (  # fmt: skip
    _act,
    _act_grad,
    _corner_of,
    _group_of,
    _matmul,
    _next_tile,
    _parts,
    _rounded,
    _row_tiles,
)


@triton.jit
def _differentiate(acc, z_ptr, dz_ptr, h_ptr, factor, r, end, n0, width, h_width,
                   WIDTH: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Columns n0 .. n0 + WIDTH of dz = factor * dA' * act'(z) and factor * h; returns row sums."""
    ACT: tl.constexpr = P.ACT
    offs_n = n0 + tl.arange(0, WIDTH)
    mask = (r < end)[:, None] & (offs_n < width)[None, :]
    r_long = r.to(tl.int64)
    weighted = acc * factor[:, None]
    if P.GATED:
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
        h_mask = (r < end)[:, None] & (offs_n < h_width)[None, :]
        h_ptrs = h_ptr + (r_long * width)[:, None] + offs_n[None, :]
        tl.store(h_ptrs, _rounded(h * factor[:, None], h_ptr.dtype.element_ty), mask=h_mask)
    return tl.sum(tl.where(mask, acc * h, 0.0), axis=1)


@triton.jit
def _down_bwd_tiles(tile, first, s, w_desc, T, N, K, S, E, corners, top_k, scale, shared_h_width,
                    ticket_ptr, BLOCK_E: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """This program's tiles, from `tile` on, of a stream whose first has the number `first`.

    Returns the program's next tile and the number after the stream's last.
    """
    BLOCK_M: tl.constexpr = P.M
    BLOCK_N: tl.constexpr = P.N
    PARTS: tl.constexpr = P.PARTS
    SHARED: tl.constexpr = s.z_shared is not None
    spans = _row_tiles(s.offsets, T, 0, N, S, E, SHARED, BLOCK_E, P, False)
    last = first + spans.total
    while tile < last:
        g = _group_of(tile - first, spans, T, N, S, corners, SHARED)
        r0, n0 = _corner_of(g, P, False)
        r = r0 + tl.arange(0, BLOCK_M)
        source = tl.minimum(r, g.end - 1)
        gathered = source < tl.where(g.routed, g.end, 0)
        slot = tl.load(s.order + source, mask=gathered, other=0)
        weight = tl.load(s.weights + slot, mask=gathered, other=1.0)
        factor = tl.where(gathered, scale * weight, 1.0)
        source = tl.where(gathered, slot // top_k, source)

        dy = Left(s.dy, s.stride_dt, None, source, 0)
        w = Right(s.w, s.stride_wn, w_desc, g.row, g.col, n0, g.width)
        acc = _matmul(tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), dy, 0, w, K, K, P)
        tile = _next_tile(tile, ticket_ptr)

        z = s.z
        dz = s.dz
        h = s.h
        if SHARED:
            z = tl.where(g.routed, s.z, s.z_shared)
            if s.dz is not None:
                dz = tl.where(g.routed, s.dz, s.dz_shared)
            if s.h_shared is not None:  # else the shared neurons are frozen: no h of theirs
                h = tl.where(g.routed, s.h, s.h_shared)
        h_width = tl.where(g.routed, N, shared_h_width)
        pieces = _parts(acc, PARTS)
        sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for i in tl.static_range(PARTS):
            sums += _differentiate(pieces[i], z, dz, h, factor, r, g.end,
                                   n0 + i * (BLOCK_N // PARTS), g.width, h_width,
                                   BLOCK_N // PARTS, P)  # fmt: skip
        if s.partial is not None:
            ptrs = s.partial + slot.to(tl.int64) * s.stride_ps + n0 // BLOCK_N
            tl.store(ptrs, scale * sums, mask=r < tl.where(g.routed, g.end, 0))
    return tile, last


@triton.jit(do_not_specialize=["T", "T_2"])
def _down_bwd_kernel(
    s, T, w_desc, s_2, T_2, w_desc_2, N, K, S, E, corners, top_k, scale, shared_h_width,
    ticket_ptr, PAIR: tl.constexpr, BLOCK_E: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dA' = dy[token] W2_e; stores dz, factor * h and dweight's partial sums, one a column tile.

    factor = scale * weight for a routed row, 1 for the shared expert's (z_shared given, T rows).
    A PAIR's second stream continues the list of tiles where the first one ends.
    """
    tile, last = _down_bwd_tiles(tl.program_id(0), 0, s, w_desc, T, N, K, S, E, corners, top_k,
                                 scale, shared_h_width, ticket_ptr, BLOCK_E, P)  # fmt: skip
    if PAIR:
        _down_bwd_tiles(tile, last, s_2, w_desc_2, T_2, N, K, S, E, corners, top_k, scale,
                        shared_h_width, ticket_ptr, BLOCK_E, P)  # fmt: skip


def activations(
    streams: list[Saved], ticket, *, shared, shared_h_width, H, activation, gated, scale
):
    """Launches the kernel for one or two streams; no z_shared: the shared expert takes no part."""
    if not streams:
        return
    large = max(streams, key=lambda s: s.dy.shape[0])  # its sizes choose the tile
    (T, D), E = large.dy.shape, large.offsets.shape[0] - 1

    def one(s, config):
        w_desc = neuron_columns(s.w, shared, H).describe(config, D, True)
        return dict(s=s, T=s.dy.shape[0], w_desc=w_desc)

    def arguments(config):
        return numbered([one(s, config) for s in streams]) | dict(
            N=H, K=D, S=shared, E=E, corners=neuron_columns(large.w, shared, H).corners,
            scale=float(scale), top_k=max(large.weights.shape[1], 1),
            shared_h_width=shared_h_width, BLOCK_E=power_of_two(E + 2),
            P=product(config, large.dy, (H, shared), D, 16 if gated else 32, True,
                      activation, gated),
        )  # fmt: skip

    routed = (large.order.shape[0] / E, H)
    rows, width = (T, shared) if large.z_shared is not None else routed
    config = configs.select("act_bwd", large.dy, rows, width, (H, D, shared))
    launch(_down_bwd_kernel, "act_bwd", config, large.dy.device, arguments, ticket)
