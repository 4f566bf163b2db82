"""The specification: every stage in plain torch, written to be obviously right rather than fast.

Products are taken in fp32 (fp64 for fp64 inputs) and rounded once, to the input's dtype, at the end
of a stage. It is also the back-end "reference": it runs anywhere, and every other back-end is
compared with it.
"""

import torch

from d2m_kernels.backends.reference.ffn import ffn_bwd, ffn_fwd, neurons
from d2m_kernels.backends.reference.ops import (
    combine,
    grouped_gemm,
    grouped_gemm_bwd,
    permute,
    route,
    select,
    spans,
)

NAME = "reference"

__all__ = [
    "combine", "ffn_bwd", "ffn_fwd", "grouped_gemm", "grouped_gemm_bwd", "neurons", "permute",
    "route", "select", "spans",
]  # fmt: skip


def unavailable() -> str | None:
    return None


def unsupported(_device_type: str, _dtype: torch.dtype) -> str | None:
    return None
