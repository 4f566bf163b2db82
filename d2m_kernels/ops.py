"""The torch.library ops `d2m::*`: one opaque call a stage, so that `torch.compile` sees no graph
break and no back-end's host code. Inputs are validated by the public wrappers, not here.

Each op takes the name of the back-end that was resolved for it; autograd lives outside, in
`torch.autograd.Function`s (measured: 2.9 us a call against 9.3 us for `torch.library.custom_op`).
"""

import functools

import torch

from d2m_kernels import backends
from d2m_kernels.activations import is_gated
from d2m_kernels.reference import FFNGrads, FFNInputs, finish_block, modulate

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
_FFN = "Tensor x, Tensor w1, Tensor? w1_gate, Tensor w2"
_FFN_ATTRS = "int shared, str activation, bool gate_first, float scale"
_FFN_FWD = (
    f"({_FFN}, Tensor? b1, Tensor? b1_gate, Tensor? b2, Tensor weights, Tensor offsets,"
    f" Tensor order, Tensor inverse, {_FFN_ATTRS}, bool save, str backend)"
    " -> (Tensor y, Tensor z_shared, Tensor z_routed)"
)
_FFN_BWD = (
    f"(Tensor dy, {_FFN}, Tensor? b1, Tensor? b1_gate, Tensor? b2, Tensor weights,"
    " Tensor offsets, Tensor order, Tensor inverse, Tensor z_shared, Tensor z_routed,"
    f" {_FFN_ATTRS}, int frozen, bool[] needs, str backend)"
    " -> (Tensor dx, Tensor dw1, Tensor dw1_gate, Tensor dw2, Tensor db1, Tensor db1_gate,"
    " Tensor db2, Tensor dweights)"
)
# Two streams: the eleven tensors of each (x .. inverse) in one list, results in one list.
# `ends` is empty, or holds each stream's AdaLN gate [B, D] and residual [T, D].
_FFN_STREAMS_FWD = (
    f"(Tensor?[] inputs, Tensor?[] ends, {_FFN_ATTRS}, bool save, str backend) -> Tensor[]"
)
_FFN_STREAMS_BWD = (
    f"(Tensor[] dys, Tensor?[] inputs, Tensor[] saved, {_FFN_ATTRS}, int frozen, bool[] needs,"
    " str backend) -> Tensor[]"
)


def _define(name, schema):
    """Defines d2m::name; the decorated function is its implementation on every device."""
    torch.library.define(f"d2m::{name}", schema)

    def register(function):
        torch.library.impl(f"d2m::{name}", "default")(_below_autograd(_on_its_device(function)))
        return function

    return register


def _on_its_device(function):
    """Triton launches on the current device, whatever its arguments are on: make it theirs."""

    @functools.wraps(function)
    def run(*args):
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(*args)
        return function(*args)

    return run


def _below_autograd(function):
    """An op called bare, outside of the `autograd.Function`s, records none of its inner steps."""

    @functools.wraps(function)
    def run(*args):
        if not torch.is_grad_enabled():  # as in every autograd.Function
            return function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return function(*args)

    return run


def halves(w, w_gate, activation: str, gate_first: bool):
    """(up, gate) views of a stacked [2F, ..] tensor, of a pair, or (w, None) when not gated."""
    if w is None or not is_gated(activation):
        return w, None
    if w_gate is not None:
        return w, w_gate
    first, second = w.chunk(2, dim=0)
    return (second, first) if gate_first else (first, second)


