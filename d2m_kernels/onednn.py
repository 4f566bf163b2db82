"""The door to torch's private oneDNN ops: each is tried once, and done without where it fails."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from d2m_kernels.activations import pointwise

# Activations oneDNN has for a product's epilogue, that are as exact as torch's and keep a NaN.
EPILOGUES = {"gelu": "none", "gelu_tanh": "tanh"}
FAILURES = (AttributeError, RuntimeError, TypeError)  # of an op that is gone or takes other things


@functools.cache
def fast_bf16() -> bool:
    """Whether oneDNN multiplies bf16 in this CPU's own instructions."""
    return bool(_supported("bf16")) and torch.backends.mkldnn.is_available()


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether products are better taken in fp32: the CPU has no arithmetic of the dtype (bf16 on
    AVX2), where torch multiplies it several times slower. False where oneDNN does not say."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    return name is not None and _supported(name) is False


def _supported(name: str) -> bool | None:
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except FAILURES:
        return None


def has_epilogue(dtype: torch.dtype, activation: str) -> bool:
    """Whether `linear` takes bias and activation along in the product, which rounds once."""
    usable = dtype == torch.bfloat16 and activation in EPILOGUES
    return usable and torch.backends.mkldnn.enabled and _epilogues_are_right()


def linear(x, w, b, activation: str):
    """act(x w^T + b) of contiguous x and w."""
    if has_epilogue(x.dtype, activation):
        return _linear_epilogue(x, w, b, activation)
    return pointwise(activation, F.linear(x, w, b))


def _linear_epilogue(x, w, b, activation):
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "gelu", [], EPILOGUES[activation])


@functools.cache
def _epilogues_are_right() -> bool:
    """Whether the private op is there and gives what torch gives, on a product of 2 x 2."""
    x = torch.tensor([[1.0, -2.0], [0.5, 0.25]], dtype=torch.bfloat16)
    wide = x.float()
    try:
        return fast_bf16() and all(
            torch.allclose(
                _linear_epilogue(x, x, x[0], name).float(),
                pointwise(name, F.linear(wide, wide, wide[0])),
                rtol=0.01,
                atol=0.01,
            )
            for name in EPILOGUES
        )
    except FAILURES:
        return False
