"""Weight gradients: products that sum over the rows of a group, whatever their number.

Shapes: T tokens, D model, S shared neurons, H neurons of an expert, E experts, K top-k, N = T*K.
The left operand (dz, or the weighted h) lies in expert order; the right one (x, or dy) is gathered
by token along the sum. An expert without tokens sums nothing and is stored as zero.
Two streams, each with gradients of its own, go in one launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from d2m_kernels.backends.triton import configs
from d2m_kernels.backends.triton.launch import launch, numbered
from d2m_kernels.backends.triton.pieces import _dot, _next_start, _parts, _rounded, even, precision


@triton.jit
def _group_of(tile, offsets_ptr, T, S, H, frozen, shared_tiles, expert_tiles, half):
    """(tile within its group, first row, end row, first neuron, end neuron, width, column)."""
    routed = tile >= shared_tiles
    expert = tl.maximum(tile - shared_tiles, 0) // expert_tiles
    local = tl.where(routed, tl.maximum(tile - shared_tiles, 0) % expert_tiles, tile)
    lo = tl.where(routed, tl.load(offsets_ptr + expert), 0)
    hi = tl.where(routed, tl.load(offsets_ptr + expert + 1), T)
    first = tl.where(routed, S + expert * H, 0)
    width = tl.where(routed, H, S)
    skip = tl.where(routed, 0, frozen)  # shared neurons before this one are not even computed
    return routed, local, lo, hi, first, width, skip


@triton.jit
def _store_grad(acc, out_ptr, neuron, d0, last, D, frozen, stride_on, stride_od,
                WIDTH: tl.constexpr):  # fmt: skip
    offs_d = d0 + tl.arange(0, WIDTH)
    mask = (neuron < last)[:, None] & (offs_d < D)[None, :]
    ptrs = out_ptr + neuron.to(tl.int64)[:, None] * stride_on + (
        offs_d.to(tl.int64)[None, :] * stride_od
    )  # fmt: skip
    acc = tl.where((neuron < frozen)[:, None], 0.0, acc)
    tl.store(ptrs, _rounded(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_bwd_tiles(
    start, left_ptr, left_shared_ptr, right_ptr, order_ptr, offsets_ptr, out_ptr, T, stride_lr,
    stride_ls, stride_rt, stride_on, stride_od, D, S, H, E, frozen, half, top_k,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """This program's tiles of one stream, from tile `start` on; returns the next stream's start."""
    tiles_d = tl.cdiv(D, BLOCK_N)
    shared_tiles = 0
    if left_shared_ptr is not None:
        shared_tiles = tl.cdiv(tl.maximum(S - frozen, 0), BLOCK_M) * tiles_d
    expert_tiles = tl.cdiv(H, BLOCK_M) * tiles_d
    total = shared_tiles + E * expert_tiles
    for tile in tl.range(start, total, tl.num_programs(0)):
        routed, local, lo, hi, first, width, skip = _group_of(
            tile, offsets_ptr, T, S, H, frozen, shared_tiles, tl.maximum(expert_tiles, 1), half
        )
        m = local // tiles_d
        d0 = (local % tiles_d) * BLOCK_N
        offs_m = skip + m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_d = d0 + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        m_ok = offs_m < width
        left = left_ptr
        stride_l = stride_lr
        if left_shared_ptr is not None:
            left = tl.where(routed, left_ptr, left_shared_ptr)
            stride_l = tl.where(routed, stride_lr, stride_ls)
        column = half * width + offs_m
        # The tokens of the next step are fetched a step ahead: a load that waits for another load
        # would not be pipelined as deep as the rest.
        gathered = tl.where(routed, hi, 0)
        slot = tl.load(order_ptr + lo + offs_k, mask=lo + offs_k < gathered, other=0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(lo, hi, BLOCK_K):
            k = k0 + offs_k
            k_ok = k < hi
            token = tl.where(routed, slot // top_k, k)
            ahead = k + BLOCK_K
            slot = tl.load(order_ptr + ahead, mask=ahead < gathered, other=0)
            ptrs = left + (k.to(tl.int64) * stride_l)[:, None] + column[None, :]
            a = tl.load(ptrs, mask=k_ok[:, None] & m_ok[None, :], other=0.0)
            ptrs = right_ptr + (token.to(tl.int64) * stride_rt)[:, None] + offs_d[None, :]
            if EVEN_D:
                b = tl.load(ptrs, mask=k_ok[:, None], other=0.0)
            else:
                b = tl.load(ptrs, mask=k_ok[:, None] & (offs_d < D)[None, :], other=0.0)
            acc = _dot(tl.trans(a), b, acc, PRECISION)
        neuron = first + offs_m
        last = first + width
        pieces = _parts(acc, PARTS)
        for i in tl.static_range(PARTS):
            _store_grad(pieces[i], out_ptr, neuron, d0 + i * (BLOCK_N // PARTS), last, D, frozen,
                        stride_on, stride_od, BLOCK_N // PARTS)  # fmt: skip
    return _next_start(start, total)


@triton.jit(do_not_specialize=["T", "T_2"])
def _weight_bwd_kernel(
    left_ptr, left_shared_ptr, right_ptr, order_ptr, offsets_ptr, out_ptr, T, stride_lr, stride_ls,
    stride_rt, stride_on, stride_od,
    left_ptr_2, left_shared_ptr_2, right_ptr_2, order_ptr_2, offsets_ptr_2, out_ptr_2, T_2,
    stride_lr_2, stride_ls_2, stride_rt_2, stride_on_2, stride_od_2,
    D, S, H, E, frozen, half, top_k,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[neuron] = sum over its group's rows r of left[r, neuron] * right[token(r)].

    A second stream (left_ptr_2 given) continues the list of tiles where the first one ends.
    """
    start = _weight_bwd_tiles(
        tl.program_id(0), left_ptr, left_shared_ptr, right_ptr, order_ptr, offsets_ptr, out_ptr, T,
        stride_lr, stride_ls, stride_rt, stride_on, stride_od, D, S, H, E, frozen, half, top_k,
        PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PARTS,
    )  # fmt: skip
    if left_ptr_2 is not None:
        _weight_bwd_tiles(
            start, left_ptr_2, left_shared_ptr_2, right_ptr_2, order_ptr_2, offsets_ptr_2,
            out_ptr_2, T_2, stride_lr_2, stride_ls_2, stride_rt_2, stride_on_2, stride_od_2, D, S,
            H, E, frozen, half, top_k, PRECISION, EVEN_D, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _bias_bwd_kernel(
    left_ptr, left_shared_ptr, offsets_ptr, out_ptr, T, S, H, frozen, half, stride_lr, stride_ls,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[neuron] = sum over its group's rows of left[r, neuron]."""
    shared_tiles = 0
    if left_shared_ptr is not None:
        shared_tiles = tl.cdiv(S, BLOCK_C)
    expert_tiles = tl.maximum(tl.cdiv(H, BLOCK_C), 1)
    routed, local, lo, hi, first, width, skip = _group_of(
        tl.program_id(0), offsets_ptr, T, S, H, 0, shared_tiles, expert_tiles, half
    )
    offs_c = local * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = offs_c < width
    end = first + tl.minimum((local + 1) * BLOCK_C, width)
    hi = tl.where(end <= frozen, lo, hi)  # frozen neurons: nothing to read
    left = left_ptr
    stride_l = stride_lr
    if left_shared_ptr is not None:
        left = tl.where(routed, left_ptr, left_shared_ptr)
        stride_l = tl.where(routed, stride_lr, stride_ls)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for r0 in tl.range(lo, hi, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        ptrs = left + (r.to(tl.int64) * stride_l)[:, None] + (half * width + offs_c)[None, :]
        acc += tl.load(ptrs, mask=(r < hi)[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
    neuron = first + offs_c
    total = tl.where(neuron < frozen, 0.0, tl.sum(acc, axis=0))
    tl.store(out_ptr + neuron, _rounded(total, out_ptr.dtype.element_ty), mask=c_ok)


@dataclass
class Sums:
    """One stream's tensors of a launch: out [F, D] (any strides) = left^T right, group by group."""

    out: torch.Tensor
    left_shared: torch.Tensor | None
    left_routed: torch.Tensor
    right: torch.Tensor
    offsets: torch.Tensor
    order_N: torch.Tensor

    def arguments(self) -> dict:
        left_shared = self.left_shared
        return dict(
            left_ptr=self.left_routed, left_shared_ptr=left_shared, right_ptr=self.right,
            order_ptr=self.order_N, offsets_ptr=self.offsets, out_ptr=self.out,
            T=self.right.shape[0], stride_lr=self.left_routed.stride(0),
            stride_ls=0 if left_shared is None else left_shared.stride(0),
            stride_rt=self.right.stride(0), stride_on=self.out.stride(0),
            stride_od=self.out.stride(1),
        )  # fmt: skip


def weight_grad(streams: list[Sums], *, shared, H, frozen, top_k, half):
    """Fills each stream's out: the shared neurons' gradient, then each expert's."""
    for s in streams:
        if s.left_shared is None or frozen:
            s.out[: shared if s.left_shared is None else min(frozen, shared)] = 0
    streams = [s for s in streams if s.out.shape[1] and (s.left_shared is not None or H)]
    if not streams:
        return
    first = streams[0]
    D, E = first.out.shape[1], first.offsets.shape[0] - 1

    def arguments(config):
        return numbered([s.arguments() for s in streams]) | dict(
            D=D, S=shared, H=H, E=E, frozen=frozen, half=half, top_k=max(top_k, 1),
            PRECISION=precision(first.right.dtype), EVEN_D=even(D, config.block_n),
            PARTS=config.parts(64),
        )  # fmt: skip

    rows = H if first.left_shared is None else shared
    config = configs.select("wgrad", first.right, rows, D, (D, H, shared))
    launch(_weight_bwd_kernel, "wgrad", config, first.right.device, arguments)


def bias_grad(out_F, left_shared, left_routed, offsets, *, shared, H, frozen, half):
    """Fills out [F] with the column sums of each group's rows."""
    E = offsets.shape[0] - 1
    if left_shared is None:
        out_F[:shared] = 0
    BLOCK_C = 32  # 64 bytes a row; wider tiles would leave most multiprocessors without work
    tiles = E * triton.cdiv(H, BLOCK_C)
    tiles += 0 if left_shared is None else triton.cdiv(shared, BLOCK_C)
    if tiles:
        _bias_bwd_kernel[(tiles,)](
            left_routed, left_shared, offsets, out_F,
            left_routed.shape[0] if left_shared is None else left_shared.shape[0], shared, H,
            frozen, half, left_routed.stride(0),
            0 if left_shared is None else left_shared.stride(0), BLOCK_R=128, BLOCK_C=BLOCK_C,
            num_warps=4,
        )  # fmt: skip
