"""The back-end "torch": `torch.nn.functional.grouped_mm` with eager torch around it.

Shapes: T tokens, D model, F hidden, E experts, K top-k, N = T*K slots, S shared neurons, H = F_e.

It runs wherever torch does, without a host sync where grouped_mm has none. grouped_mm wants rows
at 16-byte strides; shapes that have others run an expert loop instead (`layout_reason` says so).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from d2m_kernels.activations import activate, activate_backward, pointwise, pointwise_backward
from d2m_kernels.backends.reference import combine, permute, route, spans
from d2m_kernels.contract import FFNAttrs, FFNGrads, FFNInputs
from d2m_kernels.eager import each_stream, each_stream_bwd

__all__ = ["combine", "ffn_bwd", "ffn_fwd", "grouped_gemm", "grouped_gemm_bwd", "permute", "route"]

NAME = "torch"


def unavailable() -> str | None:
    there = hasattr(F, "grouped_mm")
    return None if there else "torch.nn.functional.grouped_mm needs torch >= 2.10"


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    on_cpu = () if device_type == "cuda" else (torch.float16, torch.float32)
    if dtype not in (torch.bfloat16, *on_cpu):
        return "grouped_mm serves bf16 on CUDA; bf16, fp16 and fp32 on the CPU"
    return None


def layout_reason(*operands: torch.Tensor) -> str | None:
    """Why grouped_mm cannot take these operands, or None: each needs 16-byte aligned rows."""
    for t in operands:
        unit = 16 // t.element_size()
        inner, outer = sorted(t.stride()[-2:])
        if t.data_ptr() % 16 or inner != 1 or outer % unit:
            return f"strides {t.stride()} of {t.dtype} are no multiple of 16 bytes"
    return None


def _served(a, b) -> bool:
    """Whether grouped_mm takes these operands; the loops below take any."""
    dtype_ok = unsupported(a.device.type, a.dtype) is None
    return dtype_ok and a.numel() > 0 and b.numel() > 0 and layout_reason(a, b) is None


def _grouped(a, b, offsets):
    """a [M, K] by b [E, K, N] group by group, or a [I, M] by b [M, J] summed over each group."""
    if _served(a, b):
        return F.grouped_mm(a, b, offs=offsets[1:])
    E = offsets.shape[0] - 1
    if b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[2])
        for e, lo, hi in spans(offsets):
            out[lo:hi] = a[lo:hi] @ b[e]
        return out
    out = a.new_zeros(E, a.shape[0], b.shape[1])
    for e, lo, hi in spans(offsets):
        out[e] = a[:, lo:hi] @ b[lo:hi]
    return out


class _Rows:
    """Which expert each row of the expert order belongs to, and whether it is a routed one."""

    def __init__(self, count: int, offsets):
        rows = torch.arange(count, device=offsets.device, dtype=offsets.dtype)
        experts = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        self.expert_N = experts.clamp(max=offsets.shape[0] - 2)
        self.live_N1 = (rows < offsets[-1])[:, None]

    def clear_tail(self, t):
        """grouped_mm leaves the rows past the last offset uninitialised."""
        return torch.where(self.live_N1, t, 0)

    def linear(self, x, w_EHK, b_EH, offsets):
        """x w^T + b, rounded once: a bias added to a rounded product can turn the sum's sign.

        grouped_mm takes no bias, so in 16 bits the bias goes in as one more column of w, against
        a column of ones, filled up to the next 16 bytes.
        """
        if b_EH is None or x.element_size() > 2:
            y = _grouped(x, w_EHK.transpose(1, 2), offsets)
            return self.clear_tail(y if b_EH is None else y + b_EH[self.expert_N])
        if _served(x, w_EHK.transpose(1, 2)):
            ones, bias = x.new_zeros(x.shape[0], 8), w_EHK.new_zeros(*w_EHK.shape[:2], 8)
            ones[:, 0], bias[..., 0] = 1, b_EH
            x, w_EHK = torch.cat([x, ones], -1), torch.cat([w_EHK, bias], -1)
            y = _grouped(x, w_EHK.transpose(1, 2), offsets)
        else:
            y = x.new_zeros(x.shape[0], w_EHK.shape[1])
            for e, lo, hi in spans(offsets):
                y[lo:hi] = F.linear(x[lo:hi], w_EHK[e], b_EH[e])
        return self.clear_tail(y)

    def sums(self, rows_NH, offsets):
        """The sum of each expert's rows, [E, H]; rows past the last offset must be zero."""
        out = torch.zeros(
            offsets.shape[0] - 1, rows_NH.shape[1], dtype=torch.float32, device=rows_NH.device
        )
        return out.index_put_((self.expert_N,), rows_NH.float(), accumulate=True).to(rows_NH.dtype)


