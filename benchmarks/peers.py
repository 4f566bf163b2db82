"""What a user would otherwise run in place of `moe_ffn`, at equal activated FLOPs.

T tokens, D model, F hidden = S shared + E * H, E experts, K top-k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shapes import FFNShape


def gelu(z):
    return F.gelu(z, approximate="tanh")


def dense(p, shape: FFNShape):
    """The FFN that the MoE replaces."""
    return F.linear(gelu(F.linear(p["x"], p["w1"], p["b1"])), p["w2"], p["b2"])


def _shared(p, shape: FFNShape):
    S = shape.S
    return F.linear(gelu(F.linear(p["x"], p["w1"][:S], p["b1"][:S])), p["w2"][:, :S], p["b2"])


def _gate(p, shape: FFNShape):
    top = (p["x"].float() @ p["router"].float().T).topk(shape.K)
    return top.values.softmax(-1).to(p["x"].dtype), top.indices


def expert_loop(p, shape: FFNShape):
    """One expert after another on its own rows, index_add into the result."""
    weights, ids = _gate(p, shape)
    y = _shared(p, shape)
    for e in range(shape.E):
        tokens, slot = (ids == e).nonzero(as_tuple=True)
        own = slice(shape.S + e * shape.H, shape.S + (e + 1) * shape.H)
        h = gelu(F.linear(p["x"][tokens], p["w1"][own], p["b1"][own]))
        y_e = F.linear(h, p["w2"][:, own])
        y = y.index_add(0, tokens, y_e * weights[tokens, slot, None])
    return y


def grouped_mm(p, shape: FFNShape):
    """torch's grouped_mm with eager torch around it: argsort, gather, products, gather, sum."""
    weights, ids = _gate(p, shape)
    T, K, E, H = shape.T, shape.K, shape.E, shape.H
    order = ids.reshape(-1).argsort(stable=True)
    counts = (ids.reshape(-1, 1) == torch.arange(E, device=ids.device)).sum(0)
    offsets = counts.cumsum(0).to(torch.int32)
    w1 = p["w1"][shape.S :].view(E, H, -1)
    w2 = p["w2"][:, shape.S :].unflatten(1, (E, H)).permute(1, 2, 0)
    expert = ids.reshape(-1)[order]
    z = F.grouped_mm(p["x"][order // K], w1.transpose(1, 2), offs=offsets)
    h = gelu(z + p["b1"][shape.S :].view(E, H)[expert])
    y = F.grouped_mm(h, w2, offs=offsets)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=ids.device))
    return _shared(p, shape) + (y[inverse].view(T, K, -1) * weights[..., None]).sum(1)


def hidream(p, shape: FFNShape):
    """diffusers' HiDream MoE layer (SwiGLU: three matrices of two thirds the width), or None."""
    try:
        from diffusers.models.transformers import transformer_hidream_image as module
    except ImportError:
        return None
    layer = module.MOEFeedForwardSwiGLU(shape.D, shape.H, shape.E, shape.K)
    layer.shared_experts = module.HiDreamImageFeedForwardSwiGLU(shape.D, shape.S)
    layer = layer.to(p["x"].device, shape.dtype)
    torch.manual_seed(0)
    for w in layer.parameters():
        torch.nn.init.normal_(w, std=0.02)
    widths = [layer.shared_experts.w1.out_features, layer.experts[0].w1.out_features]
    if widths != [2 * shape.S // 3, 2 * shape.H // 3]:
        return None  # its widths come in multiples of 256: no equal FLOPs at this shape
    return layer
