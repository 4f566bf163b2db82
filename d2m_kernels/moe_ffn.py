"""`moe_ffn`: a dense FFN run as a Mixture of Experts (Dense2MoE, eqs. 1-3).

Shapes: B samples, T tokens, D model, F hidden = S shared + E * H, E experts, K top-k, N = T*K
slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from d2m_kernels import backends, checks
from d2m_kernels.backends import router_backend
from d2m_kernels.contract import FFNAttrs, FFNInputs, Routing
from d2m_kernels.eager import modulate
from d2m_kernels.ffn import ffn
from d2m_kernels.modulate import modulate_route_tokens
from d2m_kernels.route import reroute, route_tokens
from d2m_kernels.tensors import autocast_dtype, tokens_of, unit, without_autocast


def moe_ffn(
    x,
    router,
    w1,
    w2,
    b1=None,
    b2=None,
    *,
    top_k=2,
    shared=0,
    activation="gelu_tanh",
    gate_first=False,
    routed_scale=1.0,
    token_mask=None,
    routing=None,
    freeze_shared=False,
    modulation=None,
    norm_eps=1e-6,
    gate=None,
    residual=None,
    backend=None,
    return_routing=False,
):
    """y = MLP_shared(x) + routed_scale * sum_{i in TopK} g_i(x) MLP_i(x) + b2 (eqs. 2-3).

    The experts are views of the dense FFN's own weights: rows of w1 and columns of w2 are
    [shared | expert 0 | ... | expert E-1], and MLP(x) = act(x w1^T + b1) w2^T (eq. 1). Gates g are
    the softmax over the selected logits. Differentiable in x, router, w1, w2, b1 and b2.

    Args:
        x: [..., D] bf16, fp16 or fp32 (fp64: reference only).
        router: [E, D] gating weights; may be fp32 beside a bf16 x. Logits are fp32, also under
            autocast. With top_k=1 the gate is 1, so the task gives the router no gradient.
        w1: [F, D]; gated: [2F, D] = [up; gate], or a pair (up, gate) of [F, D]. Any row stride.
        w2: [D, F], any row stride.
        b1, b2: [F] (gated as w1) and [D], or None. b2 is added once and never scaled.
        top_k: 0..E experts a token; "dense": every neuron with weight 1, router and routed_scale
            unused (their gradient is zero). top_k=E still weighs the experts.
        shared: S, the number of neurons every token uses.
        activation: gelu, gelu_tanh, silu, relu; gated: geglu (up * gelu(gate)), geglu_tanh, swiglu.
        gate_first: a stacked gated w1 is [gate; up] (FLUX.2) instead of [up; gate] (diffusers).
        routed_scale: factor of the routed sum.
        token_mask: [...] bool; False (padding): the shared expert only, no part in statistics.
        routing: ids and order of an earlier call to reuse, its mask with them (token_mask is not
            looked at); probs and weights are recomputed from x, so that gradients flow.
        freeze_shared: the first S neurons of w1, b1 and w2 get gradient zero, at no cost.
        modulation: (scale, shift), each [B, D], of an AdaLN in front: the layer runs on
            LayerNorm(x) * (1 + scale) + shift instead of x. B is x's first size, or 1; for x of
            [T, D] any divisor of T, the samples lying one after another.
        norm_eps: of that LayerNorm.
        gate, residual: [B, D] and shaped as x: the result is residual + gate * y, as a DiT block
            ends. Fused where no gradient is wanted and the back-end can.
        backend: None (the best available), or "triton", "cuda", "cpu", "torch", "reference".
        return_routing: also return the `Routing`.

    Returns:
        [..., D] in x's dtype, or autocast's; a gate or residual of a wider dtype widens it, as in
        torch. With return_routing a pair (y, Routing).

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is wrong.
        RuntimeError: the requested back-end cannot serve this device or dtype.
    """
    call = prepare(
        x, router, w1, w2, b1, b2, top_k, shared, activation, gate_first, routed_scale, token_mask,
        routing, freeze_shared, modulation, norm_eps, gate, residual, backend, return_routing,
    )  # fmt: skip
    y = run(call)[0].view_as(x)
    return (y, call.routing) if return_routing else y


class Call(NamedTuple):
    """A checked and routed call of `moe_ffn`."""

    stream: FFNInputs
    end: tuple[torch.Tensor | None, torch.Tensor | None]  # gate [B, D], residual [T, D]
    backend: str
    attrs: FFNAttrs
    routing: Routing | None


def prepare(
    x, router, w1, w2, b1, b2, top_k, shared, activation, gate_first, routed_scale, token_mask,
    routing, freeze_shared, modulation, norm_eps, gate, residual, backend, return_routing,
) -> Call:  # fmt: skip
    """Checks the arguments of `moe_ffn` and routes."""
    checks.input_and_router(x, router)
    device = x.device.type
    autocast = None if x.dtype == torch.float64 else autocast_dtype(device)
    dtype = autocast or x.dtype
    k = checks.top_k(top_k, router.shape[0])
    checks.weights(x, router, w1, w2, b1, b2, k, shared, activation, None if autocast else dtype)
    checks.mask(token_mask, x)
    if modulation is not None:
        checks.modulation(x, modulation)
    if gate is not None:
        checks.per_sample("gate", gate, x)
    if residual is not None:
        checks.shape("residual", residual, tuple(x.shape), "x.shape")
        checks.same_device("residual", residual, x)
        residual = tokens_of(residual)
    if not isinstance(routed_scale, (int, float)) or isinstance(routed_scale, bool):
        raise TypeError(f"routed_scale: expected a float, got {type(routed_scale).__name__}")
    name = backends.resolve(backend, device, dtype)
    x_TD = tokens_of(x)
    T, E = x_TD.shape[0], router.shape[0]
    if routing is not None:
        checks.routing(routing, T, E, k, x)

    w1, w1_gate = w1 if isinstance(w1, (tuple, list)) else (w1, None)
    b1, b1_gate = b1 if isinstance(b1, (tuple, list)) else (b1, None)
    with without_autocast(device):
        if modulation is not None and routing is None and k:
            x_TD, *fields = modulate_route_tokens(
                x_TD, *modulation, norm_eps, router, k, _flat(token_mask),
                router_backend(x_TD, router, name),
            )  # fmt: skip
            routing = Routing(*fields)
        else:
            if modulation is not None:
                x_TD = modulate(x_TD, *modulation, norm_eps)
            if k or return_routing:
                routing = _route(x_TD, router, k, token_mask, routing, name)
        tensors = (x_TD, w1, w1_gate, w2, unit(b1), unit(b1_gate), unit(b2))
        if autocast:
            tensors = tuple(t if t is None else t.to(dtype) for t in tensors)
        if k:
            slots = (routing.weights, routing.offsets, routing.order, routing.inverse)
        else:
            slots = _no_slots(x_TD, router)
    always = w2.shape[1] if top_k == "dense" else shared
    frozen = shared if freeze_shared else 0
    attrs = FFNAttrs(always, activation, gate_first, float(routed_scale), frozen)
    return Call(FFNInputs(*tensors, *slots), (unit(gate), residual), name, attrs, routing)


def run(*calls: Call):
    """y [T, D] of one prepared call, or of several that may share launches."""
    tensors = [t for call in calls for t in call.stream]
    ends = [t for call in calls for t in call.end]
    with without_autocast(tensors[0].device.type):
        return ffn(tensors, ends, calls[0].backend, calls[0].attrs)


def _flat(token_mask):
    return None if token_mask is None else token_mask.reshape(-1)


def _route(x_TD, router, k, token_mask, routing, name) -> Routing:
    if routing is not None:
        return reroute(x_TD, router, routing)
    backend = router_backend(x_TD, router, name)
    return Routing(*route_tokens(x_TD, router, k, _flat(token_mask), backend))


def _no_slots(x_TD, router):
    """Weights [T, 0] tied to the router, so that its gradient is zero and not None; no slots."""
    weights = x_TD.new_empty(x_TD.shape[0], 0, dtype=torch.float32) + router.reshape(-1)[:0].float()
    offsets = torch.zeros(router.shape[0] + 1, dtype=torch.int32, device=x_TD.device)
    # Two tensors: Dynamo refuses an autograd.Function that is given the same one twice.
    order, inverse = (torch.empty(0, dtype=torch.int32, device=x_TD.device) for _ in range(2))
    return weights, offsets, order, inverse
