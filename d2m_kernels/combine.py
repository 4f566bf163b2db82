"""`combine`: every token gathers the rows of its experts and sums them, weighted (eq. 2).

Shapes: T tokens, D model, K top-k, N = T*K slots, y in expert order.
"""

from __future__ import annotations

import torch

from d2m_kernels import backends, checks
from d2m_kernels.contract import Routing
from d2m_kernels.op import define
from d2m_kernels.tensors import in_given_dtypes, unit

_COMBINE = (
    "(Tensor y, Tensor inverse, Tensor? weights, Tensor offsets, Tensor? base, Tensor? bias,"
    " float scale, str backend) -> Tensor"
)


def combine(y, routing: Routing, *, shared=None, bias=None, scale: float = 1.0, backend=None):
    """out[t] = shared[t] + bias + scale * sum_j weights[t, j] * y[inverse[t*K + j]].

    Gathers in a fixed order with fp32 sums, so two runs are bitwise equal. Differentiable in y,
    routing.weights, shared and bias.

    Args:
        y: [N, D] rows in expert order, as `grouped_gemm` returns them.
        routing: of `route`, with N = T*K slots; masked tokens receive `shared` and `bias` alone.
        shared: [T, D] in y's dtype, or None for zero.
        bias: [D] in y's dtype, or None.
        scale: routed_scale.

    Returns:
        [T, D] in y's dtype.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is wrong.
    """
    checks.tensor("y", y, 2, "[N, D]")
    checks.no_transform("y")
    checks.floating("y", y)
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    T, K = routing.ids.shape
    N, D = y.shape
    if N != T * K:
        raise ValueError(f"y: expected [N = T*K = {T * K}, D], got {checks.shape_of(y)}")
    checks.same_device("routing.ids", routing.ids, y)
    for name, t, size in (("shared", shared, (T, D)), ("bias", bias, (D,))):
        if t is not None:
            checks.shape(name, t, size, "[T, D]" if name == "shared" else "[D]")
            checks.same_device(name, t, y)
            checks.same_dtype(name, t, y.dtype)
    backend = backends.resolve(backend, y.device.type, y.dtype)
    return CombineFunction.apply(
        unit(y), routing.inverse.view(T, K), routing.weights, routing.offsets, routing.order,
        unit(shared), bias, float(scale), backend,
    )  # fmt: skip


class CombineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, inverse_TK, weights_TK, offsets, order_N, base_TD, bias_D, scale, name):
        ctx.save_for_backward(y_ND, inverse_TK, weights_TK, offsets, order_N)
        ctx.scale = scale
        return torch.ops.d2m.combine.default(
            y_ND, inverse_TK, weights_TK, offsets, base_TD, bias_D, scale, name
        )

    @staticmethod
    @in_given_dtypes
    def backward(ctx, dout_TD):
        y_ND, inverse_TK, weights_TK, offsets, order_N = ctx.saved_tensors
        need_y, _, need_weights, _, _, need_base, need_bias, _, _ = ctx.needs_input_grad
        N, K = y_ND.shape[0], inverse_TK.shape[1]
        dy_ND = dweights_TK = None
        slots_N = order_N.long()
        live_N = torch.arange(N, device=y_ND.device) < offsets[-1]
        if N:
            dout_ND = dout_TD[slots_N // K].to(weights_TK.dtype)
            if need_y:
                factor_N = ctx.scale * weights_TK.reshape(-1)[slots_N]
                dy_ND = torch.where(live_N[:, None], dout_ND * factor_N[:, None], 0).to(y_ND.dtype)
            if need_weights:
                sums_N = torch.where(live_N, (dout_ND * y_ND).sum(-1), 0) * ctx.scale
                dweights_TK = sums_N[inverse_TK.long()]
        else:
            dy_ND = torch.zeros_like(y_ND) if need_y else None
            dweights_TK = torch.zeros_like(weights_TK) if need_weights else None
        dbase_TD = dout_TD if need_base else None
        dbias_D = dout_TD.sum(0) if need_bias else None
        return dy_ND, None, dweights_TK, None, None, dbase_TD, dbias_D, None, None


@define("combine", _COMBINE)
def _combine(y, inverse, weights, offsets, base, bias, scale, backend):
    return backends.module(backend).combine(y, inverse, weights, offsets, base, bias, scale)


@torch.library.register_fake("d2m::combine")
def _(y, inverse, weights, offsets, base, bias, scale, backend):
    return y.new_empty(inverse.shape[0], y.shape[1])
