"""`route`: which experts each token goes to, and with what weight (eqs. 2-3).

Shapes: T tokens, D model, E experts, K top-k, N = T*K slots.
"""

from __future__ import annotations

import functools

import torch

from d2m_kernels import backends, checks
from d2m_kernels.backends import router_backend
from d2m_kernels.contract import Routing
from d2m_kernels.op import define
from d2m_kernels.tensors import (
    in_given_dtypes,
    matmul,
    needs_grad,
    tokens_of,
    wide_dtype,
    without_autocast,
)

BLOCK_ROWS = 1024
_ROUTE = (
    "(Tensor x, Tensor router, int top_k, Tensor? token_mask, str backend)"
    " -> (Tensor probs, Tensor weights, Tensor ids, Tensor offsets, Tensor order, Tensor inverse)"
)


def route(x, router, *, top_k=2, token_mask=None, backend=None) -> Routing:
    """Selects the top-k experts of every token: alpha = softmax(W_g x), I = TopK(alpha), eq. 3.

    Args:
        x: [..., D] bf16, fp16 or fp32 (fp64: reference only).
        router: [E, D] gating weights W_g, of any of these dtypes; on x's device.
        top_k: 0..E, or "dense" (like 0: nothing is routed).
        token_mask: [...] bool; False: the token is routed nowhere (ids -1, weights and probs 0).
        backend: see `moe_ffn`.

    Returns:
        Routing over the T = x.numel() / D tokens; `probs` and `weights` are differentiable in x
        and router. Logits are fp32, also under autocast; ties go to the lowest id, NaN comes last.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is wrong.
        RuntimeError: the requested back-end cannot serve this device or dtype.
    """
    checks.input_and_router(x, router)
    checks.mask(token_mask, x)
    k = checks.top_k(top_k, router.shape[0])
    name = router_backend(x, router, backends.resolve(backend, x.device.type, x.dtype))
    x_TD = tokens_of(x)
    mask_T = None if token_mask is None else token_mask.reshape(-1)
    with without_autocast(x.device.type):
        return Routing(*route_tokens(x_TD, router, k, mask_T, name))


def route_tokens(x_TD, router_ED, top_k, mask_T, backend):
    """`route` of checked arguments: the fields of a Routing."""
    if needs_grad(x_TD, router_ED):
        return RouteFunction.apply(x_TD, router_ED, top_k, mask_T, backend)
    return torch.ops.d2m.route.default(x_TD, router_ED, top_k, mask_T, backend)


def reroute(x_TD, router, routing: Routing) -> Routing:
    """`routing`'s ids and order with probs and weights computed afresh, so that gradients flow."""
    logits_TE = matmul(x_TD, router.T).to(wide_dtype(x_TD))
    live_TK = routing.ids >= 0
    chosen_TK = logits_TE.gather(-1, routing.ids.clamp(min=0).long())
    weights_TK = torch.where(live_TK, chosen_TK.softmax(-1), 0)
    probs_TE = logits_TE.softmax(-1)
    if routing.ids.shape[1]:
        probs_TE = torch.where(live_TK.any(-1, keepdim=True), probs_TE, 0)
    return Routing(
        probs_TE, weights_TK, routing.ids, routing.offsets, routing.order, routing.inverse
    )


class RouteFunction(torch.autograd.Function):
    """d2m::route with the gradient of both softmaxes; saves x, router, probs, weights and ids."""

    @staticmethod
    def forward(ctx, x_TD, router_ED, top_k, mask_T, backend):
        outputs = torch.ops.d2m.route.default(x_TD, router_ED, top_k, mask_T, backend)
        probs_TE, weights_TK, ids_TK, offsets, order_N, inverse_N = outputs
        ctx.save_for_backward(x_TD, router_ED, mask_T, probs_TE, weights_TK, ids_TK)
        ctx.mark_non_differentiable(ids_TK, offsets, order_N, inverse_N)
        return outputs

    @staticmethod
    @in_given_dtypes
    def backward(ctx, dprobs_TE, dweights_TK, *_):
        need_x, need_router, *_ = ctx.needs_input_grad
        x_TD, *rest = ctx.saved_tensors
        grads = router_backward(
            x_TD, *rest, dprobs_TE, dweights_TK, x_TD.dtype if need_x else None, need_router
        )
        return *grads, None, None, None


def router_backward(
    x_TD, router_ED, mask_T, probs_TE, weights_TK, ids_TK, dprobs_TE, dweights_TK,
    dx_dtype, need_router,
):  # fmt: skip
    """The gradient of both softmaxes: dx in `dx_dtype`, drouter in the router's; or None."""
    dlogits_TE = softmax_backward(probs_TE, dprobs_TE)
    if ids_TK.shape[1]:
        dchosen_TK = softmax_backward(weights_TK, dweights_TK)
        if mask_T is not None:  # masked tokens have ids of -1
            dchosen_TK = torch.where(ids_TK >= 0, dchosen_TK, 0)
            ids_TK = ids_TK.clamp(min=0)
        dlogits_TE = dlogits_TE.scatter_add(1, ids_TK.long(), dchosen_TK)
    dx_TD = drouter_ED = None
    if dx_dtype is not None:
        dx_TD = _in_blocks(dlogits_TE, router_ED, dx_dtype)
    if need_router:
        if mask_T is not None:  # a padding row may hold anything, and 0 * NaN is NaN
            x_TD = x_TD.masked_fill(~mask_T[:, None], 0)
        blocks = zip(_split(dlogits_TE), _split(x_TD), strict=True)
        parts = (matmul(d.T, x) for d, x in blocks)
        drouter_ED = functools.reduce(torch.add, parts).to(router_ED.dtype)
    return dx_TD, drouter_ED


def _split(a_TX) -> tuple[torch.Tensor, ...]:
    """Blocks of rows in eager code on a CPU: what one widens stays in the cache."""
    eager = a_TX.device.type == "cpu" and not torch.compiler.is_compiling()
    return a_TX.split(BLOCK_ROWS) if eager else (a_TX,)


def _in_blocks(a_TE, b_ED, dtype) -> torch.Tensor:
    """a b, rounded to `dtype`."""
    blocks = _split(a_TE)
    if len(blocks) == 1:
        return matmul(a_TE, b_ED).to(dtype)
    out_TD = a_TE.new_empty(a_TE.shape[0], b_ED.shape[1], dtype=dtype)
    for out, a in zip(_split(out_TD), blocks, strict=True):
        out.copy_(matmul(a, b_ED))
    return out_TD


def softmax_backward(p, dp):
    """dz of p = softmax(z): p * (dp - sum(p * dp))."""
    return p * (dp - (p * dp).sum(-1, keepdim=True))


@define("route", _ROUTE)
def _route(x, router, top_k, token_mask, backend):
    return backends.module(backend).route(x, router, top_k, token_mask)


@torch.library.register_fake("d2m::route")
def _(x, router, top_k, token_mask, backend):
    return fake_routing(x, router, top_k)


def fake_routing(x, router, top_k):
    T, E = x.shape[0], router.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ids = x.new_empty(T, top_k, dtype=torch.int32)
    slots = x.new_empty(T * top_k, dtype=torch.int32)
    return (
        x.new_empty(T, E, dtype=wide),
        x.new_empty(T, top_k, dtype=wide),
        ids,
        x.new_empty(E + 1, dtype=torch.int32),
        slots,
        torch.empty_like(slots),
    )
