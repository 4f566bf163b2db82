"""The only file that touches pointers and streams: tensors to `_d2m_cpu` / `_d2m_cuda` and back.

Shapes: T tokens, D model, E experts, K top-k, N = T*K slots; slot s = t*K + j is choice j of token
t.

Nothing here validates: the public wrappers have done so. Matrices are 2-D with a unit inner stride
and any row stride; outputs are allocated here and are contiguous. The extension modules know
neither torch nor its allocator, so one build serves every torch version.
"""

from __future__ import annotations

import functools
import importlib

import torch

ABI = 2  # D2M_ABI in csrc/abi.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # D2mDtype in csrc/abi.h


@functools.cache
def _load(name: str):
    """(module, None) or (None, why not); for `_d2m_cuda` NVRTC and CuPy can stand in."""
    module, reason = _import(name)
    if module is None and name == "_d2m_cuda":
        from d2m_kernels.backends import nvrtc

        why = nvrtc.unavailable()
        if why is None:
            return nvrtc, None
        reason = f"{reason}, and NVRTC cannot stand in for it: {why}"
    return module, reason


def _import(name: str):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None, f"the extension module {name} is not installed (pip install .)"
        return None, f"the extension module {name} does not load: {error}"
    found = getattr(module, "ABI", None)
    if found != ABI:
        where = getattr(module, "__file__", name)
        return None, (
            f"{where} was built from other sources (its ABI is {found}, expected {ABI}): "
            "run pip install . again"
        )
    return module, None


def _need(name: str):
    module, reason = _load(name)
    if module is None:
        raise RuntimeError(reason)
    return module


def cpu_available() -> str | None:
    """None if the C++ extension can be used, else the reason why not."""
    return _load("_d2m_cpu")[1]


def cuda_available() -> str | None:
    """None if the CUDA kernels can be used on this machine, else the reason why not."""
    module, reason = _load("_d2m_cuda")
    if reason is None and not torch.cuda.is_available():
        return f"{module.__name__} is there, but torch sees no CUDA device"
    return reason


def _matrix(x: torch.Tensor | None) -> tuple[int, int, int]:
    """(address, dtype code, row stride in elements) of a matrix or vector; zeros for None."""
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), _DTYPES[x.dtype], x.stride(0) if x.dim() > 1 else 0


