"""PixArt: an older diffusion, of which the model predicts the noise (epsilon).

x_t = sqrt(a) x0 + sqrt(1 - a) noise, where a is the product of 1 - beta up to the step that t is a
thousandth of; beta rises linearly from 0.0001 to 0.02 in 1000 steps, as in DDPM (Ho et al., 2020).
The transformer may give the variance too, which a student imitates and no target is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.families.family import Family

STEPS = 1000


class PixArt(Family):
    transformers = ("PixArtTransformer2DModel",)

    def sizes(self) -> tuple[int, int, int]:
        return 4 * self.config["in_channels"], self.config["caption_channels"], 0

    def steps(self, batch: Any) -> Tensor:
        """0..999 for t in (0, 1]."""
        return (batch.t * STEPS).ceil().clamp(1, STEPS).long() - 1

    def noised(self, batch: Any) -> Tensor:
        betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
        kept = (1 - betas).cumprod(0).to(batch.t.device)[self.steps(batch)][:, None, None]
        signal, noise = kept.sqrt().to(batch.x0), (1 - kept).sqrt().to(batch.x0)
        return signal * batch.x0 + noise * batch.noise

    def target(self, batch: Any) -> Tensor:
        return self.latents(batch, batch.noise)

    def predicted(self, raw: Any) -> Tensor:
        return raw.sample[:, : self.config["in_channels"]]

    def inputs(self, batch: Any) -> dict[str, Any]:
        more: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        use = self.config.get("use_additional_conditions")
        if use or (use is None and self.config.get("sample_size") == 128):
            sides = batch.t.new_tensor(batch.grid[1:]) * 16  # a token is 16 pixels wide
            more = {
                "resolution": sides.expand(len(batch), 2),
                "aspect_ratio": (sides[0] / sides[1]).expand(len(batch), 1),
            }
        return {
            "hidden_states": self.latents(batch, batch.x_t),
            "timestep": self.steps(batch),
            "encoder_hidden_states": batch.text,
            "encoder_attention_mask": self.mask(batch),
            "added_cond_kwargs": more,
        }

    def encode(self, pipe: Any, caption: str, length: int) -> tuple[Tensor, None]:
        text, mask, _, _ = pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return text[0, mask[0].bool()], None
