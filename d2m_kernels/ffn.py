"""The layer's ops, for one stream of tokens and for two."""

from __future__ import annotations

import torch

from d2m_kernels import backends
from d2m_kernels.activations import is_gated
from d2m_kernels.contract import FFNGrads, FFNInputs
from d2m_kernels.eager import finish_block
from d2m_kernels.op import define, gradient_buffers
from d2m_kernels.tensors import unit

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


def halves(w, w_gate, activation: str, gate_first: bool):
    """(up, gate) views of a stacked [2F, ..] tensor, of a pair, or (w, None) when not gated."""
    if w is None or not is_gated(activation):
        return w, None
    if w_gate is not None:
        return w, w_gate
    first, second = w.chunk(2, dim=0)
    return (second, first) if gate_first else (first, second)


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


@define("ffn_fwd", _FFN_FWD)
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


@define("ffn_bwd", _FFN_BWD)
def _ffn_bwd(
    dy, x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse, z_shared, z_routed,
    shared, activation, gate_first, scale, frozen, needs, backend,
):  # fmt: skip
    buffers = gradient_buffers((x, w1, w1_gate, w2, b1, b1_gate, b2, weights), needs)
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
    return gradient_buffers((x, w1, w1_gate, w2, b1, b1_gate, b2, weights), needs)


# -------------------------------------------------------------------------- two streams of tokens

PER_STREAM = 11  # tensors of one stream: x, w1, w1_gate, w2, b1, b1_gate, b2, the routing's four
LEARNED = 8  # of which the first eight (with the routing's weights) have a gradient


def per_stream(flat, size):
    """A flat list cut into one list a stream."""
    return [flat[i : i + size] for i in range(0, len(flat), size)]


@define("ffn_streams_fwd", _FFN_STREAMS_FWD)
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


@define("ffn_streams_bwd", _FFN_STREAMS_BWD)
def _ffn_streams_bwd(
    dys, inputs, saved, shared, activation, gate_first, scale, frozen, needs, backend
):
    module = backends.module(backend)
    tensors, needs = per_stream(inputs, PER_STREAM), per_stream(needs, LEARNED)
    streams = [_ffn_inputs(t, activation, gate_first) for t in tensors]
    buffers = [gradient_buffers(t[:LEARNED], n) for t, n in zip(tensors, needs, strict=True)]
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
    return [t for tensors, n in pairs for t in gradient_buffers(tensors[:LEARNED], n)]


class FFNFunction(torch.autograd.Function):
    """d2m::ffn_fwd and d2m::ffn_bwd; saves x, the pre-activations and the routing, no more."""

    @staticmethod
    def forward(
        ctx, x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse,
        shared, activation, gate_first, scale, frozen, backend,
    ):  # fmt: skip
        save = any(ctx.needs_input_grad)
        y, z_shared, z_routed = torch.ops.d2m.ffn_fwd.default(
            x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse,
            shared, activation, gate_first, scale, save, backend,
        )  # fmt: skip
        if save:
            ctx.save_for_backward(
                x, w1, w1_gate, w2, b1, b1_gate, b2, weights, offsets, order, inverse,
                z_shared, z_routed,
            )  # fmt: skip
            ctx.attrs = (shared, activation, gate_first, scale, frozen)
            ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:8])
        grads = torch.ops.d2m.ffn_bwd.default(
            unit(dy), *ctx.saved_tensors, *ctx.attrs, needs, ctx.backend
        )
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return *grads, *(None,) * 9


class FFNStreamsFunction(torch.autograd.Function):
    """d2m::ffn_streams_fwd and _bwd; saves what `FFNFunction` saves, for each stream."""

    @staticmethod
    def forward(ctx, shared, activation, gate_first, scale, frozen, backend, *tensors):
        save = any(ctx.needs_input_grad)
        results = torch.ops.d2m.ffn_streams_fwd.default(
            list(tensors), [], shared, activation, gate_first, scale, save, backend
        )
        if save:
            z = [t for _, *z in per_stream(results, 3) for t in z]
            ctx.save_for_backward(*tensors, *z)
            ctx.attrs = (shared, activation, gate_first, scale, frozen)
            ctx.backend = backend
        return tuple(results[::3])

    @staticmethod
    def backward(ctx, *dys):
        count = len(dys) * PER_STREAM
        saved = ctx.saved_tensors  # once: under checkpointing each reading recomputes
        tensors, z = saved[:count], saved[count:]
        wanted = per_stream(ctx.needs_input_grad[6:], PER_STREAM)
        needs = [n for stream in wanted for n in stream[:LEARNED]]
        grads = torch.ops.d2m.ffn_streams_bwd.default(
            [unit(dy) for dy in dys], list(tensors), list(z), *ctx.attrs, needs, ctx.backend
        )
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        none = [None] * (PER_STREAM - LEARNED)
        return *(None,) * 6, *(g for s in per_stream(grads, LEARNED) for g in (*s, *none))
