"""The specification: every stage in plain torch, written to be obviously right rather than fast.

Products are taken in fp32 (fp64 for fp64 inputs) and rounded once, to the input's dtype, at the end
of a stage. It is also the back-end "reference": it runs anywhere, and every other back-end is
compared with it.
"""

import torch

from d2m_kernels.reference.layer import FFNGrads, FFNInputs, ffn_bwd, ffn_fwd, neurons
from d2m_kernels.reference.stages import (
    combine,
    finish_block,
    grouped_gemm,
    grouped_gemm_bwd,
    linear,
    matmul,
    modulate,
    permute,
    route,
    select,
    spans,
    wide,
    wide_dtype,
)

NAME = "reference"

__all__ = [
    "NAME",
    "FFNGrads",
    "FFNInputs",
    "combine",
    "ffn_bwd",
    "ffn_fwd",
    "finish_block",
    "grouped_gemm",
    "grouped_gemm_bwd",
    "linear",
    "matmul",
    "modulate",
    "neurons",
    "permute",
    "route",
    "select",
    "spans",
    "unavailable",
    "unsupported",
    "wide",
    "wide_dtype",
]


def unavailable() -> str | None:
    return None


def unsupported(_device_type: str, _dtype: torch.dtype) -> str | None:
    return None
