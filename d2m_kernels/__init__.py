"""Mixture-of-Experts kernels for Diffusion Transformers: `moe_ffn` and the stages it is made of."""

from d2m_kernels._version import __version__
from d2m_kernels.combine import combine
from d2m_kernels.contract import Routing
from d2m_kernels.grouped_gemm import grouped_gemm
from d2m_kernels.modulate import modulate_route
from d2m_kernels.moe_ffn import moe_ffn
from d2m_kernels.moe_ffn_pair import Stream, moe_ffn_pair, why_two_calls
from d2m_kernels.permute import permute
from d2m_kernels.route import route

__all__ = [
    "Routing",
    "Stream",
    "__version__",
    "combine",
    "grouped_gemm",
    "modulate_route",
    "moe_ffn",
    "moe_ffn_pair",
    "permute",
    "route",
    "why_two_calls",
]
