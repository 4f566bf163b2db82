"""SD3 and 3.5, Qwen-Image, Z-Image: rectified flow, each with its own idea of text and of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.families.family import Family, TokenFamily, channelwise


class StableDiffusion3(Family):
    """Two CLIPs and T5: their tokens one after another, and CLIP's pooled vectors."""

    transformers = ("SD3Transformer2DModel",)

    def sizes(self) -> tuple[int, int, int]:
        names = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
        channels, text, pooled = (self.config[name] for name in names)
        return 4 * channels, text, pooled

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {
            "hidden_states": self.latents(batch, batch.x_t),
            "timestep": batch.t * 1000,
            "encoder_hidden_states": batch.text,
            "pooled_projections": batch.pooled,
        }

    def encode(self, pipe: Any, caption: str, length: int) -> tuple[Tensor, Tensor]:
        text, _, pooled, _ = pipe.encode_prompt(
            caption, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return text[0], pooled[0]

    def text_rows(self, pipe: Any, length: int) -> int:
        return pipe.tokenizer_max_length + length


class QwenImage(TokenFamily):
    """Tokens as they are stored; text of any length, with a mask."""

    transformers = ("QwenImageTransformer2DModel",)

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {
            "hidden_states": batch.x_t,
            "timestep": batch.t,
            "encoder_hidden_states": batch.text,
            "encoder_hidden_states_mask": self.mask(batch),
            "img_shapes": [[batch.grid]] * len(batch),
            **self.guidance(batch),
        }

    def encode(self, pipe: Any, caption: str, length: int) -> tuple[Tensor, None]:
        text, mask = pipe.encode_prompt(caption, max_sequence_length=length)
        return text[0] if mask is None else text[0, mask[0].bool()], None

    def scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        return channelwise(vae)


class ZImage(Family):
    """A list of images and of texts of any length; its time runs from noise (0) to image (1), and
    so does the velocity it predicts."""

    transformers = ("ZImageTransformer2DModel",)

    def sizes(self) -> tuple[int, int, int]:
        return 4 * self.config["in_channels"], self.config["cap_feat_dim"], 0

    def inputs(self, batch: Any) -> dict[str, Any]:
        images = self.latents(batch, batch.x_t)[:, :, None]  # one frame
        text = [row[kept] for row, kept in zip(batch.text, self.mask(batch), strict=True)]
        return {"x": list(images), "t": 1 - batch.t, "cap_feats": text}

    def target(self, batch: Any) -> Tensor:
        return self.latents(batch, batch.x0 - batch.noise)

    def output(self, raw: Any) -> Tensor:
        return torch.stack(list(raw.sample))[:, :, 0]

    def encode(self, pipe: Any, caption: str, length: int) -> tuple[Tensor, None]:
        (text,), _ = pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return text, None
