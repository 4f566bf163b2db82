"""The gradient of `grouped_gemm`, out of the launches that the layer's backward is made of.

Shapes: R rows of x, M rows of the output, E experts, N output and K input features. The
pre-activation is computed again; rows past offsets[E] take no part in any sum.
"""

import torch

from d2m_kernels.activations import pointwise, pointwise_backward
from d2m_kernels.backends.triton.grouped_gemm import Operands, grouped_gemm, grouped_matmul
from d2m_kernels.backends.triton.launch import tickets
from d2m_kernels.backends.triton.operands import stacked
from d2m_kernels.backends.triton.weight_grads import bias_grad, sums, weight_grad


def grouped_gemm_bwd(
    dout, x, w_ENK, offsets, w_gate, gather, bias_EN, bias_gate, activation, needs
):
    """Gradients (x, w, w_gate, bias, bias_gate) of `grouped_gemm`, None where `needs` is False."""
    (E, N, K), M = w_ENK.shape, dout.shape[0]
    need_x, need_w, need_w_gate, need_bias, need_bias_gate = needs
    if w_gate is not None and w_gate.stride() != w_ENK.stride():
        w_ENK, w_gate = w_ENK.contiguous(), w_gate.contiguous()
    counters = tickets(x.device, 3)
    dz = _pre_activation_grad(
        dout, x, w_ENK, offsets, w_gate, gather, bias_EN, bias_gate, activation
    )
    dx = None
    if need_x:
        dx = x.new_empty(M, K)
        gate = None if w_gate is None else stacked(w_gate)
        operands = Operands(dz, offsets, stacked(w_ENK), dx, gate)
        gated = gate is not None
        grouped_matmul("dx", [operands], next(counters), N=K, K=N, trans=True, dual=gated)
        if gather is not None:
            # index_put_ with accumulate sorts on CUDA: unlike index_add_, bitwise reproducible.
            total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            dx = total.index_put_((gather.long(),), dx.float(), accumulate=True).to(x.dtype)
    rows = gather
    if rows is None:
        rows = torch.arange(M, dtype=torch.int32, device=x.device)
    sizes = dict(shared=0, H=N, frozen=0)

    def of_half(half, need, need_b):
        dw = x.new_empty(E * N, K) if need else None
        db = x.new_empty(E * N) if need_b else None
        if need:
            operands = sums(dw, None, dz, x, offsets, rows)
            weight_grad([operands], next(counters), half=half, top_k=1, **sizes)
        if need_b:
            bias_grad(db, None, dz, offsets, half=half, **sizes)
        return None if dw is None else dw.view(E, N, K), None if db is None else db.view(E, N)

    dw, db = of_half(0, need_w, need_bias)
    dw_gate, db_gate = of_half(1, need_w_gate, need_bias_gate)
    return dx, dw, dw_gate, db, db_gate


def _pre_activation_grad(dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation):
    """dz [M, N], gated [M, 2N] = [dz | dgate], with a unit inner stride."""
    if activation is None:
        return dout if dout.stride(-1) == 1 or dout.shape[1] == 1 else dout.contiguous()
    z = grouped_gemm(x, w, offsets, None, gather, bias).float()
    dout = dout.float()
    if w_gate is None:
        return pointwise_backward(activation, z, dout).to(x.dtype)
    gate = grouped_gemm(x, w_gate, offsets, None, gather, bias_gate).float()
    dgate = pointwise_backward(activation, gate, dout * z)
    return torch.cat([dout * pointwise(activation, gate), dgate], dim=-1).to(x.dtype)
