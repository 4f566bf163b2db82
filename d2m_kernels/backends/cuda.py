"""The back-end "cuda": CUDA C++ for route, permute and combine; the products by Triton where it is
installed, else by torch's grouped_mm.

Shapes: T tokens, D model, E experts, K top-k, N = T*K slots. The kernels come from the extension
built at install or, without one, are compiled from the same sources by NVRTC through CuPy.
"""

from __future__ import annotations

import torch

from d2m_kernels import backends
from d2m_kernels.backends import native
from d2m_kernels.backends import torch as torch_backend
from d2m_kernels.eager import modulate

NAME = "cuda"
MAX_EXPERTS = 256  # kMaxExperts in csrc/cuda/common.cuh: what the kernels' shared memory holds


unavailable = native.cuda_available


def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return "it serves CUDA tensors only"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "it serves bf16, fp16 and fp32"
    if _products() is torch_backend:
        return torch_backend.unavailable() or torch_backend.unsupported(device_type, dtype)
    return None


def _products():
    return backends.module("triton") if backends.unavailable("triton") is None else torch_backend


def _check_experts(count: int) -> None:
    if count > MAX_EXPERTS:
        raise ValueError(
            f"router: expected at most {MAX_EXPERTS} experts for the back-end 'cuda', got {count}; "
            "take 'triton' or 'torch'"
        )


def route(x_TD, router_ED, top_k, mask_T=None):
    _check_experts(router_ED.shape[0])
    return native.cuda_route_permute(x_TD, router_ED, top_k, mask_T)


def modulate_route(x_TD, scale_BD, shift_BD, eps, router_ED, top_k, mask_T=None):
    _check_experts(router_ED.shape[0])
    if not x_TD.dtype == scale_BD.dtype == shift_BD.dtype:  # the kernel reads one dtype
        modulated_TD = modulate(x_TD, scale_BD, shift_BD, eps)
        return modulated_TD, *native.cuda_route_permute(modulated_TD, router_ED, top_k, mask_T)
    return native.cuda_modulate_route(x_TD, scale_BD, shift_BD, eps, router_ED, top_k, mask_T)


def permute(ids_TK, num_experts: int):
    _check_experts(num_experts)
    return native.cuda_permute(ids_TK, num_experts)


combine = native.cuda_combine


def grouped_gemm(*args):
    return _products().grouped_gemm(*args)


def grouped_gemm_bwd(*args):
    return _products().grouped_gemm_bwd(*args)


def _own_combine() -> dict:
    """Triton combines in its last product's epilogue; after grouped_mm it is a stage of its own."""
    return {"combine": combine} if _products() is torch_backend else {}


def ffn_fwd(streams, attrs, ends):
    return _products().ffn_fwd(streams, attrs, ends, **_own_combine())


def ffn_bwd(dys, streams, zs, attrs, grads):
    return _products().ffn_bwd(dys, streams, zs, attrs, grads, **_own_combine())


def groups_streams() -> bool:
    return _products() is not torch_backend
