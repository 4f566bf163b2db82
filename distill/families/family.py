"""What a family of models is to distillation.

Shapes: B batch, S image tokens, C channels of a token, L text tokens, J text width, P pooled width;
a latent image has F frames of 2 rows x 2 columns of c channels, S = F rows columns, C = 4c.

Latents are stored, mixed with noise and cached as tokens, 2 x 2 patches in rows, whatever the
family; its adapter hands them to the transformer in the layout that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.families.packing import unpack


class Family:
    """Rectified flow: x_t = (1 - t) x0 + t noise, of which the model predicts noise - x0.

    Args:
        config: the transformer's configuration.
    """

    transformers: tuple[str, ...] = ()  # classes of diffusers
    padded = False  # whether text tokens of zeros are padding that the model is told to leave out

    def __init__(self, config: Mapping[str, Any] | None = None):
        self.config = config or {}

    def sizes(self) -> tuple[int, int, int]:
        """(C, J, P) of what the transformer takes; P is 0 without a pooled text."""
        raise NotImplementedError

    # --- training ---------------------------------------------------------------------------

    def inputs(self, batch: Any) -> dict[str, Any]:
        """The transformer's keyword arguments."""
        raise NotImplementedError

    def noised(self, batch: Any) -> Tensor:
        """x_t [B, S, C]."""
        t = batch.t[:, None, None]
        return (1 - t) * batch.x0 + t * batch.noise

    def target(self, batch: Any) -> Tensor:
        """What the model is to predict of a batch, in the layout of `predicted`."""
        return self.latents(batch, batch.noise - batch.x0)

    def output(self, raw: Any) -> Tensor:
        """All that a forward gives, as one tensor: what a student is to imitate."""
        return raw.sample

    def predicted(self, raw: Any) -> Tensor:
        """The part of the output that `target` is compared with."""
        return self.output(raw)

    def latents(self, batch: Any, tokens: Tensor) -> Tensor:
        """Tokens [B, S, C] in the transformer's layout; here [B, c, 2 rows, 2 columns]."""
        return unpack(tokens, batch.grid[1])

    def mask(self, batch: Any) -> Tensor:
        """[B, L] bool: which text tokens are none of the padding, which is zero."""
        return (batch.text != 0).any(-1)

    def guidance(self, batch: Any) -> dict[str, Tensor]:
        return {} if batch.guidance is None else {"guidance": batch.guidance}

    # --- preparation ------------------------------------------------------------------------

    def encode(self, pipe: Any, caption: str, length: int) -> tuple[Tensor, Tensor | None]:
        """(text [l, J], pooled [P] or None) of a caption, by the family's own pipeline."""
        raise NotImplementedError

    def text_rows(self, pipe: Any, length: int) -> int:
        """L for captions of at most `length` tokens; shorter text is padded with zeros."""
        return length

    def scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        """(shift, scale), numbers or [C]: stored tokens are (packed latents - shift) * scale."""
        config = vae.config
        return float(config.get("shift_factor") or 0), float(config.scaling_factor)


class TokenFamily(Family):
    """A transformer that takes tokens as they are stored, and no pooled text."""

    def sizes(self) -> tuple[int, int, int]:
        return self.config["in_channels"], self.config["joint_attention_dim"], 0

    def latents(self, batch: Any, tokens: Tensor) -> Tensor:
        return tokens


def channelwise(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """`Family.scaling` of a VAE whose configuration has mean and deviation of every channel."""
    mean, std = (
        torch.tensor(vae.config[f"latents_{kind}"], dtype=torch.float32).repeat_interleave(4)
        for kind in ("mean", "std")
    )
    return mean, 1 / std
