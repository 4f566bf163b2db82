"""Route and permute: one pass over x, then a stable counting sort without atomics.

Shapes: B samples, T tokens, D model, E experts, K top-k, N = T*K slots (slot t*K + j); a block is
BLOCK_T tokens in `route`, BLOCK_S slots in `permute`. Two launches for `route` (the first counts
as well), two for `permute` alone. A slot's place is: offsets[e] + what earlier blocks hold of e +
its rank inside its block, so neither scheduling nor atomics can change the order.
"""

import torch
import triton
import triton.language as tl

from d2m_kernels.backends.triton.launch import power_of_two
from d2m_kernels.backends.triton.pieces import INTERPRET, _rounded, even


@triton.jit
def _load_columns(ptrs, k0, offs_k, D, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(ptrs + k0)
    return tl.load(ptrs + k0, mask=(offs_k < D - k0)[None, :], other=0.0)


@triton.jit
def _statistics(x_ptrs, offs_k, D, eps, EVEN_K: tl.constexpr, BLOCK_T: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of each row, in one pass over it.

    Welford's update on BLOCK_K columns apart from each other, put together once at the end: no sum
    of squares that a large mean would cancel, and no reduction across threads on the way.
    """
    means = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    count = 0.0
    for k0 in tl.range(0, D, BLOCK_K):
        x = _load_columns(x_ptrs, k0, offs_k, D, EVEN_K).to(tl.float32)
        count += 1.0
        delta = x - means
        if not EVEN_K:
            delta = tl.where((offs_k < D - k0)[None, :], delta, 0.0)
        means += delta * (1.0 / count)
        squares += delta * (x - means)  # where delta is zeroed, so is this
    counts = (tl.maximum(D - offs_k + BLOCK_K - 1, 0) // BLOCK_K).to(tl.float32)
    mean = tl.sum(means * counts[None, :], axis=1) / D
    apart = means - mean[:, None]
    total = tl.sum(squares + apart * apart * counts[None, :], axis=1)
    return mean, tl.rsqrt(total / D + eps)


@triton.jit(do_not_specialize=["T", "tokens_per_sample"])
def _route_fwd_kernel(
    x_ptr, router_ptr, mask_ptr, scale_ptr, shift_ptr, modulated_ptr,
    probs_ptr, weights_ptr, ids_ptr, counts_ptr,
    T, D, E, stride_xt, stride_re, stride_sb, stride_hb, tokens_per_sample, eps,
    TOP_K: tl.constexpr, EVEN_K: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits, softmax, the top K and its softmax, and how many slots of this block each expert got.

    counts[block, e]; column E counts the slots of masked tokens. With a scale, x is first
    normalised and modulated; that is what is routed, and stored in modulated_ptr. Its rows are
    read twice, the second time out of L2: 32 rows of 6 KB on 132 SMs are half of it.
    """
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    t_ok = t < T
    e_ok = e < E
    x_ptrs = x_ptr + (tl.minimum(t, T - 1).to(tl.int64) * stride_xt)[:, None] + offs_k[None, :]
    r_ptrs = router_ptr + (e.to(tl.int64) * stride_re)[None, :] + offs_k[:, None]
    if scale_ptr is not None:
        mean, rstd = _statistics(x_ptrs, offs_k, D, eps, EVEN_K, BLOCK_T, BLOCK_K)
        sample = tl.minimum(t, T - 1).to(tl.int64) // tokens_per_sample
        scale_ptrs = scale_ptr + (sample * stride_sb)[:, None] + offs_k[None, :]
        shift_ptrs = shift_ptr + (sample * stride_hb)[:, None] + offs_k[None, :]
        out_ptrs = modulated_ptr + (t.to(tl.int64) * D)[:, None] + offs_k[None, :]
    logits = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for k0 in tl.range(0, D, BLOCK_K):
        x = _load_columns(x_ptrs, k0, offs_k, D, EVEN_K)
        if EVEN_K:
            w = tl.load(r_ptrs + k0, mask=e_ok[None, :], other=0.0)
        else:
            w = tl.load(r_ptrs + k0, mask=e_ok[None, :] & (offs_k < D - k0)[:, None], other=0.0)
        if scale_ptr is not None:
            factor = _load_columns(scale_ptrs, k0, offs_k, D, EVEN_K).to(tl.float32) + 1.0
            shift = _load_columns(shift_ptrs, k0, offs_k, D, EVEN_K).to(tl.float32)
            normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            x = _rounded(normed * factor + shift, x.dtype)
            k_ok = (offs_k < D - k0)[None, :]
            tl.store(out_ptrs + k0, x, mask=t_ok[:, None] & k_ok)
            if not EVEN_K:
                x = tl.where(k_ok, x, 0.0)
        if INTERPRET:
            logits = tl.dot(x.to(tl.float32), w.to(tl.float32), logits, input_precision="ieee")
        elif SAME:  # products of two 16-bit numbers are exact in fp32
            logits = tl.dot(x, w, logits, input_precision=PRECISION)
        else:
            # A 16-bit x is exact in TF32, an fp32 router is not: three TF32 products give 22 bits.
            logits = tl.dot(x.to(tl.float32), w.to(tl.float32), logits, input_precision=PRECISION)

    live = t_ok
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + t, mask=t_ok, other=0) != 0)
    padded = tl.where(e_ok[None, :], logits, float("-inf"))

    # -- softmax over all experts
    top = tl.max(padded, axis=1)
    ex = tl.where(e_ok[None, :], tl.exp(padded - top[:, None]), 0.0)
    probs = ex / tl.sum(ex, axis=1)[:, None]
    probs = tl.where(live[:, None], probs, 0.0)
    probs_ptrs = probs_ptr + (t.to(tl.int64) * E)[:, None] + e[None, :]
    tl.store(probs_ptrs, probs, mask=t_ok[:, None] & e_ok[None, :])

    # -- the K largest: floats as integers of the same order, NaN below all of them
    clean = tl.where(logits == 0.0, 0.0, logits)  # -0 and +0 tie
    bits = clean.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(logits != logits, -2147483647, key)
    key = tl.where(e_ok[None, :], key, -2147483648)
    rank = tl.full((BLOCK_T, BLOCK_E), TOP_K, dtype=tl.int32)
    for j in range(TOP_K):
        best = tl.argmax(key, axis=1, tie_break_left=True)
        chosen = e[None, :] == best[:, None]
        rank = tl.where(chosen, j, rank)
        key = tl.where(chosen, -2147483648, key)
    picked = rank < TOP_K
    weights = tl.where(picked, logits, float("-inf"))
    top = tl.max(weights, axis=1)
    ex = tl.where(picked, tl.exp(weights - top[:, None]), 0.0)
    weights = ex / tl.sum(ex, axis=1)[:, None]
    weights = tl.where(live[:, None], weights, 0.0)
    slot = (t * TOP_K)[:, None] + rank
    store = picked & t_ok[:, None]
    tl.store(weights_ptr + slot, weights, mask=store)
    ids = tl.where(live[:, None], tl.broadcast_to(e[None, :], (BLOCK_T, BLOCK_E)), -1)
    tl.store(ids_ptr + slot, ids, mask=store)

    # -- counts of this block
    counts = tl.sum((picked & live[:, None]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * (E + 1) + e, counts, mask=e_ok)
    masked = tl.sum(t_ok.to(tl.int32), axis=0) - tl.sum(live.to(tl.int32), axis=0)
    tl.store(counts_ptr + block * (E + 1) + E, masked * TOP_K)


@triton.jit(do_not_specialize=["N"])
def _count_fwd_kernel(ids_ptr, counts_ptr, N, E, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
                      CHUNK: tl.constexpr):  # fmt: skip
    """counts[block, e] = slots of this block with id e; column E: with a negative id."""
    block = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for c in tl.range(0, BLOCK_S, CHUNK):
        s = block * BLOCK_S + c + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + s, mask=s < N, other=E + 1)
        ids = tl.where(ids < 0, E, ids)
        counts += tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * (E + 1) + e, counts, mask=e <= E)


