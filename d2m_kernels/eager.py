"""What the layer does outside of its kernels, for back-ends whose kernels do not take it along.

Shapes: B samples, T tokens (T / B of each sample), S tokens of a sample, D model.
"""

import functools

import torch

from d2m_kernels.tensors import wide


def modulate(x_TD, scale_BD, shift_BD, eps: float):
    """AdaLN: LayerNorm(x) * (1 + scale) + shift of a token's sample; T / B tokens are a sample's.

    LayerNorm(x) = (x - mean) / sqrt(var + eps), without weights; rounded once, to x's dtype.
    """
    (T, D), B = x_TD.shape, scale_BD.shape[0]
    x_BSD = wide(x_TD).reshape(B, T // max(B, 1), D)
    normed = torch.nn.functional.layer_norm(x_BSD, (D,), eps=eps)
    out = normed * (1 + wide(scale_BD)[:, None]) + wide(shift_BD)[:, None]
    return out.view(T, D).to(x_TD.dtype)


def finish_block(y_TD, gate_BD=None, residual_TD=None):
    """residual + gate * y, the gate of a token's sample; without either it is left out."""
    (T, D) = y_TD.shape
    if gate_BD is not None:
        B = gate_BD.shape[0]
        y_TD = (gate_BD[:, None] * y_TD.view(B, T // max(B, 1), D)).view(T, D)
    return y_TD if residual_TD is None else residual_TD + y_TD


def each_stream(ffn_fwd):
    """A back-end's `ffn_fwd` of streams from that of one: (stream, attrs) -> y and both z."""

    @functools.wraps(ffn_fwd)
    def run(streams, attrs, ends, **options):
        results = [ffn_fwd(stream, attrs, **options) for stream in streams]
        return [(finish_block(y, *end), *zs) for (y, *zs), end in zip(results, ends, strict=True)]

    return run


def each_stream_bwd(ffn_bwd):
    """A back-end's `ffn_bwd` of streams from that of one: (dy, stream, both z, attrs, grads)."""

    @functools.wraps(ffn_bwd)
    def run(dys, streams, zs, attrs, grads, **options):
        for dy_TD, stream, both, buffers in zip(dys, streams, zs, grads, strict=True):
            ffn_bwd(dy_TD, stream, both, attrs, buffers, **options)

    return run
