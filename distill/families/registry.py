"""Which family a model is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from d2m_models.checkpoints.pipelines import read_config, read_index
from d2m_models.checkpoints.places import may_be_hub_name
from distill.errors import UserError, library_errors
from distill.families.family import Family
from distill.families.flux import Flux, Flux2
from distill.families.images import QwenImage, StableDiffusion3, ZImage
from distill.families.pixart import PixArt
from distill.families.wan import Wan

FAMILIES: list[type[Family]] = [Flux, StableDiffusion3, QwenImage, PixArt, ZImage, Flux2, Wan]


def find_family(name: str) -> type[Family]:
    """The family that has a transformer class of this name."""
    for family in FAMILIES:
        if name in family.transformers:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.transformers)
    raise UserError(
        f"{name} is of no family that can be distilled; expected one of {known}, "
        "or one that an adapter of your own in distill.families.registry.FAMILIES knows"
    )


def family_of(model: nn.Module) -> Family:
    """The adapter of a transformer, dense or converted."""
    return find_family(type(model).__name__)(model.config)


def open_family(model: str) -> Family:
    """The family of a pipeline's folder or hub id; FLUX.1 where nothing says what it is."""
    with library_errors():
        index = read_index(model) if Path(model).expanduser().is_dir() else _from_hub(model)
        name = (index or {}).get("transformer", [None, None])[1]
        if name is None or find_family(name) is Flux:
            return Flux()
        return find_family(name)(read_config(model, "transformer"))


def _from_hub(model: str) -> dict[str, Any] | None:
    return read_index(model) if may_be_hub_name(model) else None
