"""Dense diffusion transformers turned into Mixture-of-Experts and Mixture-of-Blocks models.

Names are loaded on first use, so that `d2m_models.config` and `d2m_models.partition` work on a
machine without diffusers.
"""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "MoEConfig": "config",
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
    "set_top_k": "moe",
    "moe_layers": "moe",
    "MixtureOfBlocks": "mob",
    "MoBRouting": "mob",
    "AdaLNBasis": "adaln",
    "FluxMoETransformer2DModel": "flux",
    "FluxMoEOutput": "output",
    "FluxMoEAux": "output",
    "block_features": "output",
    "convert_flux": "conversion",
    "convert": "generic",
    "to_dense": "conversion",
    "ffn_names": "conversion",
    "adaln_state": "conversion",
    "prune_mlp": "prune",
    "prune_depth": "prune",
    "account": "accounting",
    "count_parameters": "generic",
    "convert_checkpoint": "stream",
    "checkpoint_to_dense": "restore",
    "verify_checkpoint": "verify",
    "read_lora": "fuse",
    "fuse_lora": "fuse",
    "inspect": "inspection",
    "diff": "compare",
    "record_ffns": "formation",
    "coactivation_orders": "formation",
    "fit_routers": "formation",
    "TopKSchedule": "schedule",
    "measure_block_mse": "grouping",
    "propose_groups": "grouping",
    "draw_block_mse": "grouping",
    "Account": "accounting",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'd2m_models' has no attribute {name!r}")
    value = getattr(import_module(f"d2m_models.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))
