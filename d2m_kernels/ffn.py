"""`ffn`: the layer of one stream of tokens, or of several at once, and its ops ffn_fwd, ffn_bwd.

Shapes: B samples, T tokens, D model, F hidden = S shared + E * H, E experts, K top-k, N = T*K
slots. Pre-activations z_shared [T, S], z_routed [N, H]; gated [up | gate], twice as wide.

The ops' schemas know flat lists only, one stream after the other:

    tensors    the fields of `FFNInputs`; w1 and b1 of a gated FFN as up and gate, or stacked in up
    ends       the AdaLN gate [B, D] and the residual [T, D] of its block, or None; or empty
    zs         z_shared, z_routed
    needs      for each of `tensors`, whether its gradient is wanted

ffn_fwd returns the ys [T, D] and, to save, the zs; ffn_bwd the gradients wanted, in that order.
"""

from __future__ import annotations

import functools

import torch

from d2m_kernels import backends
from d2m_kernels.activations import is_gated
from d2m_kernels.contract import FFNAttrs, FFNGrads, FFNInputs
from d2m_kernels.eager import finish_block
from d2m_kernels.op import define
from d2m_kernels.tensors import in_given_dtypes, needs_grad, unit

PER_STREAM = len(FFNInputs._fields)
LEADING = 1 + len(FFNAttrs._fields)  # what comes before the tensors: the back-end and FFNAttrs
_SETTINGS = (
    "str backend, int shared, str activation, bool gate_first, float scale, int frozen, bool save"
)
_FFN_FWD = f"(Tensor?[] tensors, Tensor?[] ends, {_SETTINGS}) -> Tensor[]"
_FFN_BWD = f"(Tensor[] dys, Tensor?[] tensors, Tensor[] zs, bool[] needs, {_SETTINGS}) -> Tensor[]"


def ffn(tensors, ends, backend: str, attrs: FFNAttrs):
    """y [T, D] of each stream (eq. 2), or residual + gate * y, as a DiT block ends.

    The streams are equal in D, F, E, K and dtype. `ends` has None for a gate or residual that a
    stream does without; both go into the last product's epilogue where the back-end can.
    """
    given = [t for t in ends if t is not None]
    if needs_grad(*tensors):
        ys = FFNFunction.apply(backend, *attrs[:-1], True, *tensors)  # save, the last, is on
    elif given and _fuses(given, tensors[0].dtype, backend):
        return torch.ops.d2m.ffn_fwd.default(tensors, ends, backend, *attrs)
    else:
        ys = torch.ops.d2m.ffn_fwd.default(tensors, [], backend, *attrs)
    if not given:
        return ys
    return [finish_block(y, *end) for y, end in zip(ys, per_stream(ends, 2), strict=True)]


def _fuses(ends, dtype, backend) -> bool:
    """Whether gates and residuals go into the last product's epilogue."""
    same = all(t.dtype == dtype for t in ends)
    return same and not needs_grad(*ends) and backends.groups_streams(backend)


class FFNFunction(torch.autograd.Function):
    """d2m::ffn_fwd and d2m::ffn_bwd; saves the streams and their pre-activations, no more."""

    @staticmethod
    def forward(ctx, *args):
        settings, tensors = args[:LEADING], args[LEADING:]
        results = torch.ops.d2m.ffn_fwd.default(list(tensors), [], *settings)
        count = len(tensors) // PER_STREAM
        ctx.save_for_backward(*tensors, *results[count:])
        ctx.settings = settings
        return tuple(results[:count])

    @staticmethod
    @in_given_dtypes
    def backward(ctx, *dys):
        saved = ctx.saved_tensors  # once: under checkpointing each reading recomputes
        needs = list(ctx.needs_input_grad[LEADING:])
        tensors, zs = list(saved[: len(needs)]), list(saved[len(needs) :])
        dys = [unit(dy) for dy in dys]
        grads = iter(torch.ops.d2m.ffn_bwd.default(dys, tensors, zs, needs, *ctx.settings))
        return *(None,) * LEADING, *[next(grads) if need else None for need in needs]


def per_stream(flat, size: int):
    """A flat list cut into one list a stream."""
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def halves(w, gate_first: bool):
    """(up, gate) views of a stacked w1 [2F, D] or b1 [2F]."""
    if w is None:
        return None, None
    first, second = w.chunk(2, dim=0)
    return (second, first) if gate_first else (first, second)


def _cut(kind, flat, tensors, attrs: FFNAttrs):
    """`flat`, laid out as `tensors`, as the FFNInputs or FFNGrads of every stream."""
    streams, count = [], len(kind._fields)
    for i in range(0, len(flat), PER_STREAM):
        s = kind(*flat[i : i + count])
        if is_gated(attrs.activation) and FFNInputs(*tensors[i : i + PER_STREAM]).gate is None:
            (up, gate), (b_up, b_gate) = (halves(t, attrs.gate_first) for t in (s.up, s.b_up))
            s = s._replace(up=up, gate=gate, b_up=b_up, b_gate=b_gate)
        streams.append(s)
    return streams


def _join(results, save: bool):
    """(y, z_shared, z_routed) of every stream as a flat list: the ys, then what is to be saved."""
    ys = [y for y, _, _ in results]
    return ys + [z for result in results for z in result[1:]] if save else ys


@define("ffn_fwd", _FFN_FWD)
def _ffn_fwd(tensors, ends, backend, *attrs):
    attrs = FFNAttrs(*attrs)
    streams = _cut(FFNInputs, tensors, tensors, attrs)
    ends = per_stream(ends, 2) or [(None, None)] * len(streams)
    return _join(backends.module(backend).ffn_fwd(streams, attrs, ends), attrs.save)


@torch.library.register_fake("d2m::ffn_fwd")
def _(tensors, ends, backend, *attrs):
    attrs, results = FFNAttrs(*attrs), []
    width = 1 + is_gated(attrs.activation)
    for s in _cut(FFNInputs, tensors, tensors, attrs):
        H = (s.w2.shape[1] - attrs.shared) // (s.offsets.shape[0] - 1)
        y_TD = torch.empty_like(s.x, memory_format=torch.contiguous_format)
        z_shared = s.x.new_empty(s.x.shape[0], attrs.shared * width)
        results.append((y_TD, z_shared, s.x.new_empty(s.order.shape[0], H * width)))
    return _join(results, attrs.save)


@define("ffn_bwd", _FFN_BWD)
def _ffn_bwd(dys, tensors, zs, needs, backend, *attrs):
    attrs, buffers = FFNAttrs(*attrs), _buffers(tensors, needs)
    streams = _cut(FFNInputs, tensors, tensors, attrs)
    grads = _cut(FFNGrads, buffers, tensors, attrs)
    backends.module(backend).ffn_bwd(dys, streams, per_stream(zs, 2), attrs, grads)
    return [buffer for buffer in buffers if buffer is not None]


@torch.library.register_fake("d2m::ffn_bwd")
def _(dys, tensors, zs, needs, backend, *attrs):
    return [buffer for buffer in _buffers(tensors, needs) if buffer is not None]


def _buffers(tensors, needs):
    """A contiguous buffer for each gradient wanted, None for each that is not."""
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return [like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
