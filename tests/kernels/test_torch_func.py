"""`torch.func`: `functional_call` works; the transforms are refused by name, in every op."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vjp, vmap

from d2m_kernels import Stream, combine, grouped_gemm, moe_ffn, moe_ffn_pair, route

T, D, S, H, E = 24, 16, 16, 8, 6
F = S + E * H


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = dict(router=(E, D), w1=(F, D), w2=(D, F), b1=(F,), b2=(D,))
    return {name: torch.randn(*size, generator=g) / 4 for name, size in sizes.items()}


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterDict(weights())

    def forward(self, x):
        return moe_ffn(x, **self.weights, top_k=2, shared=S)


def test_functional_call():
    layer, x = Layer(), torch.randn(T, D)
    other = {f"weights.{n}": t.requires_grad_() for n, t in weights(seed=1).items()}
    functional_call(layer, other, (x,)).square().sum().backward()
    layer.load_state_dict(other)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert torch.equal(other[name].grad, p.grad), name


REFUSED = "under a torch.func transform.*use autograd"


@pytest.mark.parametrize("op", ["moe_ffn", "moe_ffn_pair", "route", "grouped_gemm", "combine"])
def test_transforms_are_refused_by_every_op(op):
    x, p = torch.randn(T, D), weights()
    w = torch.randn(E, H, D)
    routing = route(x, p["router"], top_k=2)
    whole = (p["router"], p["w1"], p["w2"], p["b1"], p["b2"])
    calls = {
        "moe_ffn": lambda x: moe_ffn(x, *whole, top_k=2, shared=S),
        "moe_ffn_pair": lambda x: moe_ffn_pair(
            *(Stream(x, *whole, top_k=2, shared=S) for _ in range(2))
        )[0],
        "route": lambda x: route(x, p["router"], top_k=2).weights,
        "grouped_gemm": lambda x: grouped_gemm(x.repeat(2, 1), w,
                                               routing.offsets),
        "combine": lambda x: combine(x.repeat(2, 1), routing),
    }  # fmt: skip
    assert calls[op](x).isfinite().all()
    with pytest.raises(RuntimeError, match=REFUSED):
        grad(lambda x: calls[op](x).sum())(x)
    with pytest.raises(RuntimeError, match=REFUSED):
        vjp(calls[op], x)
    with pytest.raises(RuntimeError, match=REFUSED):
        vmap(calls[op])(x[None])
