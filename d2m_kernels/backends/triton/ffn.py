"""The layer's forward in three launches: up (all experts), down routed, down shared + combine;
its backward: dz and the weighted activation, dx as the forward's mirror, the weights' sums.

Shapes: T tokens, D model, F hidden = S + E*H, S shared neurons, H neurons of an expert, E experts,
K top-k, N = T*K slots. Routed activations live in expert order [N, H]; x itself is never permuted.
Two streams of tokens with weights of their own (a double block's image and text) take the same
three launches.
"""

import torch
import triton

from d2m_kernels.backends.triton.act_bwd import activations
from d2m_kernels.backends.triton.combine import combine_into
from d2m_kernels.backends.triton.configs import LEAST_BLOCK_N
from d2m_kernels.backends.triton.down import Shared, down_shared
from d2m_kernels.backends.triton.grouped_gemm import Operands, grouped_matmul
from d2m_kernels.backends.triton.launch import tickets
from d2m_kernels.backends.triton.operands import Saved, neuron_columns, neuron_rows, rows_of
from d2m_kernels.backends.triton.plans import planned
from d2m_kernels.backends.triton.weight_grads import bias_grad, sums, weight_grad
from d2m_kernels.contract import FFNAttrs, FFNInputs
from d2m_kernels.eager import finish_block


def ffn_fwd(streams, attrs: FFNAttrs, ends):
    """Eq. 2: y = shared(x) + scale * sum_k weight * expert(x) + b2, and the pre-activations.

    Of one or two FFNInputs of equal D, F, E, K and dtype. With an AdaLN gate [B, D] and a residual
    [T, D] of its block in `ends`, a stream's y is residual + gate * y.

    Returns (y [T, D], z_shared [T, S or 2S], z_routed [N, H or 2H]) of each stream; the last two
    None unless `save`.
    """
    if not attrs.shared:
        return _ffn_fwd(streams, attrs, ends)
    tensors = [t for given in (*streams, *ends) for t in given]
    return planned(lambda: _ffn_fwd(streams, attrs, ends), tensors, attrs)


def _ffn_fwd(streams, attrs: FFNAttrs, ends):
    shared, activation, scale, save = attrs.shared, attrs.activation, attrs.scale, attrs.save
    first = streams[0]
    D, K, gated = first.x.shape[1], first.weights.shape[1], first.gate is not None
    H = (first.up.shape[0] - shared) // (first.offsets.shape[0] - 1)
    ups, downs, lasts, saved = [], [], [], []
    for s, (adaln, residual) in zip(streams, ends, strict=True):
        new, T, N = s.x.new_empty, s.x.shape[0], s.order.shape[0]
        h_shared, h_routed = new(T, shared), new(N, H)
        z_shared = new(T, shared * (1 + gated)) if save else None
        z_routed = new(N, H * (1 + gated)) if save else None
        up = Operands(
            s.x, s.offsets, neuron_rows(s.up, shared, H), h_routed,
            neuron_rows(s.gate, shared, H) if gated else None, s.order, s.b_up, s.b_gate, z_routed,
        )  # fmt: skip
        if shared:
            up.out_shared, up.z_shared = h_shared, z_shared
        ups.append(up)
        saved.append((z_shared, z_routed))
        w2 = neuron_columns(s.w2, shared, H)
        y2_ND = new(N, D) if N and H else None
        if y2_ND is not None:
            downs.append(Operands(h_routed, s.offsets, w2, y2_ND))
        y_TD = torch.empty_like(s.x, memory_format=torch.contiguous_format)
        lasts.append(
            Shared(h_shared, w2, y_TD, s.offsets, y2_ND, s.inverse.view(T, K), s.weights, s.b2,
                   adaln_BD=adaln, residual_TD=residual)
        )  # fmt: skip
    stage = "up_gated" if gated else "up"
    counters, div = tickets(first.x.device, 3), max(K, 1)
    grouped_matmul(stage, ups, next(counters), N=H, K=D, gather_div=div, activation=activation)
    grouped_matmul("down", downs, next(counters), N=D, K=H)
    finish("down_combine", lasts, next(counters), shared, scale=scale)
    return [(last.out, *z) for last, z in zip(lasts, saved, strict=True)]


def finish(stage, ends: list[Shared], ticket, shared: int, *, scale=1.0, trans=False):
    """out = h_shared W + bias + the routed rows: in the shared GEMM's epilogue if there is one."""
    if shared:
        down_shared(stage, ends, ticket, S=shared, scale=scale, trans=trans)
        return
    for s in ends:
        if s.y2 is not None:
            combine_into(s.out, s.y2, s.inverse_TK, s.weights_TK, s.offsets, None, s.bias, scale)
        elif s.bias is None:
            s.out.zero_()
        else:
            s.out.copy_(s.bias.expand_as(s.out))
        if s.adaln_BD is not None or s.residual_TD is not None:
            s.out.copy_(finish_block(s.out, s.adaln_BD, s.residual_TD))


