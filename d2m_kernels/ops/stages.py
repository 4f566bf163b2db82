"""The stages' ops: route, permute, grouped GEMM, combine."""

import torch

from d2m_kernels import backends
from d2m_kernels.ops.define import define, gradient_buffers
from d2m_kernels.reference import modulate

_ROUTE = (
    "(Tensor x, Tensor router, int top_k, Tensor? token_mask, str backend)"
    " -> (Tensor probs, Tensor weights, Tensor ids, Tensor offsets, Tensor order, Tensor inverse)"
)
_MODULATE_ROUTE = (
    "(Tensor x, Tensor scale, Tensor shift, float eps, Tensor router, int top_k,"
    " Tensor? token_mask, str backend) -> (Tensor modulated, Tensor probs, Tensor weights,"
    " Tensor ids, Tensor offsets, Tensor order, Tensor inverse)"
)
_PERMUTE = (
    "(Tensor ids, int num_experts, str backend) -> (Tensor offsets, Tensor order, Tensor inverse)"
)
_GROUPED_GEMM = (
    "(Tensor x, Tensor w, Tensor offsets, Tensor? w_gate, Tensor? gather, Tensor? bias,"
    " Tensor? bias_gate, str? activation, str backend) -> Tensor"
)
_GROUPED_GEMM_BWD = (
    "(Tensor dout, Tensor x, Tensor w, Tensor offsets, Tensor? w_gate, Tensor? gather,"
    " Tensor? bias, Tensor? bias_gate, str? activation, bool[] needs, str backend)"
    " -> (Tensor dx, Tensor dw, Tensor dw_gate, Tensor dbias, Tensor dbias_gate)"
)
_COMBINE = (
    "(Tensor y, Tensor inverse, Tensor? weights, Tensor offsets, Tensor? base, Tensor? bias,"
    " float scale, str backend) -> Tensor"
)


# ------------------------------------------------------------------------------- route, permute


@define("route", _ROUTE)
def _route(x, router, top_k, token_mask, backend):
    return backends.module(backend).route(x, router, top_k, token_mask)


@torch.library.register_fake("d2m::route")
def _(x, router, top_k, token_mask, backend):
    return _fake_routing(x, router, top_k)


def _fake_routing(x, router, top_k):
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
    return modulated, *_fake_routing(x, router, top_k)


@define("permute", _PERMUTE)
def _permute(ids, num_experts, backend):
    return backends.module(backend).permute(ids, num_experts)


@torch.library.register_fake("d2m::permute")
def _(ids, num_experts, backend):
    slots = ids.new_empty(ids.numel(), dtype=torch.int32)
    return ids.new_empty(num_experts + 1, dtype=torch.int32), slots, torch.empty_like(slots)


# ------------------------------------------------------------------------- grouped GEMM, combine


@define("grouped_gemm", _GROUPED_GEMM)
def _grouped_gemm(x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend):
    return backends.module(backend).grouped_gemm(
        x, w, offsets, w_gate, gather, bias, bias_gate, activation
    )


@torch.library.register_fake("d2m::grouped_gemm")
def _(x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend):
    rows = x.shape[0] if gather is None else gather.shape[0]
    return x.new_empty(rows, w.shape[1])


@define("grouped_gemm_bwd", _GROUPED_GEMM_BWD)
def _grouped_gemm_bwd(
    dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs, backend
):
    gradients = backends.module(backend).grouped_gemm_bwd(
        dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs
    )
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@torch.library.register_fake("d2m::grouped_gemm_bwd")
def _(dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs, backend):
    return gradient_buffers((x, w, w_gate, bias, bias_gate), needs)


@define("combine", _COMBINE)
def _combine(y, inverse, weights, offsets, base, bias, scale, backend):
    return backends.module(backend).combine(y, inverse, weights, offsets, base, bias, scale)


@torch.library.register_fake("d2m::combine")
def _(y, inverse, weights, offsets, base, bias, scale, backend):
    return y.new_empty(inverse.shape[0], y.shape[1])
