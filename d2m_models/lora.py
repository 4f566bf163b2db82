"""LoRAs made for the dense FLUX, on a model whose neurons lie in another order.

Shapes: D width, F neurons, r rank. A LoRA of w1 is B [F, r] A [r, D]: its B rows are neurons; one
of w2 is B [D, r] A [r, F]: its A columns are. Files hold the dense order, a loaded adapter the
model's; where experts hold copies of neurons, each copy gets the neuron's rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2m_models.partition import inverse_order, is_permutation, permute_neurons
from d2m_models.topk import moe_layers

_ADALN = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")


def permute_adapter(model: nn.Module, adapter: str) -> None:
    """Puts the neurons of a loaded LoRA adapter, now in dense order, in the model's, in place."""
    for layer in moe_layers(model).values():
        up, down = layer.linears()
        order_F = layer.neuron_order
        if adapter in getattr(up, "lora_B", {}):
            for parameter in up.lora_B[adapter].parameters():  # weight [F, r] and perhaps bias [F]
                parameter.data.copy_(permute_neurons(parameter, order_F, 0))
        if adapter in getattr(down, "lora_A", {}):
            weight = down.lora_A[adapter].weight
            first = weight.shape[1] - order_F.numel()  # proj_out: attention columns come first
            weight.data.copy_(permute_neurons(weight, order_F, 1, first))


def _in_order(model: nn.Module, state: dict[str, Tensor], prefix: str, to_dense: bool) -> None:
    """Puts the LoRA tensors of a state dict in dense order, or in the model's, in place."""
    if not any(".lora_" in key for key in state):
        return
    names = {id(module): name for name, module in model.named_modules()}
    for layer in moe_layers(model).values():
        if not is_permutation(layer.neuron_order):
            continue  # copies have no place in the dense order: the model's own stays
        order_F = inverse_order(layer.neuron_order) if to_dense else layer.neuron_order
        up, down = (f"{prefix}{names[id(linear)]}" for linear in layer.linears())
        for key in [k for k in state if k.startswith((f"{up}.lora_B.", f"{down}.lora_A."))]:
            dim = 0 if key.startswith(up) else 1
            first = state[key].shape[dim] - order_F.numel()
            state[key] = permute_neurons(state[key], order_F, dim, first)


def keep_state_in_dense_order(model: nn.Module) -> None:
    """Lets `state_dict` give, and `load_state_dict` take, LoRA tensors in the dense order.

    So whatever saves an adapter by way of the state dict (`get_peft_model_state_dict` and with it
    `pipe.save_lora_weights`) writes a file that serves the dense model too.
    """

    model.register_state_dict_post_hook(_after_state_dict)
    model.register_load_state_dict_pre_hook(_before_load)


# Not closures: a model with these hooks can be pickled, and sent to a process that is spawned.
def _after_state_dict(module, state, prefix, _metadata):
    _in_order(module, state, prefix, to_dense=True)


def _before_load(module, state, prefix, *_):
    _in_order(module, state, prefix, to_dense=False)


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
    """Loads LoRA adapters that are in the dense model's neuron order."""

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict, prefix="transformer", hotswap=False, **kwargs
    ):
        """As diffusers'; the neurons of a dense FLUX LoRA are put in this model's order."""
        source = pretrained_model_name_or_path_or_dict
        if self.d2m_config.adaln_dim is not None and isinstance(source, dict):
            check_lora_keys(source)
        super().load_lora_adapter(source, prefix=prefix, hotswap=hotswap, **kwargs)
        if hotswap:  # writes into the parameters, past load_state_dict
            permute_adapter(self, kwargs["adapter_name"])
