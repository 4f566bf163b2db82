"""Which back-end serves a call: probed once, resolved by device and dtype, able to say why not.

A back-end is a module with the stages' functions (`route`, `permute`, `grouped_gemm`, `combine`,
`ffn_fwd`, `ffn_bwd`; see `reference`), `unavailable()` and `unsupported(device_type, dtype)`,
which return None or the reason. The layer's two take lists of streams, and never look at whether
there is one or more:

    ffn_fwd(streams, attrs, ends) -> [(y, z_shared, z_routed), ...]
    ffn_bwd(dys, streams, zs, attrs, grads)     fills the buffers of grads

with FFNInputs, FFNAttrs and FFNGrads of contract.py. Where `groups_streams()` is there and true,
two streams share launches; elsewhere they run one after another (`eager.each_stream`).
"""

from __future__ import annotations

import functools
import importlib
import os

from torch import dtype as DType  # not `import torch`: here this is the back-end of that name
from torch import float64

# Best first. "reference" is last: always right, never fast.
BACKENDS = {
    "triton": "d2m_kernels.backends.triton",
    "cuda": "d2m_kernels.backends.cuda",
    "cpu": "d2m_kernels.backends.cpu",
    "torch": "d2m_kernels.backends.torch",
    "reference": "d2m_kernels.backends.reference",
}
ENV = "D2M_BACKEND"


@functools.cache
def module(name: str):
    """The back-end's module, imported on first use."""
    return importlib.import_module(BACKENDS[name])


@functools.cache
def unavailable(name: str) -> str | None:
    """Why this back-end cannot run here at all, or None. Probed once a process."""
    try:
        return module(name).unavailable()
    except ImportError as error:
        return f"import failed: {error}"


@functools.cache
def why_not(name: str, device_type: str, dtype: DType) -> str | None:
    """Why this back-end cannot serve tensors of this device and dtype, or None."""
    return unavailable(name) or module(name).unsupported(device_type, dtype)


def _constant(function):
    """Tells `torch.compile` that the result is a constant.

    As torch.compiler.assume_constant_result does, by the mark that it sets; the decorator itself
    would import torch._dynamo, and Triton with it, on `import d2m_kernels`.
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def resolve(requested: str | None, device_type: str, dtype: DType) -> str:
    """The back-end to use: the requested one or an error; without a request, the best available.

    The environment variable D2M_BACKEND stands in for a request that was not made.
    """
    if requested is None:
        return _best(device_type, dtype, os.environ.get(ENV))
    if requested not in BACKENDS:
        raise ValueError(
            f"backend: got {requested!r}, expected None or one of {', '.join(BACKENDS)}"
        )
    reason = why_not(requested, device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"backend={requested!r} cannot serve {dtype} on {device_type}: {reason}; "
            "pass backend=None for the best one available (python -m d2m_kernels lists them)"
        )
    return requested


@functools.cache
def _best(device_type: str, dtype: DType, env: str | None) -> str:
    if env:
        return resolve(env, device_type, dtype)
    # On a CPU, Triton means its interpreter: for debugging, so only when it is asked for.
    names = [name for name in BACKENDS if (name, device_type) != ("triton", "cpu")]
    return next(name for name in names if why_not(name, device_type, dtype) is None)


@_constant
def groups_streams(name: str) -> bool:
    """Whether the back-end runs two streams of tokens in the launches of one."""
    groups = getattr(module(name), "groups_streams", None)
    return groups is not None and groups()


def explain(device_type: str, dtype: DType) -> dict[str, str | None]:
    """Every back-end, best first, with None where it serves or the reason why it does not."""
    return {name: why_not(name, device_type, dtype) for name in BACKENDS}


def router_backend(x, router, name: str) -> str:
    """`name`, or "reference" where fp64 meets a narrower dtype, which the others do not take."""
    return "reference" if float64 in (x.dtype, router.dtype) else name
