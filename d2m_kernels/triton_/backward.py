"""The layer's backward: dz and the weighted activation, dx as the forward's mirror, weight sums.

Shapes: T tokens, D model, F hidden = S + E*H, S shared neurons, H neurons of an expert, E experts,
K top-k, N = T*K slots. Needs x, the pre-activations and the routing; h = act(z) is recomputed in
an epilogue and y2 is never wanted: dweight = scale * rowsum((dy W2_e) * h).
"""

import torch
import triton
import triton.language as tl

from d2m_kernels.triton_ import configs
from d2m_kernels.triton_.common import (
    _act,
    _act_grad,
    _expert_of,
    _expert_spans,
    _grouped,
    _matmul,
    _parts,
    _rounded,
    even,
    pointwise_name,
    precision,
)  # fmt: skip
from d2m_kernels.triton_.ffn import finish
from d2m_kernels.triton_.grouped_gemm import grouped_matmul
from d2m_kernels.triton_.launch import launch, power_of_two
from d2m_kernels.triton_.weight_grads import bias_grad, weight_grad
from d2m_kernels.triton_.weights import neuron_columns, neuron_rows

_LEAST_BLOCK_N = 64  # of any config of the stage "act_bwd"


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


@triton.jit(do_not_specialize=["T"])
def _down_bwd_kernel(
    dy_ptr, order_ptr, offsets_ptr, weights_ptr, w_ptr, w_desc,
    z_ptr, z_shared_ptr, dz_ptr, dz_shared_ptr, h_ptr, h_shared_ptr, partial_ptr,
    T, N, K, S, E, stride_dt, stride_wk, top_k, scale, shared_h_width, stride_ps,
    ACT: tl.constexpr, PRECISION: tl.constexpr, GATED: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dA' = dy[token] W2_e; stores dz, factor * h and dweight's partial sums, one a column tile.

    factor = scale * weight for a routed row, 1 for the shared expert's (z_shared_ptr given).
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    e, lo, hi, tiles, ends = _expert_spans(offsets_ptr, E, 0, tiles_n, BLOCK_M, BLOCK_E)
    shared_tiles = 0
    if z_shared_ptr is not None:
        shared_tiles = tl.cdiv(T, BLOCK_M) * tl.cdiv(S, BLOCK_N)
    total = shared_tiles + tl.sum(tiles, 0)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
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
        acc = _matmul(
            acc,
            dy_ptr,
            None,
            source,
            0,
            stride_dt,
            0,
            w_ptr,
            w_desc,
            0,
            col,
            stride_wk,
            n0,
            width,
            K,
            PRECISION,
            True,
            EVEN_N,
            EVEN_K,
            BLOCK_N,
            BLOCK_K,
        )

        z_base = z_ptr
        dz_base = dz_ptr
        h_base = h_ptr
        if z_shared_ptr is not None:
            z_base = tl.where(routed, z_ptr, z_shared_ptr)
            if dz_ptr is not None:
                dz_base = tl.where(routed, dz_ptr, dz_shared_ptr)
            if h_ptr is not None:
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


def _activations(
    dy, w2_DF, weights_TK, offsets, order_N, z_shared, z_routed, dz_shared, dz_routed, h_shared,
    h_routed, partial, *, shared, shared_h_width, H, activation, gated, scale,
):  # fmt: skip
    """Launches the kernel over the shared expert (where z_shared is given) and the routed ones."""
    (T, D), E = dy.shape, offsets.shape[0] - 1
    weights = neuron_columns(w2_DF, shared, H)

    def arguments(config):
        return dict(
            dy_ptr=dy, order_ptr=order_N, offsets_ptr=offsets, weights_ptr=weights_TK, w_ptr=w2_DF,
            w_desc=weights.describe(config, max(shared, H), D, True), z_ptr=z_routed,
            z_shared_ptr=z_shared, dz_ptr=dz_routed, dz_shared_ptr=dz_shared, h_ptr=h_routed,
            h_shared_ptr=h_shared, partial_ptr=partial, T=T, N=H, K=D, S=shared, E=E,
            stride_dt=dy.stride(0), stride_wk=weights.stride, top_k=max(weights_TK.shape[1], 1),
            scale=float(scale), shared_h_width=shared_h_width,
            stride_ps=0 if partial is None else partial.stride(0), ACT=pointwise_name(activation),
            PRECISION=precision(dy.dtype), GATED=gated,
            EVEN_N=even(H, config.block_n) and even(shared, config.block_n),
            EVEN_K=even(D, config.block_k), BLOCK_E=power_of_two(E + 1),
            PARTS=config.parts(16 if gated else 32),
        )  # fmt: skip

    rows, width = (T, shared) if z_shared is not None else (order_N.shape[0] / E, H)
    config = configs.select("act_bwd", dy, rows, width)
    launch(_down_bwd_kernel, "act_bwd", config, dy.device, arguments)


def ffn_bwd(
    dy_TD, x_TD, up_FD, gate_FD, w2_DF, weights_TK, offsets, order_N, inverse_N, z_shared, z_routed,
    shared: int, activation: str, scale: float, frozen: int, grads,
):  # fmt: skip
    """The gradient of `ffn_fwd`, written into `grads`; the first `frozen` neurons get zero.

    dA' = dy W2, dz = factor * dA' * act'(z), dW2 = dy^T (factor * h), dW1 = dz^T x, dx = dz W1.
    """
    (T, D), (N, K) = x_TD.shape, (order_N.shape[0], weights_TK.shape[1])
    H = (up_FD.shape[0] - shared) // (offsets.shape[0] - 1)
    gated = gate_FD is not None
    dy = dy_TD if dy_TD.stride(-1) == 1 or D == 1 else dy_TD.contiguous()

    need_input = grads.x is not None
    need_w1 = any(g is not None for g in (grads.up, grads.gate, grads.b_up, grads.b_gate))
    learned = max(shared - frozen, 0)  # shared neurons that get a gradient
    shared_part = shared > 0 and (need_input or (learned > 0 and (need_w1 or grads.w2 is not None)))
    like = x_TD.new_empty
    need_dz, need_h = need_input or need_w1, grads.w2 is not None
    dz_routed = like(z_routed.shape) if need_dz else None
    dz_shared = like(z_shared.shape) if need_dz and shared_part else None
    h_routed = like(N, H) if need_h else None
    h_shared = like(T, shared) if need_h and shared_part else None
    partial, tiles = None, triton.cdiv(H, _LEAST_BLOCK_N)
    if grads.weights is not None:
        partial = like(N, tiles, dtype=torch.float32).zero_()  # masked slots stay zero
    if (need_dz or need_h or partial is not None) and T and (shared_part or N * H):
        _activations(
            dy, w2_DF, weights_TK, offsets, order_N, z_shared if shared_part else None, z_routed,
            dz_shared, dz_routed, h_shared, h_routed, partial, shared=shared,
            shared_h_width=shared if learned else 0, H=H, activation=activation, gated=gated,
            scale=scale,
        )  # fmt: skip
    if grads.weights is not None:
        torch.sum(partial.view(T, K, tiles), -1, out=grads.weights)

    if need_input:
        up, gate = neuron_rows(up_FD, shared, H), neuron_rows(gate_FD, shared, H) if gated else None
        dx_ND = None
        if N and H:
            dx_ND = like(N, D)
            grouped_matmul(
                "dx", dz_routed, offsets, up, dx_ND, N=D, K=H, gate=gate, trans=True, dual=gated
            )
        dz = dz_shared if shared else like(T, 0)
        finish(
            "dx_combine", grads.x, dz, up, dx_ND, inverse_N.view(T, K), None, offsets, gate=gate,
            trans=True,
        )  # fmt: skip

    sizes = dict(shared=shared, H=H, frozen=frozen, top_k=K)
    halves = [(grads.up, grads.b_up, 0)] + ([(grads.gate, grads.b_gate, 1)] if gated else [])
    for dw, db, half in halves:
        if dw is not None:
            weight_grad(dw, dz_shared, dz_routed, x_TD, offsets, order_N, half=half, **sizes)
        if db is not None:
            bias_grad(db, dz_shared, dz_routed, offsets, half=half, **sizes)
    if grads.w2 is not None:
        weight_grad(grads.w2.T, h_shared, h_routed, dy, offsets, order_N, half=0, **sizes)
    if grads.b2 is not None:
        grads.b2.copy_(dy_TD.sum(0, dtype=torch.float32))