@triton.jit(do_not_specialize=["N", "blocks"])
def _permute_fwd_kernel(
    ids_ptr, counts_ptr, offsets_ptr, order_ptr, inverse_ptr, N, E, blocks,
    PER: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_B: tl.constexpr,
):  # fmt: skip
    """Places BLOCK_S slots, which are PER counted blocks. Each program sums the counts for itself.

    For T = 4608 that is 144 x 13 numbers out of L2, less than a scan in a launch of its own costs.
    """
    program = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    e_ok = e <= E
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for b0 in tl.range(0, blocks, CHUNK_B):
        b = b0 + tl.arange(0, CHUNK_B)
        ptrs = counts_ptr + (b * (E + 1))[:, None] + e[None, :]
        counts = tl.load(ptrs, mask=(b < blocks)[:, None] & e_ok[None, :], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((b < program * PER)[:, None], counts, 0), axis=0)
    start = tl.cumsum(total, 0) - total
    if program == 0:
        tl.store(offsets_ptr + e, start, mask=e_ok)
    place = start + before
    end = tl.minimum(N, (program + 1) * BLOCK_S)  # a chunk need not divide the block
    for c in tl.range(0, BLOCK_S, CHUNK):
        s = program * BLOCK_S + c + tl.arange(0, CHUNK)
        s_ok = s < end
        ids = tl.load(ids_ptr + s, mask=s_ok, other=E + 1)
        ids = tl.where(ids < 0, E, ids)
        same = (ids[:, None] == e[None, :]).to(tl.int32)
        rank = tl.cumsum(same, 0) - same
        pos = tl.sum(same * (rank + place[None, :]), axis=1)
        tl.store(order_ptr + pos, s, mask=s_ok)
        tl.store(inverse_ptr + s, pos, mask=s_ok)
        place += tl.sum(same, axis=0)


