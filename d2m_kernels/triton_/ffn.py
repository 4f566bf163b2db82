"""The layer's forward in three launches: up (all experts), down routed, down shared + combine.

Shapes: T tokens, D model, F hidden = S + E*H, S shared neurons, H neurons of an expert, E experts,
K top-k, N = T*K slots. Routed activations live in expert order [N, H]; x itself is never permuted.
"""

import torch

from d2m_kernels.triton_.combine import combine_into
from d2m_kernels.triton_.down import down_shared
from d2m_kernels.triton_.grouped_gemm import grouped_matmul
from d2m_kernels.triton_.weights import neuron_columns, neuron_rows


def ffn_fwd(
    x_TD, up_FD, gate_FD, w2_DF, b_up_F, b_gate_F, b2_D, weights_TK, offsets, order_N, inverse_N,
    shared: int, activation: str, scale: float, save: bool,
):  # fmt: skip
    """Eq. 2: y = shared(x) + scale * sum_k weight * expert(x) + b2, and the pre-activations.

    Returns y [T, D], z_shared [T, S or 2S], z_routed [N, H or 2H]; the last two None unless `save`.
    """
    (T, D), (N, K) = x_TD.shape, (order_N.shape[0], weights_TK.shape[1])
    H = (up_FD.shape[0] - shared) // (offsets.shape[0] - 1)
    halves = 1 if gate_FD is None else 2
    h_shared, h_routed = x_TD.new_empty(T, shared), x_TD.new_empty(N, H)
    z_shared = x_TD.new_empty(T, shared * halves) if save else None
    z_routed = x_TD.new_empty(N, H * halves) if save else None
    with_shared = shared > 0
    grouped_matmul(
        "up" if gate_FD is None else "up_gated", x_TD, offsets, neuron_rows(up_FD, shared, H),
        h_routed, N=H, K=D, gate=None if gate_FD is None else neuron_rows(gate_FD, shared, H),
        gather=order_N, gather_div=max(K, 1), bias=b_up_F, bias_gate=b_gate_F, bias_at=shared,
        bias_step=H, activation=activation, z=z_routed,
        out_shared=h_shared if with_shared else None, z_shared=z_shared if with_shared else None,
    )  # fmt: skip
    y2_ND = None
    if N and H:
        y2_ND = x_TD.new_empty(N, D)
        w2 = neuron_columns(w2_DF, shared, H)
        grouped_matmul("down", h_routed, offsets, w2, y2_ND, N=D, K=H)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    finish(
        "down_combine", y_TD, h_shared, neuron_columns(w2_DF, shared, H), y2_ND,
        inverse_N.view(T, K), weights_TK, offsets, bias=b2_D, scale=scale,
    )  # fmt: skip
    return y_TD, z_shared, z_routed


def finish(
    stage, out_TD, h_shared, weights, y2_ND, inverse_TK, weights_TK, offsets, *, bias=None,
    scale=1.0, gate=None, trans=False,
):  # fmt: skip
    """out = h_shared W + bias + the routed rows: in the shared GEMM's epilogue if there is one."""
    shared = h_shared.shape[1] // (1 if gate is None else 2)
    if shared:
        down_shared(
            stage, h_shared, weights, out_TD, offsets, K=shared, y2=y2_ND, inverse_TK=inverse_TK,
            weights_TK=weights_TK, bias=bias, scale=scale, gate=gate, trans=trans,
        )  # fmt: skip
    elif y2_ND is not None:
        combine_into(out_TD, y2_ND, inverse_TK, weights_TK, offsets, None, bias, scale)
    elif bias is None:
        out_TD.zero_()
    else:
        out_TD.copy_(bias.expand_as(out_TD))