def ffn_bwd(dys, streams, zs, attrs: FFNAttrs, grads) -> None:
    """The gradient of `ffn_fwd`, written into `grads`; the first `frozen` neurons get zero.

    dA' = dy W2, dz = factor * dA' * act'(z), dW2 = dy^T (factor * h), dW1 = dz^T x, dx = dz W1.
    """
    shared, activation, scale, frozen = attrs.shared, attrs.activation, attrs.scale, attrs.frozen
    K, gated = streams[0].weights.shape[1], streams[0].gate is not None
    H = (streams[0].up.shape[0] - shared) // (streams[0].offsets.shape[0] - 1)
    parts = [
        _buffers(dy, s, *z, shared, H, gated, frozen, g)
        for dy, s, z, g in zip(dys, streams, zs, grads, strict=True)
    ]
    counters = tickets(streams[0].x.device, 5 + gated)
    activations(
        [p for p, s in zip(parts, streams, strict=True) if _wanted(p, s, H)], next(counters),
        shared=shared, shared_h_width=shared if shared > frozen else 0, H=H, activation=activation,
        gated=gated, scale=scale,
    )  # fmt: skip
    all_of = list(zip(parts, streams, grads, strict=True))
    for p, s, g in all_of:
        if g.weights is not None:
            sums_NP = p.partial.view(*s.weights.shape, p.partial.shape[1])
            torch.sum(sums_NP, -1, out=g.weights)
    _inputs([t for t in all_of if t[2].x is not None], counters, shared, H, gated)
    _weights(all_of, counters, shared, H, gated, frozen, K)
    for dy, g in zip(dys, grads, strict=True):
        if g.b2 is not None:
            g.b2.copy_(dy.sum(0, dtype=torch.float32))


def _buffers(dy, s: FFNInputs, z_shared, z_routed, shared, H, gated, frozen, grads) -> Saved:
    """What the first launch reads and writes for the gradients wanted of one stream."""
    (T, D), N = s.x.shape, s.order.shape[0]
    need_w1 = any(g is not None for g in (grads.up, grads.gate, grads.b_up, grads.b_gate))
    need_dz, need_h = grads.x is not None or need_w1, grads.w2 is not None
    learned = shared > frozen and (need_w1 or need_h)
    with_shared = shared > 0 and (grads.x is not None or learned)
    new = s.x.new_empty
    partial = None
    if grads.weights is not None:
        tiles = triton.cdiv(H, LEAST_BLOCK_N)
        partial = new(N, tiles, dtype=torch.float32).zero_()  # masked slots stay zero
    dy = dy if dy.stride(-1) == 1 or D == 1 else dy.contiguous()
    return Saved(
        *rows_of(dy), s.order, s.offsets, s.weights, *rows_of(s.w2), z_routed,
        z_shared if with_shared else None, dz=new(z_routed.shape) if need_dz else None,
        dz_shared=new(z_shared.shape) if need_dz and with_shared else None,
        h=new(N, H) if need_h else None,
        h_shared=new(T, shared) if need_h and shared > frozen else None,
        partial=partial, stride_ps=0 if partial is None else partial.stride(0),
    )  # fmt: skip


def _wanted(p: Saved, s: FFNInputs, H: int) -> bool:
    anything = p.dz is not None or p.h is not None or p.partial is not None
    return anything and s.x.shape[0] > 0 and (p.z_shared is not None or s.order.shape[0] * H > 0)


def _inputs(wanted, counters, shared, H, gated):
    """dx = dz W1: routed rows in expert order, then the shared expert's launch adds them up."""
    routed, ends = [], []
    for p, s, g in wanted:
        (T, D), N = s.x.shape, s.order.shape[0]
        up, gate = neuron_rows(s.up, shared, H), neuron_rows(s.gate, shared, H) if gated else None
        dx_ND = s.x.new_empty(N, D) if N and H else None
        if dx_ND is not None:
            routed.append(Operands(p.dz, s.offsets, up, dx_ND, gate))
        dz = p.dz_shared if shared else s.x.new_empty(T, 0)
        inverse_TK = s.inverse.view(s.weights.shape)
        ends.append(Shared(dz, up, g.x, s.offsets, dx_ND, inverse_TK, gate=gate))
    if not ends:
        return
    D = ends[0].out.shape[1]
    grouped_matmul("dx", routed, next(counters), N=D, K=H, trans=True, dual=gated)
    finish("dx_combine", ends, next(counters), shared, trans=True)


def _weights(all_of, counters, shared, H, gated, frozen, K):
    """dW1 = dz^T x, dW2 = dy^T h and the biases' column sums, each over its group's rows."""
    sizes = dict(shared=shared, H=H, frozen=frozen)
    for half, (w, b) in enumerate([("up", "b_up"), ("gate", "b_gate")][: 1 + gated]):
        wanted = [
            sums(getattr(g, w), p.dz_shared, p.dz, s.x, s.offsets, s.order)
            for p, s, g in all_of
            if getattr(g, w) is not None
        ]
        weight_grad(wanted, next(counters), half=half, top_k=K, **sizes)
        for p, s, g in all_of:
            if getattr(g, b) is not None:
                bias_grad(getattr(g, b), p.dz_shared, p.dz, s.offsets, half=half, **sizes)
    wanted = [
        sums(g.w2.T, p.h_shared, p.h, p.dy, s.offsets, s.order)
        for p, s, g in all_of
        if g.w2 is not None
    ]
    weight_grad(wanted, next(counters), half=0, top_k=K, **sizes)