def grouped_gemm(
    x, w_ENK, offsets, w_gate=None, gather=None, bias_EN=None, bias_gate=None, activation=None
):
    x = x if gather is None else x[gather.long()]
    rows = _Rows(x.shape[0], offsets)
    z = rows.linear(x, w_ENK, bias_EN, offsets)
    if w_gate is not None:
        z = z * pointwise(activation, rows.linear(x, w_gate, bias_gate, offsets))
    elif activation is not None:
        z = rows.clear_tail(pointwise(activation, z))
    return z


def grouped_gemm_bwd(
    dout, x, w_ENK, offsets, w_gate, gather, bias_EN, bias_gate, activation, needs
):
    """Gradients of `grouped_gemm` (see `reference`): no host sync where grouped_mm has none."""
    need_x, need_w, need_w_gate, need_bias, need_bias_gate = needs
    index = None if gather is None else gather.long()
    x_M = x if index is None else x[index]
    rows = _Rows(x_M.shape[0], offsets)
    dz = rows.clear_tail(dout).float()
    dgate = None
    if activation is not None:
        z = rows.linear(x_M, w_ENK, bias_EN, offsets).float()
        if w_gate is None:
            dz = pointwise_backward(activation, z, dz)
        else:
            gate = rows.linear(x_M, w_gate, bias_gate, offsets).float()
            dgate = pointwise_backward(activation, gate, dz * z)
            dz = dz * pointwise(activation, gate)
    db = rows.sums(dz, offsets).to(x.dtype) if need_bias else None
    db_gate = rows.sums(dgate, offsets).to(x.dtype) if need_bias_gate else None
    dz = dz.to(x.dtype)
    dgate = None if dgate is None else dgate.to(x.dtype)
    dx = None
    if need_x:
        dx = _grouped(dz, w_ENK, offsets)
        dx = dx if dgate is None else dx + _grouped(dgate, w_gate, offsets)
        dx = rows.clear_tail(dx)
    if need_x and index is not None:
        # index_put_ with accumulate sorts on CUDA: unlike index_add_, two runs are bitwise equal.
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        dx = total.index_put_((index,), dx.float(), accumulate=True).to(x.dtype)
    dw = _grouped(dz.T, x_M, offsets) if need_w else None
    dw_gate = _grouped(dgate.T, x_M, offsets) if need_w_gate else None
    return dx, dw, dw_gate, db, db_gate


def _experts(t, shared: int, num_experts: int, dim: int = 0):
    """The routed neurons of a dense tensor as a view [E, H, ..] (dim 0) or [E, D, H] (dim 1)."""
    if t is None:
        return None
    routed = t.narrow(dim, shared, t.shape[dim] - shared).unflatten(dim, (num_experts, -1))
    return routed if dim == 0 else routed.transpose(0, 1)


