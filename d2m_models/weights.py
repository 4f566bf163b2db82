"""The one function that reads a Linear's weight for code that does not call `Linear.forward`.

The MoE path hands weights to `moe_ffn`, so whatever hangs on a Linear's forward would be passed by:
layerwise casting (the raw weight is float8), group and CPU offload (the weight is elsewhere), LoRA
(the delta lives in side matrices), quantizers (the weight is packed). `effective_weight` gives the
weight that the Linear's own forward would use, or raises and says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from d2m_models.private import fake_kinds, is_hooked

# Fake ones have shapes without data, for whoever plans or traces a model before it is loaded.
_ORDINARY = (nn.Parameter, Tensor, *fake_kinds())


class _StopAtLinear(TorchFunctionMode):
    """Hands the weight and bias of the first `F.linear` to `on_linear` instead of multiplying."""

    def __init__(self, on_linear: Callable[[Tensor, Tensor | None], None]):
        super().__init__()
        self.on_linear = on_linear

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        call = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        self.on_linear(call["weight"], call.get("bias"))
        return call["input"].new_empty(0, call["weight"].shape[0])


def is_plain(linear: nn.Module) -> bool:
    """True if nothing hangs on the Linear's forward, so that its `.weight` is the weight."""
    return type(linear) is nn.Linear and not is_hooked(linear) and type(linear.weight) in _ORDINARY


def stays_in_place(linear: nn.Module) -> bool:
    """True for an ordinary Linear, or one under peft's LoRA: no hook moves or casts its weight."""
    while hasattr(linear, "base_layer"):
        linear = linear.base_layer
    return is_plain(linear)


def effective_weight(
    linear: nn.Module, use: Callable[[Tensor, Tensor | None], Any] | None = None
) -> Any:
    """The (weight [N, K], bias [N] or None) that `linear.forward` would multiply with.

    Pre- and post-forward hooks of the Linear run around the reading; active LoRA adapters are
    merged, W + sum_a scaling_a * B_a A_a, differentiably; quantized weights are dequantized.

    Args:
        linear: an `nn.Linear`, or one wrapped by peft or a quantizer.
        use: called with (weight, bias) while the hooks still hold the weight in place (an offloaded
            weight is freed right after); its result is returned. Without it (weight, bias) is
            returned, which keeps the weight alive by itself.

    Raises:
        RuntimeError: the weight cannot be read this way; the message says what to do.
    """
    if use is None:  # `use or ...` is a branch on a closure, which Dynamo of torch 2.11 refuses
        use = lambda weight, bias: (weight, bias)  # noqa: E731
    if is_plain(linear):
        return use(linear.weight, linear.bias)
    return _read(linear, use)


def _read(linear: nn.Module, use: Callable) -> Any:
    # peft's layers own no weight: they wrap the Linear as `base_layer`.
    if hasattr(linear, "base_layer"):
        return _read_lora(linear, use)
    if type(linear).__module__.startswith("bitsandbytes"):
        return _read_bitsandbytes(linear, use)
    result: list[Any] = []

    def on_linear(weight: Tensor, bias: Tensor | None) -> None:
        # Aliases, because a post hook may swap the Parameter's storage (`param.data = ...`) while
        # autograd still needs this one.
        weight = _dense(weight, linear)
        result.append(use(weight.view_as(weight), None if bias is None else bias.view_as(bias)))

    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):
        raise RuntimeError(_unreadable(linear, "it has no weight tensor"))
    # A zero-row input runs every hook, whatever kind, and costs no arithmetic.
    device = None if weight.device.type == "meta" else weight.device
    with _StopAtLinear(on_linear):
        linear(torch.empty(0, linear.in_features, device=device))
    if len(result) != 1:
        raise RuntimeError(_unreadable(linear, "its forward does not end in one F.linear"))
    return result[0]


