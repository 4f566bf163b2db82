"""A ComfyUI node that loads a FLUX converted by dense2moe.

Link or copy this folder into ComfyUI's custom_nodes, where `pip install 'dense2moe[flux]'` has put
the rest, and put files of `d2m export --format bfl` into models/diffusion_models.

Shapes: B batch, C latent channels, H and W of the latents, h and w of the 2 x 2 patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2
LATENT_CHANNELS = 16
REFUSED = ("ref_latents", "attention_mask")


class Denoiser(nn.Module):
    """A FLUX transformer that is called as ComfyUI calls its own, latents in and velocity out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> Tensor:
        """x [B, C, H, W], timestep [B] in 0..1, context [B, X, *], y [B, *] -> [B, C, H, W].

        Raises:
            ValueError: something is attached that acts on ComfyUI's own FLUX only.
        """
        attached = [name for name in REFUSED if others.get(name) is not None]
        attached += (transformer_options or {}).get("patches_replace", {}).get("dit", {})
        if attached:
            raise ValueError(
                f"a converted FLUX does not take {attached}; remove the node that does"
            )
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH), mode="circular")
        h, w = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        ids = torch.zeros(h, w, 3, device=x.device, dtype=x.dtype)
        ids[..., 1] = torch.arange(h, device=x.device)[:, None]
        ids[..., 2] = torch.arange(w, device=x.device)
        patches = F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)
        config, control = self.model.config, control or {}
        (out,) = self.model(
            hidden_states=patches,
            encoder_hidden_states=context,
            pooled_projections=y[:, : config.pooled_projection_dim],
            timestep=timestep,
            guidance=guidance if config.guidance_embeds else None,
            img_ids=ids.flatten(0, 1),
            txt_ids=ids.new_zeros(context.shape[1], 3),
            controlnet_block_samples=_residuals(control.get("input"), config.num_layers),
            controlnet_single_block_samples=_residuals(
                control.get("output"), config.num_single_layers
            ),
            return_dict=False,
        )
        out = F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (h, w)), PATCH)
        return out[..., :height, :width]


def _residuals(found: list[Tensor | None] | None, blocks: int) -> list[Tensor] | None:
    """ComfyUI's list, which may be short and have gaps, as one addend a block."""
    found = list(found or ())[:blocks]
    zero = next((torch.zeros_like(r) for r in found if r is not None), None)
    if zero is None:
        return None
    found += [None] * (blocks - len(found))
    return [zero if r is None else r for r in found]


def load(path: str, top_k: int | None = None) -> Any:
    """The model of a folder or single file, dense or converted, as ComfyUI's MODEL."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models as known

    from d2m_models import set_top_k
    from d2m_models.checkpoints.pipelines import load_transformer

    model = load_transformer(path)
    if top_k is not None:
        set_top_k(model, top_k)
    guidance = model.config.guidance_embeds
    config = (known.Flux if guidance else known.FluxSchnell)(
        {
            "image_model": "flux",
            "guidance_embed": guidance,
            "in_channels": LATENT_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "disable_unet_model_creation": True,
        }
    )
    config.set_inference_dtype(model.dtype, None)
    base = config.get_model({})
    base.diffusion_model = Denoiser(model).requires_grad_(False).eval()
    return comfy.model_patcher.ModelPatcher(
        base,
        load_device=management.get_torch_device(),
        offload_device=management.unet_offload_device(),
    )


class LoadFluxMoE:
    """The node: a file of models/diffusion_models -> MODEL."""

    CATEGORY = "advanced/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        return {
            "required": {
                "model": (folder_paths.get_filename_list("diffusion_models"),),
                "top_k": (
                    "INT",
                    {"default": -1, "min": -1, "tooltip": "-1: as the model is saved"},
                ),
            }
        }

    def load(self, model: str, top_k: int) -> tuple[Any]:
        import folder_paths

        path = folder_paths.get_full_path_or_raise("diffusion_models", model)
        return (load(path, None if top_k < 0 else top_k),)


NODE_CLASS_MAPPINGS = {"LoadFluxMoE": LoadFluxMoE}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadFluxMoE": "Load FLUX MoE (dense2moe)"}
