"""From a dense FLUX to MoE and MoB, and back.

Shapes: D width, F neurons of an FFN, A AdaLN input, n calibration samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from d2m_models.adaln import AdaLNBasis, adaln_linears, check_samples, sample_conditioning
from d2m_models.config import FluxMoEConfig, MoEConfig, named_blocks
from d2m_models.flux import DENSE_ARGUMENTS, FluxMoETransformer2DModel
from d2m_models.moe import ROUTER_STD
from d2m_models.partition import check_orders, inverse_order, permute_neurons
from d2m_models.presets import resolve_config
from d2m_models.topk import moe_layers

logger = logging.getLogger(__name__)


def ffn_tensors(name: str) -> tuple[tuple[str, int, str], ...]:
    """The tensors of one FLUX FFN: (parameter name, dimension of its neurons, kind)."""
    if name.startswith("single_transformer_blocks."):
        up, down = f"{name}.proj_mlp", f"{name}.proj_out"
    else:
        up, down = f"{name}.net.0.proj", f"{name}.net.2"
    return ((f"{up}.weight", 0, "w1"), (f"{up}.bias", 0, "b1"), (f"{down}.weight", 1, "w2"))


def ffn_linears(model: nn.Module) -> dict[str, tuple[nn.Linear, nn.Linear, int]]:
    """FFN name -> (up Linear, down Linear, first column of the down Linear that is the FFN's).

    Names are ".ff" and ".ff_context" of double blocks, and single blocks, whose `proj_out` acts on
    [attention | mlp].
    """
    found: dict[str, tuple[nn.Linear, nn.Linear, int]] = {}
    for name, block in named_blocks(model).items():
        if name.startswith("single"):
            first = block.proj_out.in_features - block.proj_mlp.out_features
            found[name] = (block.proj_mlp, block.proj_out, first)
        else:
            for part in ("ff", "ff_context"):
                net = getattr(block, part).net
                found[f"{name}.{part}"] = (net[0].proj, net[2], 0)
    return found


def ffn_names(model: nn.Module) -> list[str]:
    """Names of a FLUX model's FFNs: ".ff" and ".ff_context" of double blocks, single blocks."""
    return list(ffn_linears(model))


def ffn_widths(model: nn.Module) -> dict[str, int]:
    """F of every FLUX FFN by name."""
    return {name: up.out_features for name, (up, _, _) in ffn_linears(model).items()}


def permute_ffn(state: dict[str, Tensor], name: str, order_F: Tensor) -> None:
    """Puts one FFN's neurons in the given order, in a FLUX state dict, in place."""
    for key, dim, _ in ffn_tensors(name):
        first = state[key].shape[dim] - order_F.numel()  # proj_out: attention columns come first
        state[key] = permute_neurons(state[key], order_F, dim, first)


def check_dense_flux(model: nn.Module, argument: str = "dense") -> None:
    if not isinstance(model, FluxTransformer2DModel):
        raise TypeError(
            f"{argument} must be a diffusers FluxTransformer2DModel, got {type(model).__name__}; "
            f"for other models use d2m_models.convert"
        )
    if moe_layers(model) or getattr(getattr(model, "d2m_config", None), "mob", None):
        raise ValueError(f"{argument} is already converted; convert the dense model instead")


@torch.no_grad()
def convert_flux(
    dense: FluxTransformer2DModel,
    config: FluxMoEConfig | MoEConfig | str,
    neuron_order: Mapping[str, Tensor] | None = None,
    adaln_calibration: Tensor | None = None,
    generator: torch.Generator | None = None,
    copies: bool = False,
) -> FluxMoETransformer2DModel:
    """A new MoE/MoB model with the dense model's weights; the dense model is left untouched.

    Nothing but the order of neurons changes: run with `set_top_k("dense")` and without AdaLN
    compression, the result computes what `dense` computes, up to summation order.

    Args:
        dense: a FLUX model as diffusers loads it (LoRAs fused or unloaded).
        config: a `FluxMoEConfig`, a preset name, or a bare `MoEConfig` (every FFN is converted; no
            dense blocks, no MoB, no AdaLN compression).
        neuron_order: {FFN name: LongTensor[F], new position -> dense neuron}, see
            `neuron_order_from_importance`; None keeps the dense order, which serves for tests.
        adaln_calibration: temb samples [n, D] for AdaLN compression; by default drawn by
            `sample_conditioning`. The relative error per Linear is in `model.adaln_report`.
        generator: for the routers, which start at N(0, 0.02).
        copies: neuron_order may name a neuron several times, and others not at all; the result
            only makes sense with other w2, and can not be made dense again.

    Returns:
        A model on dense's device, in its dtype (routers in fp32), in evaluation mode.
    """
    check_dense_flux(dense)
    structure = resolve_config(
        config, len(dense.transformer_blocks), len(dense.single_transformer_blocks)
    )
    orders = _check_orders(dense, neuron_order, copies)
    state = {}
    for key, value in dense.state_dict().items():
        if "lora_" in key or ".base_layer." in key:
            raise ValueError(
                f"dense carries adapter weights ({key}); fuse or unload its LoRAs first"
            )
        state[key] = value.detach().clone()
    model = skeleton(dense, structure)
    for name, layer in moe_layers(model).items():
        order_F = orders.get(name)
        if order_F is None:
            if neuron_order is not None:
                raise ValueError(
                    f"neuron_order lacks {name!r}; add it (torch.arange(F) keeps the dense order)"
                )
            order_F = torch.arange(layer.neuron_order.numel())
        else:
            permute_ffn(state, name, order_F)
        state[f"{name}.neuron_order"] = order_F.to(dense.device, torch.int32)
    report: dict[str, float] = {}
    if structure.adaln_dim is not None:
        report = _compress_adaln(dense, structure.adaln_dim, adaln_calibration, state)
    elif adaln_calibration is not None:
        raise ValueError("adaln_calibration is given, but the configuration has adaln_dim=None")
    for key, value in model.state_dict().items():
        if key not in state and "router" in key:
            weight = torch.empty(value.shape, dtype=torch.float32)
            nn.init.normal_(weight, std=ROUTER_STD, generator=generator)
            state[key] = weight.to(dense.device)
    model.load_state_dict(state, strict=True, assign=True)
    model.adaln_report = report
    return model.eval()


def model_arguments(dense: FluxTransformer2DModel, structure: FluxMoEConfig | None = None) -> dict:
    """Constructor arguments of a `FluxMoETransformer2DModel` shaped like `dense`.

    Without `structure` the result is structured like `dense` itself.
    """
    arguments = {name: dense.config[name] for name in DENSE_ARGUMENTS}
    if dense.config.get("ff_dims"):
        arguments["ff_dims"] = dict(dense.config["ff_dims"])
    structure = structure or getattr(dense, "d2m_config", None)
    if structure is None:
        structure = FluxMoEConfig(
            moe=None,
            dense_double_blocks=(),
            num_layers=len(dense.transformer_blocks),
            num_single_layers=len(dense.single_transformer_blocks),
        )
    return {**arguments, **structure.to_dict()}


def skeleton(
    model: FluxTransformer2DModel, structure: FluxMoEConfig | None = None
) -> FluxMoETransformer2DModel:
    """The model of `model_arguments`, on the meta device."""
    with torch.device("meta"):
        return FluxMoETransformer2DModel(**model_arguments(model, structure))


def dense_skeleton(
    model: FluxMoETransformer2DModel, owner: str = "the model"
) -> FluxTransformer2DModel:
    """The dense class's model that `model` was made of, on the meta device."""
    if model.config.get("ff_dims"):
        raise ValueError(f"{owner} has pruned FFNs, which FluxTransformer2DModel cannot hold")
    names = (*DENSE_ARGUMENTS, "num_layers", "num_single_layers")
    with torch.device("meta"):
        return FluxTransformer2DModel(**{name: model.config[name] for name in names})


def _check_orders(dense, neuron_order, copies: bool) -> dict[str, Tensor]:
    known = ffn_widths(dense)
    orders = dict(neuron_order or {})
    unknown = sorted(set(orders) - set(known))
    if unknown:
        raise ValueError(f"neuron_order names FFNs the model does not have: {unknown}")
    return check_orders(orders, known, copies)


def _compress_adaln(dense, width: int, temb_nD, state: dict[str, Tensor]) -> dict[str, float]:
    if getattr(dense.config, "adaln_dim", None) is not None:
        raise ValueError("dense has a compressed AdaLN already; set adaln_dim=None")
    if temb_nD is None:
        logger.warning("no adaln_calibration: AdaLN is compressed from random pooled embeddings")
        temb_nD = sample_conditioning(dense)
    check_samples(temb_nD, dense.inner_dim)
    basis = AdaLNBasis.from_samples(temb_nD, width)
    report = {}
    for name, linear in adaln_linears(dense).items():
        weight, bias, report[name] = basis.compress_measured(linear.weight, linear.bias, temb_nD)
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
    at = {"device": dense.device, "dtype": dense.norm_out.linear.weight.dtype}
    weight, bias = basis.down_projection()
    state["adaln_down.weight"], state["adaln_down.bias"] = weight.to(**at), bias.to(**at)
    return report


@torch.no_grad()
def to_dense(
    model: FluxMoETransformer2DModel, adaln: Mapping[str, Tensor] | None = None
) -> FluxTransformer2DModel:
    """The dense FLUX again, neurons in their old order; routers and MoB groups are dropped.

    Args:
        adaln: the dense model's AdaLN tensors by name ("norm_out.linear.weight", ...), which a
            model with compressed AdaLN needs; `adaln_state` takes them from a dense model.
    """
    if not isinstance(model, FluxMoETransformer2DModel):
        raise TypeError(f"model must be a FluxMoETransformer2DModel, got {type(model).__name__}")
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for name, layer in moe_layers(model).items():
        permute_ffn(state, name, inverse_order(layer.neuron_order))
    if model.d2m_config.adaln_dim is not None:
        if adaln is None:
            raise ValueError(
                "the model's AdaLN is compressed: pass adaln=, the dense model's AdaLN tensors "
                "(adaln_state(dense), saved before conversion)"
            )
        state.update({key: value.detach().clone() for key, value in adaln.items()})
    ours = ("router", "neuron_order", "adaln_down")
    state = {key: value for key, value in state.items() if not any(o in key for o in ours)}
    dense = dense_skeleton(model)
    dense.load_state_dict(state, strict=True, assign=True)
    return dense.eval()


def adaln_state(dense: FluxTransformer2DModel) -> dict[str, Tensor]:
    """The AdaLN tensors of a dense model by name: what compression loses."""
    return {
        f"{name}.{part}": getattr(linear, part).detach().clone()
        for name, linear in adaln_linears(dense).items()
        for part in ("weight", "bias")
    }
