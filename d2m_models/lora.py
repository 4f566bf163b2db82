"""LoRAs made for the dense FLUX, on a model whose neurons lie in another order.

Shapes: D width, F neurons, r rank. A LoRA of w1 is B [F, r] A [r, D]: its B rows are neurons; one
of w2 is B [D, r] A [r, F]: its A columns are. Files hold the dense order, a loaded adapter the
model's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2m_models.moe import moe_layers
from d2m_models.partition import inverse_order, permute_neurons

_ADALN = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")


def permute_adapter(
    model: nn.Module, adapter: str, order_of: Callable[[Tensor], Tensor] = lambda order: order
) -> None:
    """Puts the neurons of a loaded LoRA adapter in the model's order, in place.

    Args:
        order_of: what to do with each layer's `neuron_order`; `inverse_order` restores dense order.
    """
    for layer in moe_layers(model).values():
        up, down = layer.linears()
        order_F = order_of(layer.neuron_order)
        if adapter in getattr(up, "lora_B", {}):
            for parameter in up.lora_B[adapter].parameters():  # weight [F, r] and perhaps bias [F]
                parameter.data.copy_(permute_neurons(parameter, order_F, 0))
        if adapter in getattr(down, "lora_A", {}):
            weight = down.lora_A[adapter].weight
            first = weight.shape[1] - order_F.numel()  # proj_out: attention columns come first
            weight.data.copy_(permute_neurons(weight, order_F, 1, first))


@contextmanager
def dense_order(model: nn.Module, adapter: str):
    """The adapter's neurons in dense order for the time of the block, e.g. to save it."""
    permute_adapter(model, adapter, inverse_order)
    try:
        yield
    finally:
        permute_adapter(model, adapter)


def check_lora_keys(state: dict[str, torch.Tensor]) -> None:
    """Refuses a LoRA of AdaLN Linears for a model whose AdaLN is compressed."""
    bad = sorted({key.split(".lora")[0] for key in state if any(a in key for a in _ADALN)})
    if bad:
        raise ValueError(
            f"the LoRA changes {len(bad)} AdaLN Linears ({', '.join(bad[:3])}, ...), which this "
            f"model holds in compressed form; fuse it into the dense model before converting, or "
            f"drop these keys"
        )


class DenseLoRAMixin:
    """Loads and saves LoRA adapters in the dense model's neuron order."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict,
        prefix="transformer",
        hotswap=False,
        **kwargs,
    ):
        """As diffusers'; the neurons of a dense FLUX LoRA are put in this model's order."""
        source = pretrained_model_name_or_path_or_dict
        if self.d2m_config.adaln_dim is not None and isinstance(source, dict):
            check_lora_keys(source)
        before = set(getattr(self, "peft_config", {}))
        super().load_lora_adapter(source, prefix=prefix, hotswap=hotswap, **kwargs)
        after = set(getattr(self, "peft_config", {}))
        for adapter in {kwargs["adapter_name"]} if hotswap else after - before:
            permute_adapter(self, adapter)

    def save_lora_adapter(self, save_directory, adapter_name="default", **kwargs):
        """As diffusers', in the dense model's order, so that the file serves both models."""
        with dense_order(self, adapter_name):
            super().save_lora_adapter(save_directory, adapter_name, **kwargs)
