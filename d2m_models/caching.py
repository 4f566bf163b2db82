"""Which of diffusers' caches a model with MoB groups can have."""

from __future__ import annotations

from typing import Any

from torch import nn

from d2m_models.output import group_names


def check_cache(model: nn.Module, config: Any) -> None:
    """Raises unless the cache is right for a FLUX model whose groups skip blocks.

    MagCache and TaylorSeer count every block's calls. First-block caching acts on the first and on
    the last block, which must therefore always run.
    """
    if model.d2m_config.mob is None:
        return
    if type(config).__name__ != "FirstBlockCacheConfig":
        raise ValueError(
            f"{type(config).__name__} counts the calls of every block, which differ between "
            f"the blocks of a MoB group; use FirstBlockCacheConfig, or a model without MoB"
        )
    kinds = ("transformer_blocks", "single_transformer_blocks")
    names = [f"{kind}.{i}" for kind in kinds for i in range(len(getattr(model, kind)))]
    grouped = {name for group in group_names(model.d2m_config).values() for name in group}
    ends = [name for name in (names[0], names[-1]) if name in grouped]
    if ends:
        raise ValueError(
            f"first-block caching compares the first block's output and ends at the last block, "
            f"but {' and '.join(ends)} may be skipped by a MoB group; keep the first and the last "
            f"block out of groups (see propose_groups)"
        )