def _flat(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """x contiguous and in `dtype`: itself when it is so already, as it is on every hot path."""
    return None if x is None else x.to(dtype).contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# ------------------------------------------------------------------------------------------ CPU


def cpu_route(x_TD, router_ED, top_k: int, mask_T=None):
    """Gate of eqs. 2-3 -> probs [T, E] fp32, weights [T, K] fp32, ids [T, K] int32."""
    m = _need("_d2m_cpu")
    (T, D), E = x_TD.shape, router_ED.shape[0]
    probs_TE = x_TD.new_empty(T, E, dtype=torch.float32)
    weights_TK = x_TD.new_empty(T, top_k, dtype=torch.float32)
    ids_TK = x_TD.new_empty(T, top_k, dtype=torch.int32)
    mask_T = _flat(mask_T, torch.bool)
    m.route(
        *_matrix(x_TD), *_matrix(router_ED), _address(mask_T), T, D, E, top_k,
        probs_TE.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return probs_TE, weights_TK, ids_TK


def cpu_permute(ids_TK, num_experts: int):
    """Stable counting sort by expert -> offsets [E + 1], order [N], inverse [N], all int32."""
    m = _need("_d2m_cpu")
    ids_N = _flat(ids_TK, torch.int32)
    offsets = ids_N.new_empty(num_experts + 1)
    order_N, inverse_N = ids_N.new_empty(ids_N.numel()), ids_N.new_empty(ids_N.numel())
    m.permute(
        ids_N.data_ptr(), ids_N.numel(), num_experts,
        offsets.data_ptr(), order_N.data_ptr(), inverse_N.data_ptr(),
    )  # fmt: skip
    return offsets, order_N, inverse_N


def cpu_combine(
    y_ND, inverse_N, weights_TK, offsets, base_TD=None, bias_D=None, scale: float = 1.0, out=None
):
    """out[t] = base[t] + bias + scale * sum_j weights[t, j] * y[inverse[t*K + j]].

    [T, D] in y's dtype. Sums are fp32; slots with inverse >= offsets[E] are skipped; weights
    None means ones (then `inverse_N` has to be [T, K]). `out`: contiguous, may be `base_TD`.
    """
    run, threads = _need("_d2m_cpu").combine, torch.get_num_threads()
    slots = (y_ND, inverse_N, weights_TK, offsets)
    return _combine(run, threads, *slots, base_TD, bias_D, scale, out)


def _combine(run, where, y_ND, inverse_N, weights_TK, offsets, base_TD, bias_D, scale, out=None):
    """`run`: an extension's `combine`; `where`: threads, or the stream."""
    (T, K), D = (inverse_N if weights_TK is None else weights_TK).shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(T, D) if out is None else out
    inverse_N, offsets = _flat(inverse_N, torch.int32), _flat(offsets, torch.int32)
    weights_TK = _flat(weights_TK, torch.float32)
    bias_D = None if bias_D is None else bias_D.contiguous()
    if T * D:
        run(
            *_matrix(y_ND), inverse_N.data_ptr(), _address(weights_TK), offsets.data_ptr(),
            offsets.numel() - 1, *_matrix(base_TD), *_matrix(bias_D)[:2], scale,
            out_TD.data_ptr(), T, D, K, where,
        )  # fmt: skip
    return out_TD


def cpu_gather_rows(x, idx, divisor: int = 1, out=None):
    """x[idx // divisor] for int32 `idx`: the tokens of a run of slots, in one threaded copy."""
    m = _need("_d2m_cpu")
    idx = _flat(idx, torch.int32)
    out = x.new_empty(idx.numel(), x.shape[1]) if out is None else out
    size = x.element_size()
    m.gather_rows(
        x.data_ptr(), x.stride(0) * size, idx.data_ptr(), idx.numel(), divisor,
        x.shape[1] * size, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------- CUDA
#
# Everything is enqueued on torch's current stream; the workspaces are torch's, so they are safe to
# drop on return (the caching allocator hands them out again on the same stream only) and belong to
# the graph's pool under CUDA-graph capture.


def _stream(x: torch.Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def cuda_route_permute(x_TD, router_ED, top_k: int, mask_T=None, adaln=None):
    """Gate of eqs. 2-3 and the counting sort, counted on the way: one launch fewer than apart.

    -> probs [T, E] fp32, weights [T, K] fp32, ids [T, K], offsets [E + 1], order [N], inverse [N].
    """
    m = _need("_d2m_cuda")
    (T, D), E = x_TD.shape, router_ED.shape[0]
    if router_ED.dtype not in (torch.float32, x_TD.dtype):
        router_ED = router_ED.float()
    probs_TE = x_TD.new_empty(T, E, dtype=torch.float32)
    weights_TK = x_TD.new_empty(T, top_k, dtype=torch.float32)
    ids_TK = x_TD.new_empty(T, top_k, dtype=torch.int32)
    # With no slots at all nothing is launched that would write the offsets.
    offsets = (ids_TK.new_empty if T * top_k else ids_TK.new_zeros)(E + 1)
    order_N, inverse_N = ids_TK.new_empty(T * top_k), ids_TK.new_empty(T * top_k)
    workspace = ids_TK.new_empty(m.workspace_ints(E))
    mask_T = _flat(mask_T, torch.bool)
    if T:
        with torch.cuda.device(x_TD.device):
            tail = (
                *_matrix(router_ED), _address(mask_T), T, D, E, top_k, probs_TE.data_ptr(),
                weights_TK.data_ptr(), ids_TK.data_ptr(), offsets.data_ptr(),
                _address(order_N if top_k else None), inverse_N.data_ptr(),
                workspace.data_ptr(), _stream(x_TD),
            )  # fmt: skip
            if adaln is None:
                m.route(*_matrix(x_TD), *tail)
            else:
                m.modulate_route(*_matrix(x_TD), *adaln, *tail)
    return probs_TE, weights_TK, ids_TK, offsets, order_N, inverse_N


def cuda_modulate_route(x_TD, scale_BD, shift_BD, eps, router_ED, top_k: int, mask_T=None):
    """LayerNorm(x) * (1 + scale) + shift [T, D], and `cuda_route_permute` of it; one dtype."""
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    scale_BD, shift_BD = (t if t.stride(-1) == 1 else t.contiguous() for t in (scale_BD, shift_BD))
    tokens = x_TD.shape[0] // max(scale_BD.shape[0], 1)
    adaln = (
        scale_BD.data_ptr(), scale_BD.stride(0), shift_BD.data_ptr(), shift_BD.stride(0), tokens,
        eps, out_TD.data_ptr(),
    )  # fmt: skip
    return out_TD, *cuda_route_permute(x_TD, router_ED, top_k, mask_T, adaln)


def cuda_permute(ids_TK, num_experts: int):
    """Stable counting sort by expert -> offsets [E + 1], order [N], inverse [N], all int32."""
    m = _need("_d2m_cuda")
    ids_N = _flat(ids_TK, torch.int32)
    N = ids_N.numel()
    offsets = (ids_N.new_empty if N else ids_N.new_zeros)(num_experts + 1)
    order_N, inverse_N = ids_N.new_empty(N), ids_N.new_empty(N)
    workspace = ids_N.new_empty(m.workspace_ints(num_experts))
    if N:
        with torch.cuda.device(ids_N.device):
            m.permute(
                ids_N.data_ptr(), N, num_experts, offsets.data_ptr(), order_N.data_ptr(),
                inverse_N.data_ptr(), workspace.data_ptr(), _stream(ids_N),
            )  # fmt: skip
    return offsets, order_N, inverse_N


def cuda_combine(
    y_ND, inverse_N, weights_TK, offsets, base_TD=None, bias_D=None, scale: float = 1.0
):
    """`cpu_combine` on the GPU."""
    run, slots = _need("_d2m_cuda").combine, (y_ND, inverse_N, weights_TK, offsets)
    with torch.cuda.device(y_ND.device):
        return _combine(run, _stream(y_ND), *slots, base_TD, bias_D, scale)
