"""What the layer does outside of its kernels, where they do not take it along."""

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
