"""Every tile of the table that serves this GPU, with and without halves, against plain torch."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import Case, compare, compare_pair
from helpers.triton_cases import UP, every_pin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def rows():
    """(activation, pin): sm_90's table where there is no GPU, so that the tests are listed."""
    configs = pytest.importorskip("d2m_kernels.backends.triton.configs")
    arch = configs.arch_of("cuda", 0) if torch.cuda.is_available() else "sm90"
    found = every_pin([arch], same=lambda config: config)
    if arch == "sm90":  # and what a GPU is to compare them with
        others = ("128x128x64w8s4p1tma", "128x128x64w8s3p2r128tma", "128x256x64w8s3p1halftmastatic",
                  "128x128x64w8s4p1halftmaatmaexact")  # fmt: skip
        found += [(activation, configs.named(name).name) for activation in UP for name in others]
    return found


@pytest.mark.parametrize("activation,pin", rows())
def test_layer_and_gradients(activation, pin, monkeypatch):
    """About 300 rows an expert, 136 and 200 neurons: tiles with a remainder in every direction."""
    monkeypatch.setenv("D2M_TRITON_CONFIG", pin)
    case = Case(T=450, D=264, S=136, H=200, E=3, k=2, activation=activation, dtype=torch.bfloat16,
                scale=1.3, device="cuda")  # fmt: skip
    compare(case, "triton")


@pytest.mark.parametrize("activation,pin", rows())
def test_two_streams(activation, pin, monkeypatch):
    monkeypatch.setenv("D2M_TRITON_CONFIG", pin)
    size = dict(D=264, S=136, H=200, E=3, k=2, activation=activation, dtype=torch.bfloat16,
                device="cuda")  # fmt: skip
    compare_pair((Case(T=450, seed=1, **size), Case(T=77, seed=2, **size)), "triton")