@each_stream
def ffn_fwd(s: FFNInputs, attrs: FFNAttrs, combine=combine):
    E, (T, K), shared = s.offsets.shape[0] - 1, s.weights.shape, attrs.shared
    halves = ((s.up, s.b_up),) if s.gate is None else ((s.up, s.b_up), (s.gate, s.b_gate))
    parts = [F.linear(s.x, w[:shared], None if b is None else b[:shared]) for w, b in halves]
    z_shared = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    y_TD = F.linear(activate(attrs.activation, z_shared), s.w2[:, :shared], s.b2)
    z_routed = s.x.new_zeros(0, len(halves) * ((s.w2.shape[1] - shared) // E))
    if K:
        rows = _Rows(T * K, s.offsets)
        x_ND = s.x[s.order.long() // K]
        parts = [
            rows.linear(x_ND, _experts(w, shared, E), _experts(b, shared, E), s.offsets)
            for w, b in halves
        ]
        z_routed = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        w2_EHD = _experts(s.w2, shared, E, 1).transpose(1, 2)
        y_ND = _grouped(activate(attrs.activation, z_routed), w2_EHD, s.offsets)
        y_TD = combine(y_ND, s.inverse.view(T, K), s.weights, s.offsets, y_TD, None, attrs.scale)
    return y_TD, z_shared, z_routed


@each_stream_bwd
def ffn_bwd(dy_TD, s: FFNInputs, zs, attrs: FFNAttrs, grads: FFNGrads, combine=combine):
    (z_shared, z_routed), shared, activation = zs, attrs.shared, attrs.activation
    E, (T, K) = s.offsets.shape[0] - 1, s.weights.shape
    w1 = ((s.up, grads.up, grads.b_up), (s.gate, grads.gate, grads.b_gate))
    w1 = w1[:1] if s.gate is None else w1
    for t in (grads.up, grads.gate, grads.b_up, grads.b_gate, grads.w2):
        if t is not None:  # whatever is not reached below: frozen or unrouted neurons
            t.zero_()

    dh = dy_TD @ s.w2[:, :shared]
    dz = activate_backward(activation, z_shared, dh)
    live = slice(attrs.frozen, shared)
    dx_TD = torch.zeros_like(s.x)
    for (w, dw, db), dz_half in zip(w1, dz.chunk(len(w1), -1), strict=True):
        dx_TD = dx_TD + dz_half @ w[:shared]
        if dw is not None:
            dw[live] = dz_half[:, live].T @ s.x
        if db is not None:
            db[live] = dz_half[:, live].sum(0)
    if grads.w2 is not None:
        grads.w2[:, live] = dy_TD.T @ activate(activation, z_shared)[:, live]
    if grads.b2 is not None:
        grads.b2.copy_(dy_TD.sum(0))

    if K and shared < s.w2.shape[1]:
        rows = _Rows(T * K, s.offsets)
        token_N = s.order.long() // K
        x_ND, dy_ND = s.x[token_N], dy_TD[token_N]
        dh = rows.clear_tail(_grouped(dy_ND, _experts(s.w2, shared, E, 1), s.offsets))
        h = activate(activation, z_routed)
        factor_N = attrs.scale * s.weights.view(-1)[s.order.long()]
        if grads.weights is not None:
            sums_N = attrs.scale * torch.linalg.vecdot(dh.float(), h.float())
            grads.weights.copy_(sums_N[s.inverse.long()].view(T, K))
        factor_N1 = factor_N[:, None].to(s.x.dtype)
        dz = activate_backward(activation, z_routed, dh * factor_N1)
        if grads.w2 is not None:
            dw2_EDH = _grouped(dy_ND.T, h * factor_N1, s.offsets)
            _experts(grads.w2, shared, E, 1).copy_(dw2_EDH)
        dx_ND = 0
        for (w, dw, db), dz_half in zip(w1, dz.chunk(len(w1), -1), strict=True):
            dz_half = dz_half.contiguous()
            dx_ND = dx_ND + _grouped(dz_half, _experts(w, shared, E), s.offsets)
            if dw is not None:
                _experts(dw, shared, E).copy_(_grouped(dz_half.T, x_ND, s.offsets))
            if db is not None:
                _experts(db, shared, E).copy_(rows.sums(dz_half, s.offsets))
        if grads.x is not None:
            dx_TD = combine(dx_ND, s.inverse.view(T, K), None, s.offsets, dx_TD, None, 1.0)
    elif grads.weights is not None:
        grads.weights.zero_()
    if grads.x is not None:
        grads.x.copy_(dx_TD)