def _read_bitsandbytes(linear: nn.Module, use: Callable) -> Any:
    """int8 and 4-bit Linears, whose kernels multiply the packed weight themselves."""
    if is_hooked(linear):
        raise RuntimeError(_unreadable(linear, "it is both quantized and offloaded"))
    if type(linear).__name__ not in ("Linear8bitLt", "Linear4bit"):
        raise RuntimeError(_unreadable(linear, "this kind is not known"))
    from diffusers.quantizers.bitsandbytes.utils import dequantize_bnb_weight

    state = getattr(linear.weight, "quant_state", None) or getattr(linear, "state", None)
    packed = state is not None and not linear.weight.is_floating_point()
    weight = linear.weight
    if packed:
        wanted = torch.float32 if linear.bias is None else linear.bias.dtype
        dtype = getattr(linear, "compute_dtype", None) or wanted
        weight = dequantize_bnb_weight(linear.weight, state, dtype=dtype).to(dtype)
    return use(weight, linear.bias)


def _unreadable(linear: nn.Module, why: str) -> str:
    return (
        f"the MoE path cannot read the weight of a {type(linear).__name__} "
        f"({type(linear).__module__}): {why}. Dequantize the model, or leave FFN Linears out of "
        f"the quantization (modules_to_not_convert / modules_to_not_quantize)"
    )


def _dense(weight: Tensor, linear: nn.Module) -> Tensor:
    """A quantized tensor subclass as an ordinary tensor."""
    if type(weight) in _ORDINARY:
        if not weight.is_floating_point():
            raise RuntimeError(_unreadable(linear, f"it is packed as {weight.dtype}"))
        return weight
    dequantize = getattr(weight, "dequantize", None)
    # torch.Tensor itself has a dequantize for its own quantized dtypes; only an override counts.
    if dequantize is not None and type(weight).dequantize is not Tensor.dequantize:
        return dequantize()
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise RuntimeError(_unreadable(linear, f"its weight is a {type(weight).__name__}"))
    return weight


def _read_lora(layer: nn.Module, use: Callable) -> Any:
    if getattr(layer, "disable_adapters", False):
        if getattr(layer, "merged", False):
            layer.unmerge()  # what peft's own forward does
        return effective_weight(layer.base_layer, use)
    if getattr(layer, "merged", False):
        return effective_weight(layer.base_layer, use)
    kind = type(layer).__name__
    if not hasattr(layer, "lora_A"):
        raise RuntimeError(
            f"the MoE path cannot apply a {kind} adapter; merge it first (fuse_lora)"
        )
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    deltas = []
    for adapter in active:
        if adapter in getattr(layer, "lora_variant", {}):
            raise RuntimeError(
                f"adapter {adapter!r} is a LoRA variant (such as DoRA), which is no plain weight "
                f"delta; merge it first (fuse_lora)"
            )
        dropout = layer.lora_dropout[adapter]
        if layer.training and getattr(dropout, "p", 0.0) > 0:
            raise RuntimeError(
                f"adapter {adapter!r} has lora_dropout={dropout.p}, which a merged delta cannot "
                f"apply; train it with lora_dropout=0"
            )
        deltas.append(_lora_delta(layer, adapter))

    def merged(weight: Tensor, bias: Tensor | None) -> Any:
        for delta, delta_bias in deltas:
            weight = weight + delta.to(weight.device, weight.dtype)
            if delta_bias is not None:
                bias = delta_bias if bias is None else bias + delta_bias.to(bias.device, bias.dtype)
        return use(weight, bias)

    return effective_weight(layer.base_layer, merged)


def _lora_delta(layer: nn.Module, adapter: str) -> tuple[Tensor, Tensor | None]:
    """scaling * B A, taken in fp32 when A and B are half precision."""
    a_rK, _ = effective_weight(layer.lora_A[adapter])
    b_Nr, bias_N = effective_weight(layer.lora_B[adapter])
    scaling = layer.scaling[adapter]
    delta = (b_Nr.float() @ a_rK.float()) * scaling
    if getattr(layer, "fan_in_fan_out", False):
        delta = delta.t()
    return delta, None if bias_N is None else bias_N * scaling
