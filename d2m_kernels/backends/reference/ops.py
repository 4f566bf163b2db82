"""The stages: route, permute, grouped GEMM, combine, and the AdaLN around them.

Shapes: B samples, T tokens, D model, E experts, K top-k, N = T*K slots, M rows of a grouped GEMM.
"""

import torch

from d2m_kernels.activations import pointwise, pointwise_backward
from d2m_kernels.tensors import matmul, wide, wide_dtype


def select(logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """The K largest logits, best first; ties go to the lowest id, NaN comes last. [T, K] int64"""
    nan_TE = logits_TE.isnan()
    key_TE = logits_TE.masked_fill(nan_TE, -torch.inf)
    by_value_TE = key_TE.sort(dim=-1, descending=True, stable=True).indices
    nan_last_TE = nan_TE.gather(-1, by_value_TE).to(torch.int8).sort(dim=-1, stable=True).indices
    return by_value_TE.gather(-1, nan_last_TE)[:, :top_k]


def route(x_TD, router_ED, top_k: int, mask_T=None):
    """Gate of eqs. 2-3: probs, weights, ids and the expert order (see `Routing`)."""
    logits_TE = matmul(x_TD, router_ED.T)
    ids_TK = select(logits_TE, top_k)
    weights_TK = logits_TE.gather(-1, ids_TK).softmax(-1)
    probs_TE = logits_TE.softmax(-1)
    if mask_T is not None:
        ids_TK = ids_TK.masked_fill(~mask_T[:, None], -1)
        weights_TK = weights_TK.masked_fill(~mask_T[:, None], 0)
        probs_TE = probs_TE.masked_fill(~mask_T[:, None], 0)
    probs_TE, weights_TK = probs_TE.to(wide_dtype(x_TD)), weights_TK.to(wide_dtype(x_TD))
    ids_TK = ids_TK.to(torch.int32)
    return probs_TE, weights_TK, ids_TK, *permute(ids_TK, router_ED.shape[0])


def permute(ids_TK, num_experts: int):
    """Stable counting sort of the slots by expert; slots with id -1 go last and are not counted."""
    ids_N = ids_TK.reshape(-1).to(torch.int64)
    ids_N = torch.where(ids_N < 0, num_experts, ids_N)
    order_N = ids_N.sort(stable=True).indices
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(ids_N.numel(), device=ids_N.device)
    experts = torch.arange(num_experts, device=ids_N.device)
    counts_E = (ids_N[:, None] == experts).sum(0)
    offsets = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    return offsets.to(torch.int32), order_N.to(torch.int32), inverse_N.to(torch.int32)


def spans(offsets: torch.Tensor):
    """(expert, first row, end row) of every expert that has rows."""
    bounds = offsets.tolist()
    pairs = zip(bounds[:-1], bounds[1:], strict=True)
    return [(e, lo, hi) for e, (lo, hi) in enumerate(pairs) if hi > lo]


def linear(x, w, b):
    """x w^T + b in the wide dtype."""
    y = wide(x) @ wide(w).T
    return y if b is None else y + wide(b)


def grouped_gemm(
    x, w_ENK, offsets, w_gate=None, gather=None, bias_EN=None, bias_gate=None, activation=None
):
    """Row r of expert e: act(x[gather[r]] w[e]^T + bias[e]); rows past offsets[E] are zero."""
    if gather is not None:
        x = x[gather.long()]
    out = x.new_zeros(x.shape[0], w_ENK.shape[1])
    for e, lo, hi in spans(offsets):
        z = linear(x[lo:hi], w_ENK[e], None if bias_EN is None else bias_EN[e])
        if w_gate is not None:
            gate = linear(x[lo:hi], w_gate[e], None if bias_gate is None else bias_gate[e])
            z = z * pointwise(activation, gate)
        elif activation is not None:
            z = pointwise(activation, z)
        out[lo:hi] = z.to(x.dtype)
    return out


def grouped_gemm_bwd(
    dout, x, w_ENK, offsets, w_gate, gather, bias_EN, bias_gate, activation, needs
):
    """Gradients (x, w, w_gate, bias, bias_gate) of `grouped_gemm`, None where `needs` is False.

    An expert without rows has gradient zero; rows of x that several slots gather are summed.
    """
    present = (x, w_ENK, w_gate, bias_EN, bias_gate)
    dx, dw, dw_gate, db, db_gate = (
        torch.zeros_like(wide(t), memory_format=torch.contiguous_format) if need else None
        for t, need in zip(present, needs, strict=True)
    )
    rows = torch.arange(dout.shape[0], device=x.device) if gather is None else gather.long()
    for e, lo, hi in spans(offsets):
        x_e = wide(x[rows[lo:hi]])
        z = linear(x_e, w_ENK[e], None if bias_EN is None else bias_EN[e])
        dz = wide(dout[lo:hi])
        if w_gate is not None:
            gate = linear(x_e, w_gate[e], None if bias_gate is None else bias_gate[e])
            dgate = pointwise_backward(activation, gate, dz * z)
            dz = dz * pointwise(activation, gate)
        elif activation is not None:
            dz = pointwise_backward(activation, z, dz)
        halves = [(dz, w_ENK, dw, db)]
        if w_gate is not None:
            halves.append((dgate, w_gate, dw_gate, db_gate))
        for d, w, dw_half, db_half in halves:
            if dx is not None:
                dx.index_add_(0, rows[lo:hi], d @ wide(w[e]))
            if dw_half is not None:
                dw_half[e] = d.T @ x_e
            if db_half is not None:
                db_half[e] = d.sum(0)
    return tuple(
        None if grad is None else grad.to(t.dtype)
        for grad, t in zip((dx, dw, dw_gate, db, db_gate), present, strict=True)
    )


def combine(y_ND, inverse_TK, weights_TK, offsets, base_TD=None, bias_D=None, scale: float = 1.0):
    """out[t] = base[t] + bias + scale * sum_j weights[t, j] * y[inverse[t, j]]; no weights: ones.

    Slots whose row lies past offsets[E] (masked tokens) are left out, whatever their row holds.
    """
    if y_ND.shape[0] == 0:
        rows_TKD = wide(y_ND).new_zeros(*inverse_TK.shape, y_ND.shape[1])
    else:
        rows_TKD = wide(y_ND)[inverse_TK.long()]
    if weights_TK is not None:
        rows_TKD = rows_TKD * weights_TK[..., None].to(rows_TKD.dtype)
    live_TK = inverse_TK < offsets[-1]
    out = scale * torch.where(live_TK[..., None], rows_TKD, 0).sum(1)
    if base_TD is not None:
        out = out + base_TD
    if bias_D is not None:
        out = out + bias_D
    return out.to(y_ND.dtype)
