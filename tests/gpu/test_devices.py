"""Tensors on a GPU that is not the current one."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import Case, call, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs 2 CUDA devices, {torch.cuda.device_count()}"
    ),
]


@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
def test_layer_on_the_second_device(backend):
    case = Case(T=129, D=64, S=64, H=32, E=4, dtype=torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        case.device = device
        assert torch.cuda.current_device() == 0
        results.append({n: t.cpu() for n, t in run(call(case, backend), case.build()).items()})
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name
