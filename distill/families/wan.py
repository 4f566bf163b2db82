"""Wan: video; an image is a video of one frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.families.family import Family, channelwise
from distill.families.packing import unpack


class Wan(Family):
    """Latents [B, c, F, 2 rows, 2 columns]; text is padded with zeros, which it sees."""

    transformers = ("WanTransformer3DModel",)

    def sizes(self) -> tuple[int, int, int]:
        return 4 * self.config["in_channels"], self.config["text_dim"], 0

    def latents(self, batch: Any, tokens: Tensor) -> Tensor:
        frames, rows, _ = batch.grid
        each = unpack(tokens.reshape(len(tokens) * frames, -1, tokens.shape[-1]), rows)
        return each.unflatten(0, (len(tokens), frames)).transpose(1, 2)

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {
            "hidden_states": self.latents(batch, batch.x_t),
            "timestep": batch.t * 1000,
            "encoder_hidden_states": batch.text,
        }

    def encode(self, pipe: Any, caption: str, length: int) -> tuple[Tensor, None]:
        text, _ = pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return text[0], None

    def scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        return channelwise(vae)
