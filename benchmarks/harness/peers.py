"""What a user would otherwise run in place of `moe_ffn`, at equal activated FLOPs: plain torch.

T tokens, D model, F hidden = S shared + E * H, E experts, K top-k. Libraries are in
peer_libraries.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from harness.shapes import FFNShape


class Unavailable(Exception):
    """Why a peer cannot be measured here."""


@dataclass
class Contender:
    """One way to compute the layer.

    run: a call on the shape's x. same: it computes our function ("bias": with b1, "no bias":
    without it in the experts) and is checked against the reference; "other": it cannot (another
    activation or routing), only its FLOPs are equal. leaves: tensors whose gradients a training
    step produces. note: what a reader should know.
    """

    run: Callable[[], torch.Tensor]
    same: str = "bias"
    leaves: list = field(default_factory=list)
    note: str = ""


def rms_error(got, want) -> float:
    """RMS of the difference over RMS of `want`."""
    got, want = got.float(), want.float()
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


def gelu(z):
    return F.gelu(z, approximate="tanh")


def dense(p, shape: FFNShape):
    """The FFN that the MoE replaces."""
    return F.linear(gelu(F.linear(p["x"], p["w1"], p["b1"])), p["w2"], p["b2"])


def shared_expert(p, shape: FFNShape):
    S = shape.S
    return F.linear(gelu(F.linear(p["x"], p["w1"][:S], p["b1"][:S])), p["w2"][:, :S], p["b2"])


def gate(p, shape: FFNShape):
    top = (p["x"].float() @ p["router"].float().T).topk(shape.K)
    return top.values.softmax(-1).to(p["x"].dtype), top.indices


def expert_loop(p, shape: FFNShape, bias: bool = True):
    """One expert after another on its own rows, index_add into the result."""
    weights, ids = gate(p, shape)
    y = shared_expert(p, shape)
    for e in range(shape.E):
        tokens, slot = (ids == e).nonzero(as_tuple=True)
        own = slice(shape.S + e * shape.H, shape.S + (e + 1) * shape.H)
        h = gelu(F.linear(p["x"][tokens], p["w1"][own], p["b1"][own] if bias else None))
        y_e = F.linear(h, p["w2"][:, own])
        y = y.index_add(0, tokens, y_e * weights[tokens, slot, None])
    return y


def grouped_mm(p, shape: FFNShape):
    """torch's grouped_mm with eager torch around it: argsort, gather, products, gather, sum."""
    weights, ids = gate(p, shape)
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
    return shared_expert(p, shape) + (y[inverse].view(T, K, -1) * weights[..., None]).sum(1)


def two_thirds(width: int) -> int:
    """Width of a SwiGLU (three matrices) with the FLOPs of two matrices of `width`."""
    if 2 * width % (3 * 8):
        raise Unavailable(f"SwiGLU of equal FLOPs needs 2/3 of {width} to be a multiple of 8")
    return 2 * width // 3


def compiled_dense(p, shape: FFNShape) -> Contender:
    torch._dynamo.config.recompile_limit = 256  # one graph a shape; beyond the limit it is eager
    function = torch.compile(dense, dynamic=False)
    return Contender(lambda: function(p, shape), "other", list(p.values()))