# From here on blocks are 64 tokens: `permute` reads every block's counts in every program.
_MANY_TOKENS = 16384
_STAGES = 4  # 4.3 TB/s x 0.7 us of latency is 23 KB in flight on each SM


def route(x_TD, router_ED, top_k: int, mask_T=None):
    """probs [T, E], weights [T, K] fp32, ids [T, K], offsets [E+1], order [N], inverse [N]."""
    return _route(x_TD, router_ED, top_k, mask_T)


def modulate_route(x_TD, scale_BD, shift_BD, eps: float, router_ED, top_k: int, mask_T=None):
    """LayerNorm(x) * (1 + scale) + shift [T, D], and `route` of it, in the launches of `route`."""
    modulated_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    adaln = (scale_BD, shift_BD, modulated_TD, eps)
    return modulated_TD, *_route(x_TD, router_ED, top_k, mask_T, *adaln)


def _route(x_TD, router_ED, top_k, mask_T, scale=None, shift=None, modulated=None, eps=0.0):
    (T, D), E = x_TD.shape, router_ED.shape[0]
    new = x_TD.new_empty
    probs_TE = new(T, E, dtype=torch.float32)
    weights_TK = new(T, top_k, dtype=torch.float32)
    ids_TK = new(T, top_k, dtype=torch.int32)
    BLOCK_E = power_of_two(E, 16)
    BLOCK_T = 16 if BLOCK_E > 64 else (32 if T <= _MANY_TOKENS else 64)
    if scale is not None:
        BLOCK_T = min(BLOCK_T, 32)  # two statistics a number beside it have to fit the registers
    blocks = triton.cdiv(T, BLOCK_T)
    counts = new(blocks, E + 1, dtype=torch.int32)
    if T:
        same = x_TD.dtype == router_ED.dtype
        exact = "ieee" if same or x_TD.dtype == torch.float32 else "tf32x3"
        BLOCK_K = _columns(x_TD, router_ED, BLOCK_T, BLOCK_E)
        # maxnreg: ptxas would rather spill a word than have one program less on an SM
        _route_fwd_kernel[(blocks,)](
            x_TD, router_ED, mask_T, scale, shift, modulated, probs_TE, weights_TK, ids_TK, counts,
            T, D, E, x_TD.stride(0), router_ED.stride(0),
            0 if scale is None else scale.stride(0), 0 if scale is None else shift.stride(0),
            1 if scale is None else T // scale.shape[0], float(eps), TOP_K=top_k,
            EVEN_K=even(D, BLOCK_K), SAME=same, PRECISION=exact, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E,
            BLOCK_K=BLOCK_K, num_warps=4 if BLOCK_E <= 64 else 8, num_stages=_STAGES, maxnreg=255,
        )  # fmt: skip
    return probs_TE, weights_TK, ids_TK, *_place(ids_TK, E, counts, BLOCK_T * top_k)


