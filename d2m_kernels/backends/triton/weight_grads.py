"""Weight gradients: products that sum over the rows of a group, whatever their number.

Shapes: T tokens, D model, S shared neurons, H neurons of an expert, E experts, K top-k, N = T*K.
The left operand (dz, or the weighted h) lies in expert order; the right one (x, or dy) is gathered
by token along the sum. An expert without tokens sums nothing and is stored as zero.
Two streams, each with gradients of its own, go in one launch.
"""

import triton
import triton.language as tl

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.launch import launch, numbered, power_of_two, product
from d2m_kernels.backends.triton.operands import Corners, Spans, Sums, rows_of
from d2m_kernels.backends.triton.pieces import (  # fmt: skip
    _dot,
    _expert_rows,
    _group_of,
    _next_tile,
    _parts,
    _rounded,
)


@triton.jit
def _neuron_tiles(offsets_ptr, H, E, across, shared, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Spans of groups tiled by their neurons: H of an expert, `across` tiles in a row of them."""
    e, first, _ = _expert_rows(offsets_ptr, 0, E, BLOCK_E)
    tiles = tl.where(e < E, tl.cdiv(H, BLOCK) * across, 0)
    stop = tl.cumsum(tiles, 0)
    total = shared + tl.sum(tiles, 0)
    return Spans(shared, first, stop, total, 0, stop, total)


@triton.jit
def _store_grad(acc, s, neuron, d0, last, D, frozen, WIDTH: tl.constexpr):
    offs_d = d0 + tl.arange(0, WIDTH)
    mask = (neuron < last)[:, None] & (offs_d < D)[None, :]
    rows = s.out + neuron.to(tl.int64)[:, None] * s.stride_on
    acc = tl.where((neuron < frozen)[:, None], 0.0, acc)
    ptrs = rows + offs_d.to(tl.int64)[None, :] * s.stride_od
    tl.store(ptrs, _rounded(acc, s.out.dtype.element_ty), mask=mask)


@triton.jit
def _weight_bwd_tiles(tile, first, s, T, D, S, H, E, frozen, half, top_k, ticket_ptr,
                      BLOCK_E: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """This program's tiles, from `tile` on, of a stream whose first has the number `first`.

    Returns the program's next tile and the number after the stream's last.
    """
    BLOCK_M: tl.constexpr = P.M
    BLOCK_N: tl.constexpr = P.N
    BLOCK_K: tl.constexpr = P.K
    PARTS: tl.constexpr = P.PARTS
    SHARED: tl.constexpr = s.left_shared is not None
    tiles_d = tl.cdiv(D, BLOCK_N)
    shared = 0
    if SHARED:  # neurons before `frozen` are not even computed
        shared = tl.cdiv(tl.maximum(S - frozen, 0), BLOCK_M) * tiles_d
    spans = _neuron_tiles(s.offsets, H, E, tiles_d, shared, BLOCK_M, BLOCK_E)
    last = first + spans.total
    while tile < last:
        g = _group_of(tile - first, spans, T, H, S, Corners(S, 0, H, 0, 0, 0), SHARED)
        d0 = (g.local % tiles_d) * BLOCK_N
        skip = tl.where(g.routed, 0, frozen)
        offs_m = skip + g.local // tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_d = d0 + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        m_ok = offs_m < g.width
        left = s.left
        stride_l = s.stride_lr
        if SHARED:
            left = tl.where(g.routed, left, s.left_shared)
            stride_l = tl.where(g.routed, stride_l, s.stride_ls)
        column = half * g.width + offs_m
        # The tokens of the next step are fetched a step ahead: a load that waits for another load
        # would not be pipelined as deep as the rest.
        gathered = tl.where(g.routed, g.end, 0)
        slot = tl.load(s.order + g.first + offs_k, mask=g.first + offs_k < gathered, other=0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(g.first, g.end, BLOCK_K):
            k = k0 + offs_k
            k_ok = k < g.end
            token = tl.where(g.routed, slot // top_k, k)
            ahead = k + BLOCK_K
            slot = tl.load(s.order + ahead, mask=ahead < gathered, other=0)
            ptrs = left + (k.to(tl.int64) * stride_l)[:, None] + column[None, :]
            a = tl.load(ptrs, mask=k_ok[:, None] & m_ok[None, :], other=0.0)
            ptrs = s.right + (token.to(tl.int64) * s.stride_rt)[:, None] + offs_d[None, :]
            if P.EVEN_N:
                b = tl.load(ptrs, mask=k_ok[:, None], other=0.0)
            else:
                b = tl.load(ptrs, mask=k_ok[:, None] & (offs_d < D)[None, :], other=0.0)
            acc = _dot(tl.trans(a), b, acc, True, P)
        tile = _next_tile(tile, ticket_ptr)
        pieces = _parts(acc, PARTS)
        for i in tl.static_range(PARTS):
            _store_grad(pieces[i], s, g.row + offs_m, d0 + i * (BLOCK_N // PARTS),
                        g.row + g.width, D, frozen, BLOCK_N // PARTS)  # fmt: skip
    return tile, last


@triton.jit(do_not_specialize=["T", "T_2"])
def _weight_bwd_kernel(
    s, T, s_2, T_2, D, S, H, E, frozen, half, top_k, ticket_ptr, PAIR: tl.constexpr,
    BLOCK_E: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out[neuron] = sum over its group's rows r of left[r, neuron] * right[token(r)].

    A PAIR's second stream continues the list of tiles where the first one ends.
    """
    tile, last = _weight_bwd_tiles(tl.program_id(0), 0, s, T, D, S, H, E, frozen, half, top_k,
                                   ticket_ptr, BLOCK_E, P)  # fmt: skip
    if PAIR:
        _weight_bwd_tiles(tile, last, s_2, T_2, D, S, H, E, frozen, half, top_k, ticket_ptr,
                          BLOCK_E, P)  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _bias_bwd_kernel(
    left_ptr, stride_lr, left_shared_ptr, stride_ls, offsets_ptr, out_ptr, T, S, H, E, frozen, half,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[neuron] = sum over its group's rows of left[r, neuron]."""
    SHARED: tl.constexpr = left_shared_ptr is not None
    shared = 0
    if SHARED:
        shared = tl.cdiv(S, BLOCK_C)
    spans = _neuron_tiles(offsets_ptr, H, E, 1, shared, BLOCK_C, BLOCK_E)
    g = _group_of(tl.program_id(0), spans, T, H, S, Corners(S, 0, H, 0, 0, 0), SHARED)
    offs_c = g.local * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = offs_c < g.width
    last = g.row + tl.minimum((g.local + 1) * BLOCK_C, g.width)
    end = tl.where(last <= frozen, g.first, g.end)  # frozen neurons: nothing to read
    left = left_ptr
    stride_l = stride_lr
    if SHARED:
        left = tl.where(g.routed, left_ptr, left_shared_ptr)
        stride_l = tl.where(g.routed, stride_lr, stride_ls)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for r0 in tl.range(g.first, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        ptrs = left + (r.to(tl.int64) * stride_l)[:, None] + (half * g.width + offs_c)[None, :]
        acc += tl.load(ptrs, mask=(r < end)[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
    neuron = g.row + offs_c
    total = tl.where(neuron < frozen, 0.0, tl.sum(acc, axis=0))
    tl.store(out_ptr + neuron, _rounded(total, out_ptr.dtype.element_ty), mask=c_ok)


def sums(out_FD, left_shared, left_routed, right, offsets, order_N) -> Sums:
    """One stream's operands of `weight_grad`."""
    lefts = (*rows_of(left_routed), *rows_of(left_shared))
    return Sums(*lefts, *rows_of(right), order_N, offsets, out_FD, *out_FD.stride())


def weight_grad(streams: list[Sums], ticket, *, shared, H, frozen, top_k, half):
    """Fills each stream's out: the shared neurons' gradient, then each expert's."""
    for s in streams:
        absent = s.left_shared is None
        if absent or frozen:
            s.out[: shared if absent else min(frozen, shared)] = 0
    streams = [s for s in streams if s.out.shape[1] and (s.left_shared is not None or H)]
    if not streams:
        return
    first, x = streams[0], streams[0].right
    D, E = first.out.shape[1], first.offsets.shape[0] - 1

    def arguments(config):
        return numbered([dict(s=s, T=s.right.shape[0]) for s in streams]) | dict(
            D=D, S=shared, H=H, E=E, frozen=frozen, half=half, top_k=max(top_k, 1),
            BLOCK_E=power_of_two(E + 2), P=product(config, x, (D,), 0, 64),
        )  # fmt: skip

    rows = H if first.left_shared is None else shared
    config = configs.select("wgrad", x, rows, D, (D, H, shared))
    launch(_weight_bwd_kernel, "wgrad", config, x.device, arguments, ticket)


def bias_grad(out_F, left_shared, left_routed, offsets, *, shared, H, frozen, half):
    """Fills out [F] with the column sums of each group's rows."""
    E = offsets.shape[0] - 1
    if left_shared is None:
        out_F[:shared] = 0
    BLOCK_C = 32  # 64 bytes a row; wider tiles would leave most multiprocessors without work
    T = 0 if left_shared is None else left_shared.shape[0]
    tiles = E * triton.cdiv(H, BLOCK_C)
    tiles += 0 if left_shared is None else triton.cdiv(shared, BLOCK_C)
    if tiles:
        _bias_bwd_kernel[(tiles,)](
            *rows_of(left_routed), *rows_of(left_shared), offsets, out_F, T, shared, H, E, frozen,
            half, BLOCK_E=power_of_two(E + 2), BLOCK_R=128, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
