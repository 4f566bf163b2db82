"""The layer, expert by expert: its forward (eq. 2) and its gradients.

Shapes: T tokens, D model, F hidden = S shared + E * H, E experts, K top-k, N = T*K slots.
"""

from __future__ import annotations

import torch

from d2m_kernels.activations import activate, activate_backward
from d2m_kernels.backends.reference.ops import combine, linear, spans
from d2m_kernels.contract import FFNAttrs, FFNGrads, FFNInputs
from d2m_kernels.eager import each_stream, each_stream_bwd
from d2m_kernels.tensors import wide


def neurons(s: FFNInputs, shared: int) -> list[slice]:
    """The neurons that each expert owns."""
    E, F = s.offsets.shape[0] - 1, s.w2.shape[1]
    H = (F - shared) // E
    return [slice(shared + e * H, shared + (e + 1) * H) for e in range(E)]


def _pre_activation(x, s: FFNInputs, own):
    """z = x w^T + b of the neurons `own`, rounded to x's dtype; gated: [up | gate] side by side."""
    z = linear(x, s.up[own], None if s.b_up is None else s.b_up[own])
    if s.gate is not None:
        gate = linear(x, s.gate[own], None if s.b_gate is None else s.b_gate[own])
        z = torch.cat([z, gate], dim=-1)
    return z.to(x.dtype)


@each_stream
def ffn_fwd(s: FFNInputs, attrs: FFNAttrs):
    """Eq. 2: y = shared(x) + scale * sum_k weight * expert(x) + b2, and the pre-activations.

    Returns y [T, D], z_shared [T, S or 2S], z_routed [N, H or 2H] (in expert order, in x's dtype).
    """
    own_S, own_E = slice(0, attrs.shared), neurons(s, attrs.shared)
    (T, D), K, N = s.x.shape, s.weights.shape[1], s.order.shape[0]

    def down(z, own, bias):
        return linear(activate(attrs.activation, wide(z)), s.w2[:, own], bias)

    z_shared = _pre_activation(s.x, s, own_S)
    y_TD = down(z_shared, own_S, s.b2)
    width = (own_E[0].stop - own_E[0].start) * (1 if s.gate is None else 2)
    z_routed, y_ND = s.x.new_zeros(N, width), wide(s.x).new_zeros(N, D)
    for e, lo, hi in spans(s.offsets):
        tokens = s.order[lo:hi].long() // K
        z_routed[lo:hi] = _pre_activation(s.x[tokens], s, own_E[e])
        y_ND[lo:hi] = down(z_routed[lo:hi], own_E[e], None)
    if K:
        inverse_TK = s.inverse.view(T, K)
        y_TD = combine(y_ND, inverse_TK, s.weights, s.offsets, y_TD, None, attrs.scale)
    return y_TD.to(s.x.dtype), z_shared, z_routed


@each_stream_bwd
def ffn_bwd(dy_TD, s: FFNInputs, zs, attrs: FFNAttrs, grads: FFNGrads):
    """The gradient of `ffn_fwd`, written into `grads`; the first `frozen` neurons get zero.

    With dA' = dy W2 (unweighted) and h = act(z): dweight = scale * rowsum(dA' * h),
    dz = scale * weight * dA' * act'(z), dW2 = dy^T (scale * weight * h), dW1 = dz^T x, dx = dz W1.
    """
    (z_shared, z_routed), K = zs, s.weights.shape[1]
    own_E = neurons(s, attrs.shared)
    dy_TD, x_TD = wide(dy_TD), wide(s.x)
    out = _WideGrads(grads, x_TD)

    def part(own, rows, dy, x, z, factor):
        """One expert: the row sums that the weights' gradient needs; the rest goes to `out`."""
        dh = dy @ wide(s.w2[:, own])
        h = activate(attrs.activation, z)
        dz = activate_backward(attrs.activation, z, dh * factor)
        out.add_weights(own, dy, x, h * factor, dz, s.gate is not None)
        half = own.stop - own.start
        dx = dz[:, :half] @ wide(s.up[own])
        if s.gate is not None:
            dx = dx + dz[:, half:] @ wide(s.gate[own])
        if grads.x is not None:
            out.x.index_add_(0, rows, dx)
        return (dh * h).sum(-1)

    if attrs.shared:
        all_rows, one = torch.arange(x_TD.shape[0], device=x_TD.device), dy_TD.new_ones(())
        part(slice(0, attrs.shared), all_rows, dy_TD, x_TD, wide(z_shared), one)
    dweights_N = x_TD.new_zeros(s.order.shape[0])
    for e, lo, hi in spans(s.offsets):
        slots = s.order[lo:hi].long()
        rows = slots // K
        factor = attrs.scale * s.weights.reshape(-1)[slots, None].to(dy_TD.dtype)
        sums = part(own_E[e], rows, dy_TD[rows], x_TD[rows], wide(z_routed[lo:hi]), factor)
        dweights_N[slots] = attrs.scale * sums
    out.b2 = dy_TD.sum(0)
    out.weights = dweights_N.view(s.weights.shape)
    out.write(attrs.frozen)


class _WideGrads:
    """Gradients summed in the wide dtype; `write` rounds them once into the caller's buffers."""

    def __init__(self, grads: FFNGrads, like: torch.Tensor):
        self._grads = grads
        for name, buffer in grads._asdict().items():
            zero = None if buffer is None else torch.zeros_like(buffer, dtype=like.dtype)
            setattr(self, name, zero)

    def add_weights(self, own, dy, x, h, dz, gated: bool):
        half = own.stop - own.start
        halves = [(self.up, self.b_up, dz[:, :half])]
        if gated:
            halves.append((self.gate, self.b_gate, dz[:, half:]))
        for w, b, dz_half in halves:
            if w is not None:
                w[own] += dz_half.T @ x
            if b is not None:
                b[own] += dz_half.sum(0)
        if self.w2 is not None:
            self.w2[:, own] += dy.T @ h

    def write(self, frozen: int):
        for name, buffer in self._grads._asdict().items():
            if buffer is None:
                continue
            grad = getattr(self, name)
            if name in ("up", "gate", "b_up", "b_gate"):
                grad[:frozen] = 0
            elif name == "w2":
                grad[:, :frozen] = 0
            buffer.copy_(grad)
