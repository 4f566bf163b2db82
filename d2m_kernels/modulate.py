"""`modulate_route`: AdaLN's LayerNorm, scale and shift in front of the router.

Shapes: B samples, T tokens (T / B of each sample), D model, E experts, K top-k.
"""

from __future__ import annotations

import torch

from d2m_kernels import backends, checks
from d2m_kernels.backends import router_backend
from d2m_kernels.contract import Routing
from d2m_kernels.eager import modulate
from d2m_kernels.op import define
from d2m_kernels.route import fake_routing, router_backward
from d2m_kernels.tensors import (
    in_given_dtypes,
    needs_grad,
    tokens_of,
    unit,
    wide,
    wide_dtype,
    without_autocast,
)

_MODULATE_ROUTE = (
    "(Tensor x, Tensor scale, Tensor shift, float eps, Tensor router, int top_k,"
    " Tensor? token_mask, str backend) -> (Tensor modulated, Tensor probs, Tensor weights,"
    " Tensor ids, Tensor offsets, Tensor order, Tensor inverse)"
)


def modulate_route(
    x, scale, shift, router, *, top_k=2, token_mask=None, eps=1e-6, backend=None
) -> tuple[torch.Tensor, Routing]:
    """x' = LayerNorm(x) * (1 + scale) + shift, and `route` of x'.

    LayerNorm is without weights: (x - mean) / sqrt(var + eps). Where the back-end can, x is read
    once and x' written once, in the launches of `route`. Differentiable in x, scale, shift, router.

    Args:
        x: [B, ..., D], or [T, D] with the B samples one after another.
        scale, shift: [B, D]; B may be 1 for any x.
        router, top_k, token_mask, backend: as in `route`.
        eps: added to the variance.

    Returns:
        x' shaped and typed as x (rounded once, from fp32), and its Routing.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is wrong.
        RuntimeError: the requested back-end cannot serve this device or dtype.
    """
    checks.input_and_router(x, router)
    checks.mask(token_mask, x)
    checks.modulation(x, (scale, shift))
    k = checks.top_k(top_k, router.shape[0])
    name = router_backend(x, router, backends.resolve(backend, x.device.type, x.dtype))
    mask_T = None if token_mask is None else token_mask.reshape(-1)
    with without_autocast(x.device.type):
        modulated_TD, *routing = modulate_route_tokens(
            tokens_of(x), scale, shift, eps, router, k, mask_T, name
        )
    return modulated_TD.view_as(x), Routing(*routing)


def modulate_route_tokens(x_TD, scale_BD, shift_BD, eps, router_ED, top_k, mask_T, backend):
    """`modulate_route` of checked arguments: x' [T, D] and the fields of a Routing."""
    args = (x_TD, unit(scale_BD), unit(shift_BD), float(eps), router_ED, top_k, mask_T, backend)
    if needs_grad(x_TD, scale_BD, shift_BD, router_ED):
        return ModulateRouteFunction.apply(*args)
    return torch.ops.d2m.modulate_route.default(*args)


class ModulateRouteFunction(torch.autograd.Function):
    """d2m::modulate_route; saves x, x', scale, router, and the routing's probs, weights and ids."""

    @staticmethod
    def forward(ctx, x_TD, scale_BD, shift_BD, eps, router_ED, top_k, mask_T, backend):
        outputs = torch.ops.d2m.modulate_route.default(
            x_TD, scale_BD, shift_BD, eps, router_ED, top_k, mask_T, backend
        )
        modulated_TD, probs_TE, weights_TK, ids_TK, offsets, order_N, inverse_N = outputs
        ctx.save_for_backward(
            x_TD, scale_BD, router_ED, modulated_TD, mask_T, probs_TE, weights_TK, ids_TK
        )
        ctx.eps, ctx.shift_dtype = eps, shift_BD.dtype
        ctx.mark_non_differentiable(ids_TK, offsets, order_N, inverse_N)
        return outputs

    @staticmethod
    @in_given_dtypes
    def backward(ctx, dmodulated_TD, dprobs_TE, dweights_TK, *_):
        x_TD, scale_BD, router_ED, modulated_TD, *routed = ctx.saved_tensors
        need_x, need_scale, need_shift, _, need_router, *_ = ctx.needs_input_grad
        dx_TD, drouter_ED = router_backward(
            modulated_TD, router_ED, *routed, dprobs_TE, dweights_TK, wide_dtype(x_TD), need_router
        )
        # x' is rounded once; its gradient from both paths is summed in the wide dtype.
        (T, D), B = x_TD.shape, scale_BD.shape[0]
        d_BSD = (wide(dmodulated_TD) + dx_TD).view(B, T // max(B, 1), D)
        x_BSD = wide(x_TD).reshape(d_BSD.shape)
        normed, mean, rstd = torch.ops.aten.native_layer_norm(x_BSD, (D,), None, None, ctx.eps)
        dx = dscale = dshift = None
        if need_x:
            dnormed = d_BSD * (1 + wide(scale_BD)[:, None])
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                dnormed, x_BSD, (D,), mean, rstd, None, None, [True, False, False]
            )
            dx = dx.view(T, D).to(x_TD.dtype)
        if need_scale:
            dscale = (d_BSD * normed).sum(1).to(scale_BD.dtype)
        if need_shift:
            dshift = d_BSD.sum(1).to(ctx.shift_dtype)
        return dx, dscale, dshift, None, drouter_ED, None, None, None


@define("modulate_route", _MODULATE_ROUTE)
def _modulate_route(x, scale, shift, eps, router, top_k, token_mask, backend):
    module = backends.module(backend)
    if hasattr(module, "modulate_route"):
        return module.modulate_route(x, scale, shift, eps, router, top_k, token_mask)
    modulated = modulate(x, scale, shift, eps)
    return modulated, *module.route(modulated, router, top_k, token_mask)


@torch.library.register_fake("d2m::modulate_route")
def _(x, scale, shift, eps, router, top_k, token_mask, backend):
    modulated = torch.empty_like(x, memory_format=torch.contiguous_format)
    return modulated, *fake_routing(x, router, top_k)
