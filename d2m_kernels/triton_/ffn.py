"""The layer's forward in three launches: up (all experts), down routed, down shared + combine.

Shapes: T tokens, D model, F hidden = S + E*H, S shared neurons, H neurons of an expert, E experts,
K top-k, N = T*K slots. Routed activations live in expert order [N, H]; x itself is never permuted.
Two streams of tokens with weights of their own (a double block's image and text) take the same
three launches.
"""

import torch

from d2m_kernels.reference import FFNInputs, finish_block
from d2m_kernels.triton_.combine import combine_into
from d2m_kernels.triton_.down import Shared, down_shared
from d2m_kernels.triton_.grouped_gemm import Operands, grouped_matmul
from d2m_kernels.triton_.weights import neuron_columns, neuron_rows


def ffn_fwd(
    x_TD, up_FD, gate_FD, w2_DF, b_up_F, b_gate_F, b2_D, weights_TK, offsets, order_N, inverse_N,
    shared: int, activation: str, scale: float, save: bool,
):  # fmt: skip
    """Eq. 2: y = shared(x) + scale * sum_k weight * expert(x) + b2, and the pre-activations.

    Returns y [T, D], z_shared [T, S or 2S], z_routed [N, H or 2H]; the last two None unless `save`.
    """
    stream = FFNInputs(
        x_TD, up_FD, gate_FD, w2_DF, b_up_F, b_gate_F, b2_D, weights_TK, offsets, order_N, inverse_N
    )
    return ffn_streams_fwd([stream], shared, activation, scale, save)[0]


def ffn_streams_fwd(streams, shared: int, activation: str, scale: float, save: bool, ends=()):
    """`ffn_fwd` of one or two streams of equal D, F, E, K and dtype: [(y, z_shared, z_routed)].

    `ends`: for each stream the AdaLN gate [B, D] and the residual [T, D] of its block, or None:
    y is then residual + gate * y.
    """
    first = streams[0]
    D, K, gated = first.x.shape[1], first.weights.shape[1], first.gate is not None
    H = (first.up.shape[0] - shared) // (first.offsets.shape[0] - 1)
    ups, downs, lasts, saved = [], [], [], []
    for s, (adaln, residual) in zip(streams, ends or [(None, None)] * len(streams), strict=True):
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
    grouped_matmul(
        "up_gated" if gated else "up", ups, N=H, K=D, gather_div=max(K, 1), bias_at=shared,
        bias_step=H, activation=activation,
    )  # fmt: skip
    grouped_matmul("down", downs, N=D, K=H)
    finish("down_combine", lasts, shared, scale=scale)
    return [(last.out, *z) for last, z in zip(lasts, saved, strict=True)]


def finish(stage, ends: list[Shared], shared: int, *, scale=1.0, trans=False):
    """out = h_shared W + bias + the routed rows: in the shared GEMM's epilogue if there is one."""
    if shared:
        down_shared(stage, ends, S=shared, scale=scale, trans=trans)
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
