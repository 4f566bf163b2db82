"""`d2m sample` for models of built-in data: icons of given words, or each of the ten digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distill.data.digits import Digits
from distill.data.icons import Icons
from distill.errors import UserError
from distill.sampling import sample
from distill.study.pictures import grid_png

STEPS, GUIDANCE = 20, 3.0


def kind_of(config: Mapping[str, Any]) -> type | None:
    """Which built-in data a model of this configuration takes, by the sizes of its inputs."""
    keys = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    sizes = tuple(config.get(key) for key in keys)
    kinds = {(k.channels, k.text_dim, k.pooled_dim): k for k in (Digits, Icons)}
    return kinds.get(sizes)


def draw(
    model: nn.Module, prompts: Sequence[str], path: Path, *, steps: int | None = None,
    count: int = 2, guidance: float | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Writes `count` rows of samples as a PNG: a column a prompt of an icons model, whose first
    word may be a font ("mdi" if it is none), or a digit.

    Raises:
        UserError: the model is of other data, or there are no prompts, or a digits model is given
            some.
    """
    kind = kind_of(model.config)
    if kind is None:
        raise UserError("the model's inputs are neither icons nor digits; for any other model: "
                        "d2m sample MODEL PROMPT")  # fmt: skip
    if (kind is Icons) != bool(prompts):
        raise UserError("a model of icons wants words, such as d2m sample icons 'cloud lightning'; "
                        "one of digits none")  # fmt: skip
    source = kind("train")
    if kind is Icons:
        noise = source.asked(prompts, seed, count)
    else:
        noise, guidance = source.noise_batch(seed, count), 1.0
        prompts = [str(d) for d in range(Digits.num_classes)]
    drawn = sample(
        model, noise, steps or STEPS, guidance=GUIDANCE if guidance is None else guidance
    )
    images = source.to_images(drawn)
    rows = {f"{i + 1}": (f"seed {seed}", list(images[i::count])) for i in range(count)}
    grid_png(path, rows, ["\n".join(p.split()) for p in prompts])
