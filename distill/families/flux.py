"""FLUX.1 and FLUX.2, which take tokens as they are stored, with their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.families.family import TokenFamily


class Flux(TokenFamily):
    """FLUX.1. Its text encoders are run by `distill.data.encode.TextEncoder`."""

    transformers = ("FluxTransformer2DModel", "FluxMoETransformer2DModel")

    def sizes(self) -> tuple[int, int, int]:
        names = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
        channels, text, pooled = (self.config[name] for name in names)
        return channels, text, pooled

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {
            "hidden_states": batch.x_t,
            "timestep": batch.t,
            "encoder_hidden_states": batch.text,
            "pooled_projections": batch.pooled,
            "img_ids": batch.img_ids,
            "txt_ids": batch.txt_ids,
            **self.guidance(batch),
        }


class Flux2(TokenFamily):
    """FLUX.2: positions have four axes (time, row, column, text), and the VAE's batch norm scales
    the tokens."""

    transformers = ("Flux2Transformer2DModel",)

    def inputs(self, batch: Any) -> dict[str, Any]:
        text = batch.text
        img_ids = torch.nn.functional.pad(batch.img_ids, (0, 1))
        txt_ids = torch.zeros(text.shape[1], 4, device=text.device)
        txt_ids[:, 3] = torch.arange(text.shape[1], device=text.device)
        return {
            "hidden_states": batch.x_t,
            "timestep": batch.t,
            "encoder_hidden_states": text,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": batch.guidance,
        }

    def encode(self, pipe: Any, caption: str, length: int) -> tuple[Tensor, None]:
        text, _ = pipe.encode_prompt(caption, max_sequence_length=length)
        return text[0], None

    def scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.float().clone(), 1 / std.float()
