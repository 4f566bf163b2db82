"""Dense diffusion transformers turned into Mixture-of-Experts and Mixture-of-Blocks models.

Names are loaded on first use, so that `d2m_models.config` and `d2m_models.partition` work on a
machine without diffusers.
"""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "MoEConfig": "config",
    "MoEShare": "config",
    "MoBConfig": "config",
    "FluxMoEConfig": "config",
    "PRESETS": "presets",
    "resolve_config": "presets",
    "neuron_order_from_importance": "partition",
    "random_neuron_order": "partition",
    "coactivation_neuron_order": "partition",
    "inverse_order": "partition",
    "permute_neurons": "partition",
    "effective_weight": "weights",
    "MoEFeedForward": "moe",
    "set_top_k": "topk",
    "moe_layers": "topk",
    "MixtureOfBlocks": "mob",
    "MoBRouting": "mob",
    "AdaLNBasis": "adaln",
    "FluxMoETransformer2DModel": "flux",
    "load_pipeline": "checkpoints.pipelines",
    "FluxMoEOutput": "output",
    "FluxMoEAux": "output",
    "block_features": "output",
    "convert_flux": "conversion.flux",
    "convert": "conversion.any_dit",
    "to_dense": "conversion.flux",
    "ffn_names": "conversion.flux",
    "adaln_state": "conversion.flux",
    "prune_mlp": "conversion.prune",
    "prune_depth": "conversion.prune",
    "account": "inspection.accounting",
    "add_mob": "conversion.any_mob",
    "count_parameters": "conversion.any_dit",
    "convert_checkpoint": "checkpoints.convert",
    "checkpoint_to_dense": "checkpoints.restore",
    "verify_checkpoint": "checkpoints.verify",
    "read_lora": "checkpoints.lora_file",
    "fuse_lora": "checkpoints.lora_file",
    "inspect": "inspection.table",
    "diff": "inspection.differences",
    "record_ffns": "conversion.formation",
    "coactivation_orders": "conversion.formation",
    "fit_routers": "conversion.formation",
    "TopKSchedule": "topk",
    "measure_block_mse": "conversion.grouping",
    "propose_groups": "conversion.grouping",
    "draw_block_mse": "inspection.figures",
    "Account": "inspection.accounting",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    # diffusers loads the class of a saved pipeline only from a module that has ModelMixin as well
    if name == "ModelMixin":
        return import_module("diffusers").ModelMixin
    if name not in _EXPORTS:
        raise AttributeError(f"module 'd2m_models' has no attribute {name!r}")
    value = getattr(import_module(f"d2m_models.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))
