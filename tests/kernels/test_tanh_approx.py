"""Whether a GPU's tanh.approx.f32 is good enough for bf16's gelu_tanh, by its published error."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import assert_as_good_as_torch

RELATIVE = 2.0**-11  # the most that the PTX ISA allows the instruction


@pytest.mark.parametrize("sign", ["up", "down", "random"])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 3.0, 10.0])
def test_the_worst_error_allowed_keeps_the_rule(scale, sign):
    """Every value off by the whole bound: the result is within twice the error of torch's bf16."""
    g = torch.Generator().manual_seed(0)
    z = scale * torch.randn(1 << 16, generator=g, dtype=torch.float64)
    off = {"up": 1.0, "down": -1.0, "random": 2.0 * torch.randint(0, 2, z.shape, generator=g) - 1}
    t = torch.tanh(0.7978845608028654 * (z + 0.044715 * z**3)) * (1 + RELATIVE * off[sign])
    exact = torch.nn.functional.gelu(z, approximate="tanh")
    own = torch.nn.functional.gelu(z.bfloat16(), approximate="tanh")
    assert_as_good_as_torch((0.5 * z + 0.5 * z * t).bfloat16(), exact, own, f"scale {scale}")
