"""Back-end "triton": every stage as Triton kernels for CUDA GPUs, or under Triton's interpreter.

route, permute      route.py         one pass over x, counting sort; modulate_route: AdaLN in front
grouped_gemm        grouped_gemm.py  persistent over the device's offsets; also up
grouped_gemm_bwd    grouped_gemm_bwd.py
combine             combine.py       deterministic gather and sum
ffn_fwd             ffn.py, down.py  three launches
ffn_bwd             ffn.py, act_bwd.py, weight_grads.py
configs.py          which tile each launch uses; launch.py: descriptors, fallback
"""

import torch

from d2m_kernels.backends.triton.combine import combine
from d2m_kernels.backends.triton.ffn import ffn_bwd, ffn_fwd
from d2m_kernels.backends.triton.grouped_gemm import grouped_gemm
from d2m_kernels.backends.triton.grouped_gemm_bwd import grouped_gemm_bwd
from d2m_kernels.backends.triton.pieces import INTERPRET
from d2m_kernels.backends.triton.route import modulate_route, permute, route

__all__ = [
    "combine", "ffn_bwd", "ffn_fwd", "grouped_gemm", "grouped_gemm_bwd", "modulate_route",
    "permute", "route",
]  # fmt: skip

NAME = "triton"


def unavailable() -> str | None:
    """Why no kernel of this back-end can run here, or None."""
    if INTERPRET:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    if torch.version.hip is not None:
        return "built for CUDA devices only"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype cannot be served, or None."""
    if device_type != ("cpu" if INTERPRET else "cuda"):
        return "runs on CPU tensors under the interpreter" if INTERPRET else "needs CUDA tensors"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"computes in bfloat16, float16 and float32, not {dtype}"
    return None


def groups_streams() -> bool:
    return True