def _gradient_buffers(inputs, needs):
    """One new contiguous buffer for each gradient wanted, an empty tensor for each that is not."""
    like = inputs[0]
    return tuple(
        t.new_empty(t.shape) if need else like.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


# ------------------------------------------------------------------------------- route, permute


@_define("route", _ROUTE)
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


@_define("modulate_route", _MODULATE_ROUTE)
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


@_define("permute", _PERMUTE)
def _permute(ids, num_experts, backend):
    return backends.module(backend).permute(ids, num_experts)


@torch.library.register_fake("d2m::permute")
def _(ids, num_experts, backend):
    slots = ids.new_empty(ids.numel(), dtype=torch.int32)
    return ids.new_empty(num_experts + 1, dtype=torch.int32), slots, torch.empty_like(slots)


# ------------------------------------------------------------------------- grouped GEMM, combine


@_define("grouped_gemm", _GROUPED_GEMM)
def _grouped_gemm(x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend):
    return backends.module(backend).grouped_gemm(
        x, w, offsets, w_gate, gather, bias, bias_gate, activation
    )


@torch.library.register_fake("d2m::grouped_gemm")
def _(x, w, offsets, w_gate, gather, bias, bias_gate, activation, backend):
    rows = x.shape[0] if gather is None else gather.shape[0]
    return x.new_empty(rows, w.shape[1])


@_define("grouped_gemm_bwd", _GROUPED_GEMM_BWD)
def _grouped_gemm_bwd(
    dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs, backend
):
    gradients = backends.module(backend).grouped_gemm_bwd(
        dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs
    )
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


@torch.library.register_fake("d2m::grouped_gemm_bwd")
def _(dout, x, w, offsets, w_gate, gather, bias, bias_gate, activation, needs, backend):
    return _gradient_buffers((x, w, w_gate, bias, bias_gate), needs)


@_define("combine", _COMBINE)
def _combine(y, inverse, weights, offsets, base, bias, scale, backend):
    return backends.module(backend).combine(y, inverse, weights, offsets, base, bias, scale)


@torch.library.register_fake("d2m::combine")
def _(y, inverse, weights, offsets, base, bias, scale, backend):
    return y.new_empty(inverse.shape[0], y.shape[1])


# ------------------------------------------------------------------------------------ the layer


def _ffn_inputs(inputs, activation, gate_first) -> FFNInputs:
    """x .. inverse as the ops take them -> as the back-ends do."""
    x, w1, w1_gate, w2, b1, b1_gate, b2, *slots = inputs
    up, gate = halves(w1, w1_gate, activation, gate_first)
    b_up, b_gate = halves(b1, b1_gate, activation, gate_first)
    return FFNInputs(x, up, gate, w2, b_up, b_gate, b2, *slots)


def _ffn_grads(buffers, needs, activation, gate_first) -> FFNGrads:
    dx, dw1, dw1_gate, dw2, db1, db1_gate, db2, dweights = (
        buffer if need else None for buffer, need in zip(buffers, needs, strict=True)
    )
    d_up, d_gate = halves(dw1, dw1_gate, activation, gate_first)
    db_up, db_gate = halves(db1, db1_gate, activation, gate_first)
    return FFNGrads(dx, d_up, d_gate, dw2, db_up, db_gate, db2, dweights)


def _pre_activations(x, w2, offsets, order, shared, activation):
    """Empty z_shared and z_routed."""
    width = 2 if is_gated(activation) else 1
    expert = (w2.shape[1] - shared) // (offsets.shape[0] - 1)
    z_shared = x.new_empty(x.shape[0], shared * width)
    return z_shared, x.new_empty(order.shape[0], expert * width)


@_define("ffn_fwd", _FFN_FWD)
def _ffn_fwd(
    x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse,
    shared, activation, gate_first, scale, save, backend,
):  # fmt: skip
    tensors = (x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse)
    y, z_shared, z_routed = backends.module(backend).ffn_fwd(
        *_ffn_inputs(tensors, activation, gate_first), shared, activation, scale, save
    )
    if not save:
        z_shared, z_routed = x.new_empty(0), x.new_empty(0)
    return y, z_shared, z_routed


@torch.library.register_fake("d2m::ffn_fwd")
def _(
    x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse,
    shared, activation, gate_first, scale, save, backend,
):  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return y, x.new_empty(0), x.new_empty(0)
    return y, *_pre_activations(x, w2, offsets, order, shared, activation)


@_define("ffn_bwd", _FFN_BWD)
def _ffn_bwd(
    dy, x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse, z_shared, z_routed,
    shared, activation, gate_first, scale, frozen, needs, backend,
):  # fmt: skip
    buffers = _gradient_buffers((x, w1, w1_gate, w2, b1, b1_gate, b2, weights), needs)
    up, gate = halves(w1, w1_gate, activation, gate_first)
    backends.module(backend).ffn_bwd(
        dy, x, up, gate, w2, weights, offsets, order, inverse, z_shared, z_routed,
        shared, activation, scale, frozen, _ffn_grads(buffers, needs, activation, gate_first),
    )  # fmt: skip
    return buffers


@torch.library.register_fake("d2m::ffn_bwd")
def _(
    dy, x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse, z_shared, z_routed,
    shared, activation, gate_first, scale, frozen, needs, backend,
):  # fmt: skip
    return _gradient_buffers((x, w1, w1_gate, w2, b1, b1_gate, b2, weights), needs)


# -------------------------------------------------------------------------- two streams of tokens

PER_STREAM = 11  # tensors of one stream: x, w1, w1_gate, w2, b1, b1_gate, b2, the routing's four
LEARNED = 8  # of which the first eight (with the routing's weights) have a gradient


def per_stream(flat, size):
    """A flat list cut into one list a stream."""
    return [flat[i : i + size] for i in range(0, len(flat), size)]


@_define("ffn_streams_fwd", _FFN_STREAMS_FWD)
def _ffn_streams_fwd(inputs, ends, shared, activation, gate_first, scale, save, backend):
    module = backends.module(backend)
    streams = [_ffn_inputs(t, activation, gate_first) for t in per_stream(inputs, PER_STREAM)]
    attrs = (shared, activation, scale, save)
    if backends.groups_streams(backend):
        results = module.ffn_streams_fwd(streams, *attrs, per_stream(ends, 2))
    else:
        results = [module.ffn_fwd(*s, *attrs) for s in streams]
        for i, (gate, residual) in enumerate(per_stream(ends, 2)):
            results[i] = (finish_block(results[i][0], gate, residual), *results[i][1:])
    empty = streams[0].x.new_empty
    return [empty(0) if t is None else t for result in results for t in result]


@torch.library.register_fake("d2m::ffn_streams_fwd")
def _(inputs, ends, shared, activation, gate_first, scale, save, backend):
    results = []
    for x, _, _, w2, _, _, _, _, offsets, order, _ in per_stream(inputs, PER_STREAM):
        results.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        if save:
            results += _pre_activations(x, w2, offsets, order, shared, activation)
        else:
            results += [x.new_empty(0), x.new_empty(0)]
    return results


@_define("ffn_streams_bwd", _FFN_STREAMS_BWD)
def _ffn_streams_bwd(
    dys, inputs, saved, shared, activation, gate_first, scale, frozen, needs, backend
):
    module = backends.module(backend)
    tensors, needs = per_stream(inputs, PER_STREAM), per_stream(needs, LEARNED)
    streams = [_ffn_inputs(t, activation, gate_first) for t in tensors]
    buffers = [_gradient_buffers(t[:LEARNED], n) for t, n in zip(tensors, needs, strict=True)]
    grads = [_ffn_grads(b, n, activation, gate_first) for b, n in zip(buffers, needs, strict=True)]
    zs, attrs = per_stream(saved, 2), (shared, activation, scale, frozen)
    if backends.groups_streams(backend):
        module.ffn_streams_bwd(dys, streams, zs, *attrs, grads)
    else:
        for dy, s, z, g in zip(dys, streams, zs, grads, strict=True):
            slots = (s.weights, s.offsets, s.order, s.inverse)
            module.ffn_bwd(dy, s.x, s.up, s.gate, s.w2, *slots, *z, *attrs, g)
    return [t for b in buffers for t in b]


@torch.library.register_fake("d2m::ffn_streams_bwd")
def _(dys, inputs, saved, shared, activation, gate_first, scale, frozen, needs, backend):
    pairs = zip(per_stream(inputs, PER_STREAM), per_stream(needs, LEARNED), strict=True)
    return [t for tensors, n in pairs for t in _gradient_buffers(tensors[:LEARNED], n)]