def permute(ids_TK, num_experts: int):
    """Stable counting sort of the slots by expert; slots with id -1 go last and are not counted."""
    N, E = ids_TK.numel(), num_experts
    BLOCK_E = power_of_two(E + 1, 16)
    BLOCK_S = 256
    blocks = triton.cdiv(N, BLOCK_S)
    counts = ids_TK.new_empty(blocks, E + 1, dtype=torch.int32)
    if N:
        _count_fwd_kernel[(blocks,)](
            ids_TK, counts, N, E, BLOCK_S=BLOCK_S, BLOCK_E=BLOCK_E,
            CHUNK=_one_hot_rows(BLOCK_E, BLOCK_S), num_warps=4,
        )  # fmt: skip
    return _place(ids_TK, E, counts, BLOCK_S)


def _columns(x_TD, router_ED, BLOCK_T: int, BLOCK_E: int) -> int:
    """Columns of x and the router in flight at a time: what 64 KB of shared memory hold."""
    if x_TD.dtype == torch.float32:
        return 32 if BLOCK_E <= 64 else 16  # plain fp32 products keep both operands in registers
    same = x_TD.dtype == router_ED.dtype  # else three TF32 products, and twice the registers
    per_column = BLOCK_T * x_TD.element_size() + BLOCK_E * router_ED.element_size()
    sizes = (128, 64, 32, 16) if same else (64, 32, 16)
    return next(k for k in sizes if k == 16 or _STAGES * k * per_column <= 65536)


def _one_hot_rows(BLOCK_E: int, most: int) -> int:
    """Slots of a one-hot tile: at most 4096 elements, 32 registers of 128 threads."""
    return min(max(16, 4096 // BLOCK_E), power_of_two(most))


def _place(ids_TK, E: int, counts, per_block: int):
    """offsets, order and inverse from the counts of blocks of `per_block` slots each."""
    N, blocks = ids_TK.numel(), counts.shape[0]
    order_N = ids_TK.new_empty(N, dtype=torch.int32)
    inverse_N = torch.empty_like(order_N)
    if N == 0:
        return ids_TK.new_zeros(E + 1, dtype=torch.int32), order_N, inverse_N
    offsets = ids_TK.new_empty(E + 1, dtype=torch.int32)
    BLOCK_E = power_of_two(E + 1, 16)
    PER = max(1, 256 // per_block)
    _permute_fwd_kernel[(triton.cdiv(blocks, PER),)](
        ids_TK, counts, offsets, order_N, inverse_N, N, E, blocks, PER=PER,
        BLOCK_S=PER * per_block, BLOCK_E=BLOCK_E, CHUNK=_one_hot_rows(BLOCK_E, PER * per_block),
        CHUNK_B=max(16, 2048 // BLOCK_E), num_warps=4,
    )  # fmt: skip
    return offsets, order_N, inverse_N
