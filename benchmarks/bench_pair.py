"""`moe_ffn_pair` against two calls of `moe_ffn`: a FLUX double block's image and text FFN."""

from __future__ import annotations

import pytest
import torch
from harness.shapes import FFNShape
from harness.single_ops import record

from d2m_kernels import Stream, moe_ffn, moe_ffn_pair, why_two_calls

# Image and text tokens of 1024 and 512 pixels; FLUX takes 512 text tokens.
TOKENS = {"flux-1024px": (4096, 512), "flux-512px": (1024, 512)}
SMALL = dict(D=64, S=64, H=16, E=4)


@pytest.mark.parametrize("name", TOKENS)
def test_pair(bench, name):
    if bench.device.type == "cpu" and bench.size != "tiny" and name != "flux-512px":
        pytest.skip("one size is enough where the streams run one after another")
    tokens = (40, 8) if bench.size == "tiny" else TOKENS[name]
    sizes = SMALL if bench.size == "tiny" else {}
    shapes = [FFNShape(T=T, **sizes) for T in tokens]
    streams = [
        Stream(**shape.tensors(bench.device), top_k=shape.K, shared=shape.S) for shape in shapes
    ]

    def together():
        return moe_ffn_pair(*streams)

    def apart():
        return tuple(moe_ffn(**vars(stream)) for stream in streams)

    with torch.inference_mode():
        for one, other in zip(together(), apart(), strict=True):
            error = (one.float() - other.float()).abs().max()
            assert error < 0.02 * other.float().abs().max()
        functions = {"moe_ffn_pair": together, "two calls": apart}
        race = bench.race(functions, "moe_ffn_pair", bench.rounds(9), budget=bench.seconds(9, 20))
        counts = bench.count(together) | {"two_calls_because": why_two_calls(*streams)}
    both = FFNShape(T=sum(tokens), **sizes)
    weights = 2 * 2 * both.D * both.F + 2 * both.T * both.D
    gflop, gbyte = both.gflop(both.activated), both.gbyte(weights)
    record(bench, "moe_ffn_pair", name, both, race, gflop, gbyte, counts)
