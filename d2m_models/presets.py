"""The paper's models (section 4.1) and its dense comparators, by name."""

from __future__ import annotations

from d2m_models.config import FluxMoEConfig, MoBConfig, MoEConfig


def consecutive_groups(first: int, count: int, size: int) -> tuple[tuple[int, ...], ...]:
    """`count` groups of `size` consecutive blocks, the first one starting at block `first`."""
    return tuple(tuple(range(first + g * size, first + (g + 1) * size)) for g in range(count))


# Section 4.1. The paper gives sizes of groups, not their places. Ours: of the 16 MoE double blocks
# 3..18 the last stays outside; single-block groups sit in the middle of the 38, away from both
# ends. So the first and the last block always run, which first-block caching needs. HyperFLUX
# models have these same structures; only their teacher differs (a LoRA is fused into it).
_DOUBLE_GROUPS = consecutive_groups(3, 5, 3)

PRESETS: dict[str, FluxMoEConfig] = {
    "flux-moe-l": FluxMoEConfig(adaln_dim=256),
    "flux-moe-m": FluxMoEConfig(adaln_dim=256, mob=MoBConfig(double_groups=_DOUBLE_GROUPS)),
    "flux-moe-s": FluxMoEConfig(
        adaln_dim=256,
        mob=MoBConfig(double_groups=_DOUBLE_GROUPS, single_groups=consecutive_groups(11, 3, 5)),
    ),
    "flux-moe-xs": FluxMoEConfig(
        adaln_dim=256,
        mob=MoBConfig(double_groups=_DOUBLE_GROUPS, single_groups=consecutive_groups(6, 5, 5)),
    ),
    # Dense comparators: FLUX.1-Lite and FLUX-Mini are FLUX with fewer blocks.
    "flux-lite": FluxMoEConfig(moe=None, dense_double_blocks=(), num_layers=8),
    "flux-mini": FluxMoEConfig(
        moe=None, dense_double_blocks=(), num_layers=5, num_single_layers=10
    ),
}


def find_preset(name: str) -> FluxMoEConfig:
    """The preset of that name; "hyper-flux-moe-l" is "flux-moe-l" made of another teacher."""
    known = name.removeprefix("hyper-")
    if known not in PRESETS or (known != name and PRESETS[known].moe is None):
        raise ValueError(
            f"unknown preset {name!r}; presets are {sorted(PRESETS)}, and hyper-flux-moe-* for the "
            f"same structures from a teacher with a few-step LoRA"
        )
    return PRESETS[known]


def resolve_config(
    config: FluxMoEConfig | MoEConfig | str, num_layers: int, num_single_layers: int
) -> FluxMoEConfig:
    """A `FluxMoEConfig` for a dense model of the given depth.

    A preset name is looked up; a bare `MoEConfig` converts every FFN: no dense blocks, no MoB, no
    AdaLN compression. A depth that differs from the configuration's is an error.
    """
    what = "config"
    if isinstance(config, str):
        what, config = f"the preset {config}", find_preset(config)
    if isinstance(config, MoEConfig):
        config = FluxMoEConfig(
            moe=config,
            dense_double_blocks=(),
            num_layers=num_layers,
            num_single_layers=num_single_layers,
        )
    if not isinstance(config, FluxMoEConfig):
        raise TypeError(
            "config must be a FluxMoEConfig, a MoEConfig or a preset name, "
            f"got {type(config).__name__}"
        )
    if (config.num_layers, config.num_single_layers) != (num_layers, num_single_layers):
        raise ValueError(
            f"{what} is for {config.num_layers} double and {config.num_single_layers} single "
            f"blocks, the dense model has {num_layers} and {num_single_layers}; expected a "
            f"structure (d2m convert --structure FILE) with num_layers: {num_layers} and "
            f"num_single_layers: {num_single_layers}"
        )
    return config
