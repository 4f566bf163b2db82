"""Weight gradients: products that sum over the rows of a group, whatever their number.

Shapes: T tokens, D model, S shared neurons, H neurons of an expert, E experts, K top-k, N = T*K.
The left operand (dz, or the weighted h) lies in expert order; the right one (x, or dy) is gathered
by token along the sum. An expert without tokens sums nothing and is stored as zero.
"""

import triton
import triton.language as tl

from d2m_kernels.triton_ import configs
from d2m_kernels.triton_.common import _dot, _parts, _rounded, even, precision
from d2m_kernels.triton_.launch import launch


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


@triton.jit(do_not_specialize=["T"])
def _weight_bwd_kernel(
    left_ptr, left_shared_ptr, right_ptr, order_ptr, offsets_ptr, out_ptr,
    T, D, S, H, E, frozen, half, top_k, stride_lr, stride_ls, stride_rt, stride_on, stride_od,
    PRECISION: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[neuron] = sum over its group's rows r of left[r, neuron] * right[token(r)]."""
    tiles_d = tl.cdiv(D, BLOCK_N)
    shared_tiles = 0
    if left_shared_ptr is not None:
        shared_tiles = tl.cdiv(tl.maximum(S - frozen, 0), BLOCK_M) * tiles_d
    expert_tiles = tl.cdiv(H, BLOCK_M) * tiles_d
    total = shared_tiles + E * expert_tiles
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
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


def weight_grad(
    out_FD, left_shared, left_routed, right, offsets, order_N, *, shared, H, frozen, top_k, half
):
    """Fills out [F, D] (any strides): the shared neurons' gradient, then each expert's."""
    D, E = out_FD.shape[1], offsets.shape[0] - 1
    if left_shared is None or frozen:
        out_FD[: shared if left_shared is None else min(frozen, shared)] = 0
    if D == 0 or (left_shared is None and H == 0):
        return

    def arguments(config):
        return dict(
            left_ptr=left_routed, left_shared_ptr=left_shared, right_ptr=right, order_ptr=order_N,
            offsets_ptr=offsets, out_ptr=out_FD, T=right.shape[0], D=D, S=shared, H=H, E=E,
            frozen=frozen, half=half, top_k=max(top_k, 1), stride_lr=left_routed.stride(0),
            stride_ls=0 if left_shared is None else left_shared.stride(0),
            stride_rt=right.stride(0), stride_on=out_FD.stride(0), stride_od=out_FD.stride(1),
            PRECISION=precision(right.dtype), EVEN_D=even(D, config.block_n),
            PARTS=config.parts(64),
        )  # fmt: skip

    config = configs.select("wgrad", right, shared if left_shared is not None else H, D)
    launch(_weight_bwd_kernel, "wgrad", config, right.device, arguments)


def bias_grad(out_F, left_shared, left_routed, offsets, *, shared, H, frozen, half, top_k):
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
