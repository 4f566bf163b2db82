"""Where a run's batches come from: one function for every `data.name` of a configuration.

A source has `batch(seed, step, count, stream="train", rows=None)`, a pure function of its arguments
(see `distill.data.batch`), and the sizes `channels`, `text_dim` and `pooled_dim` of what it gives.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from distill.configs.sections import DataConfig
from distill.data.digits import ClassPrompts, Digits
from distill.data.icons import Icons
from distill.data.photos import Photos
from distill.errors import UserError
from distill.families.family import Family
from distill.families.flux import Flux
from distill.families.registry import family_of


def open_source(config: DataConfig, model: nn.Module | None = None, device: str = "cpu") -> Any:
    """The training data of `config`.

    Args:
        model: the transformer that is to take the batches; sizes that do not fit are an error, and
            guidance is given if it embeds one.
        device: where text encoders run.
    """
    family = Flux() if model is None else family_of(model)
    if config.name == "shards":
        from distill.data.prepared import open_shards

        embeds = model is not None and getattr(model.config, "guidance_embeds", False)
        source = open_shards(config, device, config.guidance if embeds else None, family)
    elif isinstance(family, Flux):
        source = built_in(config)
    else:
        raise UserError(
            f"data.name is {config.name!r}, which a {type(model).__name__} does not take; expected "
            "'shards', a folder of `d2m prepare --model` with its own pipeline"
        )
    if model is not None:
        check_fit(source, family, config.name)
    return source


BUILT_IN = {"digits": Digits, "photos": Photos, "icons": Icons}


def built_in(config: DataConfig, split: str = "train") -> ClassPrompts:
    """The source of a `data.name` that is not "shards"."""
    more = {"fonts": config.fonts, "words": config.words, "dropout": config.caption_dropout}
    return BUILT_IN[config.name](
        split, config.timesteps, config.timestep_grid, **more if config.name == "icons" else {}
    )


def data_fingerprint(config: DataConfig) -> str | None:
    """What tells prepared data apart from other data in a folder of the same name, before anything
    large is loaded; None for data that is built in.
    """
    if config.name != "shards":
        return None
    from distill.data.prepared import folder_fingerprint

    return folder_fingerprint(config)


def check_fit(source: Any, family: Family, name: str) -> None:
    """A UserError unless the model takes tokens, text and pooled text of the source's sizes."""
    have = family.sizes()
    want = (source.channels, source.text_dim, source.pooled_dim)
    if have != want:
        raise UserError(
            f"the model takes (channels, text, pooled) = {have}, {name} are {want}; expected the "
            "same sizes"
        )
