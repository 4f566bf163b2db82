"""The layer: what its forward and backward take, and both of them, expert by expert.

Shapes: T tokens, D model, F hidden, E experts, K top-k, N = T*K slots, S shared neurons, H = F_e
neurons of one expert.
"""

from __future__ import annotations

import torch

from d2m_kernels.activations import activate, activate_backward
from d2m_kernels.backends.reference.ops import combine, linear, spans
from d2m_kernels.contract import FFNGrads
from d2m_kernels.tensors import wide


def neurons(shared: int, num_experts: int, hidden: int):
    """The slice of neurons that each expert owns."""
    size = (hidden - shared) // num_experts
    return [slice(shared + e * size, shared + (e + 1) * size) for e in range(num_experts)]


def _pre_activation(x, up_FD, gate_FD, b_up_F, b_gate_F, own):
    """z = x w^T + b of the neurons `own`; gated: [up | gate] side by side."""
    z = linear(x, up_FD[own], None if b_up_F is None else b_up_F[own])
    if gate_FD is None:
        return z
    gate = linear(x, gate_FD[own], None if b_gate_F is None else b_gate_F[own])
    return torch.cat([z, gate], dim=-1)


def ffn_fwd(
    x_TD,
    up_FD,
    gate_FD,
    w2_DF,
    b_up_F,
    b_gate_F,
    b2_D,
    weights_TK,
    offsets,
    order_N,
    inverse_N,
    shared: int,
    activation: str,
    scale: float,
    save: bool,
):
    """Eq. 2: y = shared(x) + scale * sum_k weight * expert(x) + b2, and the pre-activations.

    Returns y [T, D], z_shared [T, S or 2S], z_routed [N, H or 2H] (in expert order, in x's dtype);
    the last two are None unless `save`.
    """
    num_experts = offsets.shape[0] - 1
    own_E = neurons(shared, num_experts, up_FD.shape[0])
    width = (own_E[0].stop - own_E[0].start) * (1 if gate_FD is None else 2)
    own_S = slice(0, shared)

    z_shared = _pre_activation(x_TD, up_FD, gate_FD, b_up_F, b_gate_F, own_S).to(x_TD.dtype)
    y_TD = linear(activate(activation, wide(z_shared)), w2_DF[:, own_S], b2_D)

    top_k = weights_TK.shape[1]
    z_routed = x_TD.new_zeros(order_N.shape[0], width)
    y_ND = wide(x_TD).new_zeros(order_N.shape[0], x_TD.shape[1])
    for e, lo, hi in spans(offsets):
        tokens = order_N[lo:hi].long() // top_k
        z = _pre_activation(x_TD[tokens], up_FD, gate_FD, b_up_F, b_gate_F, own_E[e])
        z_routed[lo:hi] = z.to(x_TD.dtype)
        y_ND[lo:hi] = linear(activate(activation, wide(z_routed[lo:hi])), w2_DF[:, own_E[e]], None)
    if top_k:
        y_TD = combine(
            y_ND, inverse_N.view(weights_TK.shape), weights_TK, offsets, y_TD, None, scale
        )
    y_TD = y_TD.to(x_TD.dtype)
    return (y_TD, z_shared, z_routed) if save else (y_TD, None, None)


def ffn_bwd(
    dy_TD,
    x_TD,
    up_FD,
    gate_FD,
    w2_DF,
    weights_TK,
    offsets,
    order_N,
    inverse_N,
    z_shared,
    z_routed,
    shared: int,
    activation: str,
    scale: float,
    frozen: int,
    grads: FFNGrads,
):
    """The gradient of `ffn_fwd`, written into `grads`; the first `frozen` neurons get zero.

    With dA' = dy W2 (unweighted) and h = act(z): dweight = scale * rowsum(dA' * h),
    dz = scale * weight * dA' * act'(z), dW2 = dy^T (scale * weight * h), dW1 = dz^T x, dx = dz W1.
    """
    num_experts = offsets.shape[0] - 1
    own_E = neurons(shared, num_experts, up_FD.shape[0])
    dy_TD, wide_x_TD = wide(dy_TD), wide(x_TD)
    out = _WideGrads(grads, wide_x_TD)

    def part(own, rows, dy, x, z, factor):
        """One expert: returns dx of its rows and the row sums that the weights' gradient needs."""
        dh = dy @ wide(w2_DF[:, own])
        h = activate(activation, z)
        dz = activate_backward(activation, z, dh * factor)
        out.add_weights(own, dy, x, h * factor, dz, gate_FD is not None)
        half = own.stop - own.start
        dx = dz[:, :half] @ wide(up_FD[own])
        if gate_FD is not None:
            dx = dx + dz[:, half:] @ wide(gate_FD[own])
        if grads.x is not None:
            out.x.index_add_(0, rows, dx)
        return (dh * h).sum(-1)

    all_rows = torch.arange(x_TD.shape[0], device=x_TD.device)
    if shared:
        one = dy_TD.new_ones(())
        part(slice(0, shared), all_rows, dy_TD, wide_x_TD, wide(z_shared), one)
    top_k = weights_TK.shape[1]
    dweights_N = wide_x_TD.new_zeros(order_N.shape[0])
    for e, lo, hi in spans(offsets):
        slots = order_N[lo:hi].long()
        rows = slots // top_k
        factor = scale * weights_TK.reshape(-1)[slots, None].to(dy_TD.dtype)
        z = wide(z_routed[lo:hi])
        dweights_N[slots] = scale * part(own_E[e], rows, dy_TD[rows], wide_x_TD[rows], z, factor)
    out.b2 = dy_TD.sum(0)
    out.weights = dweights_N.view(weights_TK.shape)
    out.write(frozen)


class _WideGrads:
    """Gradients summed in the wide dtype; `write` rounds them once into the caller's buffers."""

    def __init__(self, grads: FFNGrads, like: torch.Tensor):
        self._grads = grads
        for name, buffer in vars(grads).items():
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
        for name, buffer in vars(self._grads).items():
            if buffer is None:
                continue
            grad = getattr(self, name)
            if name in ("up", "gate", "b_up", "b_gate"):
                grad[:frozen] = 0
            elif name == "w2":
                grad[:, :frozen] = 0
            buffer.copy_(grad)
