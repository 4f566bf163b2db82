"""Checks of the public wrappers: an error names the argument, what it was, what was expected."""

from __future__ import annotations

import torch

from d2m_kernels.activations import ACTIVATIONS, GATED, is_gated
from d2m_kernels.contract import Routing

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shape_of(t) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def tensor(name: str, t, dims: int | None = None, expected: str = "") -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {expected}, got {type(t).__name__}")
    if dims is not None and t.dim() != dims:
        raise ValueError(f"{name}: expected {expected}, got {shape_of(t)}")


def floating(name: str, t: torch.Tensor) -> None:
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected bf16, fp16, fp32 or fp64, got {shape_of(t)}")


def no_transform(name: str) -> None:
    """torch's own message names a Function and not the op; the setup_context that it asks for costs
    a call 60 us and buffers for the gradients of what is saved."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: under a torch.func transform (grad, vjp, vmap, ...), which the ops of "
            f"d2m_kernels do not take; use autograd: torch.autograd.grad, or backward()"
        )


def shape(name: str, t, expected: tuple[int, ...], legend: str) -> None:
    tensor(name, t)
    if t.shape != expected:
        raise ValueError(f"{name}: expected {legend} = {expected}, got {shape_of(t)}")


def same_device(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like x, got {shape_of(t)}")


def same_dtype(name: str, t: torch.Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype:
        raise TypeError(
            f"{name}: expected {dtype} like x, got {shape_of(t)}; cast one of them or use autocast"
        )


def unit_inner_stride(name: str, t: torch.Tensor) -> None:
    if t.numel() and t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(
            f"{name}: expected a unit inner stride, got strides {t.stride()} for {shape_of(t)}; "
            f"pass {name}.contiguous()"
        )


def top_k(value, num_experts: int) -> int:
    """The number of routed experts a token uses; "dense" routes nothing."""
    if value == "dense":
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= num_experts:
        raise ValueError(f'top_k: expected 0..{num_experts} or "dense", got {value!r}')
    return value


def activation(value) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {value!r}")


def input_and_router(x, router) -> None:
    """x [..., D] and router [E, D] on one device."""
    tensor("x", x, None, "[..., D]")
    no_transform("x")
    floating("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected [..., D], got {shape_of(x)}")
    tensor("router", router, 2, "[E, D]")
    floating("router", router)
    E, D = router.shape
    if D != x.shape[-1] or E < 1:
        raise ValueError(f"router: expected [E >= 1, D = {x.shape[-1]}], got {shape_of(router)}")
    same_device("router", router, x)
    unit_inner_stride("router", router)


def mask(token_mask, x) -> None:
    if token_mask is None:
        return
    shape("token_mask", token_mask, tuple(x.shape[:-1]), "x.shape[:-1]")
    if token_mask.dtype != torch.bool:
        raise TypeError(f"token_mask: expected bool, got {shape_of(token_mask)}")
    same_device("token_mask", token_mask, x)


def modulation(x, pair) -> None:
    """(scale, shift), each [B, D] for x [B, ..., D] or for B equal runs of tokens of x [T, D]."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"modulation: expected (scale, shift), got {type(pair).__name__}")
    for name, t in zip(("scale", "shift"), pair, strict=True):
        per_sample(name, t, x)
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"shift: expected scale's shape {tuple(pair[0].shape)}, got {shape_of(pair[1])}"
        )


def per_sample(name: str, t, x) -> None:
    """t [B, D], a row for each sample of x."""
    tensor(name, t, 2, "[B, D]")
    floating(name, t)
    same_device(name, t, x)
    B, D = t.shape
    tokens = x.shape[:-1].numel()
    fits = B in (1, x.shape[0]) if x.dim() > 2 else B > 0 and tokens % B == 0
    if D != x.shape[-1] or not fits:
        samples = f"1 or {x.shape[0]}" if x.dim() > 2 else f"a divisor of T = {tokens}"
        raise ValueError(
            f"{name}: expected [B, D = {x.shape[-1]}] with B = {samples}, got {shape_of(t)}"
        )


def weights(x, router, w1, w2, b1, b2, k, shared, act, dtype) -> None:
    """w1 [F, D] (gated [2F, D] or a pair), w2 [D, F], b1, b2, and how F splits into experts."""
    activation(act)
    D, E = x.shape[-1], router.shape[0]
    tensor("w2", w2, 2, "[D, F]")
    F = w2.shape[1]
    if w2.shape[0] != D:
        raise ValueError(f"w2: expected [D = {D}, F], got {shape_of(w2)}")
    pair = isinstance(w1, (tuple, list))
    if pair and (not is_gated(act) or len(w1) != 2):
        raise ValueError(
            f"w1: a pair (up, gate) needs a gated activation ({', '.join(GATED)}), got "
            f"{len(w1)} tensors with activation={act!r}"
        )
    rows = 2 * F if is_gated(act) and not pair else F
    legend = "[2F, D]" if rows != F else "[F, D]"
    parts = [("w1[0]", w1[0]), ("w1[1]", w1[1])] if pair else [("w1", w1)]
    if pair and b1 is not None and not isinstance(b1, (tuple, list)):
        raise TypeError("b1: expected None or a pair (up, gate) like w1, got one tensor")
    biases = [] if b1 is None else [("b1[0]", b1[0]), ("b1[1]", b1[1])] if pair else [("b1", b1)]
    for name, w in parts:
        shape(name, w, (rows, D), f"{legend} with F = w2.shape[1]")
    for name, b in biases:
        shape(name, b, (rows,), legend.replace(", D", ""))
    if b2 is not None:
        shape("b2", b2, (D,), "[D]")
        biases.append(("b2", b2))
    for name, t in [*parts, ("w2", w2), *biases]:
        floating(name, t)
        same_device(name, t, x)
        if dtype is not None:
            same_dtype(name, t, dtype)
        unit_inner_stride(name, t)
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared <= F:
        raise ValueError(f"shared: expected an int in 0..F = {F}, got {shared!r}")
    if (F - shared) % E or (k > 0 and F == shared):
        raise ValueError(
            f"shared: F - shared must be E = {E} experts of equal size, got F = {F}, shared = "
            f"{shared}: {F - shared} neurons"
        )


def routing(r, tokens: int, num_experts: int, k: int, x: torch.Tensor) -> None:
    """A Routing of an earlier call that fits this one."""
    if not isinstance(r, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(r).__name__}")
    expected = {
        "ids": (tokens, k),
        "offsets": (num_experts + 1,),
        "order": (tokens * k,),
        "inverse": (tokens * k,),
    }
    for name, size in expected.items():
        t = getattr(r, name)
        shape(f"routing.{name}", t, size, "the shape for this x, router and top_k")
        if t.dtype != torch.int32:
            raise TypeError(f"routing.{name}: expected int32, got {shape_of(t)}")
        same_device(f"routing.{name}", t, x)
