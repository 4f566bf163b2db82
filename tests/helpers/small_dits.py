"""A small configuration, and inputs, of every transformer class of diffusers that runs on a CPU.

`SMALL[name]()` is (configuration, inputs): blocks 48 or 64 wide, two samples where the model takes
a batch. What a model needs of lists, masks and positions is in its inputs as its pipeline makes it.
"""

# ruff: noqa: E501
# fmt: off

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn

B, TEXT, WIDE = 2, 5, 32  # samples, text tokens, width of the text


def R(*shape):
    return torch.randn(shape)


def at():
    """Timesteps."""
    return torch.tensor([3.0, 700.0])


def text():
    return R(B, TEXT, WIDE)


def ones(*shape):
    return torch.ones(shape, dtype=torch.bool)


def grid(t, h, w, extra=()):
    """Positions [t * h * w, 3 + len(extra)]."""
    ids = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).float()
    return torch.cat([ids, torch.tensor([extra] * len(ids)).reshape(len(ids), -1)], 1)


HEADS = dict(num_attention_heads=4, attention_head_dim=16)
LATENT = dict(in_channels=4, out_channels=4)
SMALL = {}
LEFT_OUT = {
    "RFD4ProteinaTransformer": "no small inputs (proteins)",
    "SanaWMTransformer3DModel": "no small inputs (cameras)",
}


def small(*names):
    """Registers what makes (configuration, inputs) of these classes."""

    def keep(make):
        for name in names:
            SMALL[name] = make
        return make

    return keep


def build(name: str) -> tuple[nn.Module, dict]:
    """(model with random weights and zero-initialised ones filled, inputs), the same every time."""
    torch.manual_seed(0)
    config, inputs = SMALL[name]()
    model = getattr(diffusers, name)(**config).float().eval()
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if not parameter.any() or not parameter.isfinite().all():
                parameter.normal_(std=0.05)
            elif parameter.ndim == 1 and parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(0.05 * torch.randn_like(parameter))  # ones, or a constant bias
            del key
    return model, inputs


def tensors(output) -> list[Tensor]:
    """All tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output
    if not isinstance(output, (dict, list, tuple)):
        return []
    return [tensor for part in parts for tensor in tensors(part)]


# --------------------------------------------------------------------------------------- images

FLUX = dict(in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=WIDE, axes_dims_rope=(4, 4, 8), **HEADS)


def flux_inputs(**more):
    return dict(hidden_states=R(B, 12, 4), encoder_hidden_states=text(), timestep=torch.tensor([0.1, 0.8]),
                img_ids=grid(1, 3, 4), txt_ids=torch.zeros(TEXT, 3), **more)


@small("FluxTransformer2DModel")
def _():
    return dict(FLUX, pooled_projection_dim=24), flux_inputs(pooled_projections=R(B, 24))


@small("BriaTransformer2DModel")
def _():
    return dict(FLUX, axes_dims_rope=[4, 4, 8]), flux_inputs()


@small("BriaFiboTransformer2DModel")
def _():
    return dict(FLUX, axes_dims_rope=[4, 4, 8], text_encoder_dim=16), flux_inputs(text_encoder_layers=[R(B, TEXT, 16) for _ in range(4)])


@small("ChromaTransformer2DModel")
def _():
    return dict(FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=2), flux_inputs()


@small("LongCatImageTransformer2DModel")
def _():
    return dict(FLUX, pooled_projection_dim=32), flux_inputs()


@small("OvisImageTransformer2DModel")
def _():
    return dict(FLUX, out_channels=4), flux_inputs()


@small("Flux2Transformer2DModel")
def _():
    config = dict(FLUX, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4))
    return config, dict(flux_inputs(guidance=torch.full((B,), 3.5)), img_ids=grid(1, 3, 4, (0,)), txt_ids=torch.zeros(TEXT, 4))


@small("Flux3Transformer2DModel")
def _():
    config = dict(FLUX, cond_in_channels=4, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4))
    return config, dict(flux_inputs(), img_ids=grid(1, 3, 4, (0,)), txt_ids=torch.zeros(TEXT, 4))


@small("AuraFlowTransformer2DModel")
def _():
    config = dict(LATENT, sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=WIDE, caption_projection_dim=64, pos_embed_max_size=64, **HEADS)
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), timestep=torch.tensor([0.1, 0.8]))


@small("SD3Transformer2DModel")
def _():
    config = dict(LATENT, sample_size=8, num_layers=3, caption_projection_dim=64, joint_attention_dim=WIDE, pooled_projection_dim=24, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm", **HEADS)
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), pooled_projections=R(B, 24), timestep=at())


@small("QwenImageTransformer2DModel")
def _():
    config = dict(in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=WIDE, axes_dims_rope=(4, 6, 6), **HEADS)
    return config, dict(hidden_states=R(B, 12, 16), encoder_hidden_states=text(), encoder_hidden_states_mask=ones(B, TEXT), timestep=torch.tensor([0.1, 0.8]), img_shapes=[[(1, 3, 4)]] * B)


@small("QwenImage21Transformer2DModel")
def _():
    config = dict(in_channels=16, out_channels=16, num_layers=2, context_in_dim=WIDE, axes_dims_rope=(4, 6, 6), **HEADS)
    mask = torch.zeros(B, TEXT + 4, dtype=torch.bool)
    mask[:, TEXT:] = True
    return config, dict(hidden_states=R(B, 16, 16), encoder_hidden_states=R(B, TEXT, WIDE), timestep=torch.tensor([0.1, 0.8]), img_shapes=[[(1, 4, 4)]] * B, img_mask=mask)


@small("NucleusMoEImageTransformer2DModel")
def _():
    config = dict(in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=WIDE, axes_dims_rope=(4, 6, 6), moe_enabled=False, capacity_factors=[8.0, 8.0], **HEADS)
    return config, dict(hidden_states=R(B, 12, 16), encoder_hidden_states=text(), encoder_hidden_states_mask=ones(B, TEXT), timestep=torch.tensor([0.1, 0.8]), img_shapes=[(1, 3, 4)] * B)


@small("ZImageTransformer2DModel")
def _():
    config = dict(in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=WIDE, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64])
    return config, dict(x=[R(4, 1, 8, 8), R(4, 1, 8, 8)], t=torch.tensor([0.2, 0.7]), cap_feats=[R(5, WIDE), R(7, WIDE)])


LUMINA = dict(sample_size=8, in_channels=4, num_layers=2, num_attention_heads=3, num_kv_heads=1, hidden_size=48, multiple_of=16)


@small("Lumina2Transformer2DModel")
def _():
    config = dict(LUMINA, num_refiner_layers=1, ffn_dim_multiplier=1.0, axes_dim_rope=(4, 4, 8), axes_lens=(64, 64, 64), cap_feat_dim=WIDE)
    return config, dict(hidden_states=R(B, 4, 8, 8), timestep=torch.tensor([0.2, 0.7]), encoder_hidden_states=text(), encoder_attention_mask=ones(B, TEXT))


@small("LuminaNextDiT2DModel")
def _():
    config = dict(LUMINA, learn_sigma=False, cross_attention_dim=WIDE)
    angles = torch.rand(384, 384, 8)
    return config, dict(hidden_states=R(B, 4, 8, 8), timestep=torch.tensor([0.2, 0.7]), encoder_hidden_states=text(), encoder_mask=torch.ones(B, TEXT), image_rotary_emb=torch.polar(torch.ones_like(angles), angles), cross_attention_kwargs={})


@small("HiDreamImageTransformer2DModel")
def _():
    config = dict(LATENT, patch_size=2, num_layers=2, num_single_layers=2, caption_channels=[WIDE, 24], text_emb_dim=16, num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(8, 8), llama_layers=(0, 1, 2, 3), force_inference_output=True, **HEADS)
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states_t5=text(), encoder_hidden_states_llama3=R(4, B, TEXT, 24), pooled_embeds=R(B, 16), timesteps=at())


COGVIEW = dict(LATENT, num_layers=2, text_embed_dim=WIDE, time_embed_dim=24, condition_dim=8, **HEADS)


@small("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel")
def _():
    size = torch.tensor([[64.0, 64.0]] * B)
    return dict(COGVIEW, pos_embed_max_size=8, sample_size=8), dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), timestep=at(), original_size=size, target_size=size, crop_coords=torch.zeros(B, 2))


@small("GlmImageTransformer2DModel")
def _():
    config = dict(COGVIEW, prior_vq_quantizer_codebook_size=64)
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), prior_token_id=torch.randint(0, 64, (B, 16)), prior_token_drop=torch.zeros(B, 16, dtype=torch.bool), timestep=at(), target_size=torch.tensor([[8.0, 8.0]] * B), crop_coords=torch.zeros(B, 2))


@small("DiTTransformer2DModel")
def _():
    config = dict(in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=8, **HEADS)
    return config, dict(hidden_states=R(B, 4, 8, 8), timestep=at().long(), class_labels=torch.tensor([1, 5]))


@small("PixArtTransformer2DModel")
def _():
    config = dict(in_channels=4, num_layers=2, sample_size=8, cross_attention_dim=64, caption_channels=WIDE, use_additional_conditions=False, **HEADS)
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), timestep=at(), added_cond_kwargs={"resolution": None, "aspect_ratio": None})


@small("HunyuanDiT2DModel")
def _():
    config = dict(in_channels=4, num_layers=4, sample_size=8, patch_size=2, hidden_size=64, cross_attention_dim=WIDE, cross_attention_dim_t5=24, pooled_projection_dim=16, text_len=TEXT, text_len_t5=4, **HEADS)
    angles = torch.rand(16, 16)
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), text_embedding_mask=torch.ones(B, TEXT), encoder_hidden_states_t5=R(B, 4, 24), text_embedding_mask_t5=torch.ones(B, 4), timestep=at(), image_meta_size=torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * B), style=torch.zeros(B, dtype=torch.long), image_rotary_emb=(angles.cos(), angles.sin()))


@small("HunyuanImageTransformer2DModel")
def _():
    config = dict(LATENT, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=WIDE, rope_axes_dim=(8, 8), **HEADS)
    return config, dict(hidden_states=R(B, 4, 4, 4), timestep=at(), encoder_hidden_states=text(), encoder_attention_mask=ones(B, TEXT))


@small("ErnieImageTransformer2DModel")
def _():
    config = dict(LATENT, hidden_size=64, num_attention_heads=4, num_layers=2, ffn_hidden_size=192, text_in_dim=WIDE, rope_axes_dim=(8, 4, 4))
    return config, dict(hidden_states=R(B, 4, 4, 4), timestep=at(), text_bth=text(), text_lens=torch.tensor([TEXT, TEXT]))


@small("Krea2Transformer2DModel")
def _():
    config = dict(in_channels=4, num_layers=2, num_key_value_heads=2, intermediate_size=192, timestep_embed_dim=8, text_hidden_dim=WIDE, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=96, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 4, 4), **HEADS)
    return config, dict(hidden_states=R(B, 12, 4), encoder_hidden_states=R(B, TEXT, 3, WIDE), timestep=torch.tensor([0.2, 0.7]), position_ids=torch.cat([torch.zeros(TEXT, 3), grid(1, 3, 4)]))


@small("PRXTransformer2DModel")
def _():
    config = dict(in_channels=4, context_in_dim=WIDE, hidden_size=64, num_heads=4, depth=2, axes_dim=[8, 8])
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), timestep=torch.tensor([0.2, 0.7]))


@small("Ideogram4Transformer2DModel")
def _():
    config = dict(in_channels=8, num_layers=2, intermediate_size=192, adaln_dim=16, llm_features_dim=WIDE, mrope_section=(4, 2, 2), **HEADS)
    kind = torch.tensor([[3] * TEXT + [2] * 4] * B)
    places = torch.cat([torch.arange(TEXT)[:, None].expand(TEXT, 3), grid(1, 2, 2).long() + 65536])
    return config, dict(hidden_states=R(B, TEXT + 4, 8), encoder_hidden_states=R(B, TEXT + 4, WIDE), timestep=torch.tensor([0.2, 0.7]), position_ids=places.expand(B, -1, -1), segment_ids=torch.ones(B, TEXT + 4, dtype=torch.long), indicator=kind)


@small("BriaFibo2Transformer2DModel")
def _():
    config = dict(in_channels=4, dim=64, n_layers=3, n_refiner_layers=1, n_heads=4, cap_feat_dim=WIDE, injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(64, 64, 64))
    return config, dict(hidden_states=R(B, 4, 8, 8), timestep=torch.tensor([0.2, 0.7]), encoder_hidden_states=R(B, 2, TEXT, WIDE))


@small("OmniGenTransformer2DModel")
def _():
    config = dict(in_channels=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=192, num_layers=2, pad_token_id=0, vocab_size=50, time_step_dim=8, rope_scaling={"long_factor": [1] * 8, "short_factor": [1] * 8})
    tokens = TEXT + 1 + 16
    return config, dict(hidden_states=R(B, 4, 8, 8), timestep=torch.rand(B), input_ids=torch.randint(1, 50, (B, TEXT)), input_img_latents=[], input_image_sizes={}, attention_mask=torch.ones(B, tokens, tokens), position_ids=torch.arange(tokens).expand(B, -1))


@small("SanaTransformer2DModel")
def _():
    config = dict(LATENT, num_layers=2, num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=WIDE, sample_size=8, **HEADS)
    return config, dict(hidden_states=R(B, 4, 8, 8), encoder_hidden_states=text(), timestep=at())


@small("PriorTransformer")
def _():
    config = dict(num_layers=2, embedding_dim=24, num_embeddings=7, **HEADS)
    return config, dict(hidden_states=R(B, 24), timestep=at(), proj_embedding=R(B, 24), encoder_hidden_states=R(B, 7, 24))


@small("Transformer2DModel", "DreamLiteTransformer2DModel")
def _():
    config = dict(in_channels=32, num_layers=2, cross_attention_dim=WIDE, norm_num_groups=8, **HEADS)
    return config, dict(hidden_states=R(B, 32, 4, 4), encoder_hidden_states=text())


# --------------------------------------------------------------------------------------- video

WAN = dict(LATENT, text_dim=WIDE, freq_dim=32, ffn_dim=256, num_layers=2, rope_max_seq_len=32, **HEADS)


def video(*more, frames=2, size=8, channels=4):
    return dict(hidden_states=R(B, channels, frames, size, size), timestep=at(), encoder_hidden_states=text(), **dict(more))


@small("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel")
def _():
    return WAN, video()


@small("WanVACETransformer3DModel")
def _():
    return dict(WAN, vace_layers=[0, 1], vace_in_channels=12), video(("control_hidden_states", R(B, 12, 2, 8, 8)))


@small("WanAnimateTransformer3DModel")
def _():
    config = dict(WAN, in_channels=12, latent_channels=4, image_dim=16, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2)
    inputs = dict(hidden_states=R(1, 12, 3, 8, 8), timestep=torch.tensor([3.0]), encoder_hidden_states=R(1, TEXT, WIDE), encoder_hidden_states_image=R(1, 6, 16), pose_hidden_states=R(1, 4, 2, 8, 8), face_pixel_values=R(1, 3, 5, 16, 16))
    return config, inputs


@small("WanAnimate2Transformer3DModel")
def _():
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    config = dict(text_len=TEXT, in_dim=12, dim=64, ffn_dim=256, freq_dim=32, text_dim=WIDE, out_dim=4, num_heads=4, num_layers=2)
    return config, dict(hidden_states=[R(4, 2, 4, 4)], timestep=torch.tensor([3.0]), encoder_hidden_states=[R(TEXT, WIDE)], condition_latents=[R(8, 2, 4, 4)], encoder_hidden_states_image=R(1, 4, 1280), kv_cache=WanAnimate2KVCache(2), kv_cache_mode="extract", seq_len=8, offset_grid_sizes=torch.tensor([[2, 2, 2]]))


@small("AnyFlowTransformer3DModel")
def _():
    config = {k: v for k, v in WAN.items() if k != "added_kv_proj_dim"}
    return config, dict(hidden_states=R(B, 2, 4, 8, 8), timestep=torch.full((B, 2), 500.0), r_timestep=torch.full((B, 2), 250.0), encoder_hidden_states=text())


@small("AnyFlowFARTransformer3DModel")
def _():
    return WAN, dict(hidden_states=R(B, 4, 4, 8, 8), timestep=torch.full((B, 4), 500.0), r_timestep=torch.full((B, 4), 250.0), encoder_hidden_states=text(), chunk_partition=[2, 2])


@small("HeliosTransformer3DModel")
def _():
    config = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | dict(rope_dim=(4, 6, 6))
    past = {name: R(B, 4, frames, 8, 8) for name, frames in (("short", 1), ("mid", 1), ("long", 4))}
    return config, dict(video(), indices_hidden_states=torch.ones(B, 2), **{f"latents_history_{k}": v for k, v in past.items()}, **{f"indices_latents_history_{k}": torch.ones(B, v.shape[2]) for k, v in past.items()})


HUNYUAN = dict(LATENT, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=WIDE, pooled_projection_dim=24, rope_axes_dim=(4, 6, 6), **HEADS)


@small("HunyuanVideoTransformer3DModel")
def _():
    return HUNYUAN, video(("encoder_attention_mask", torch.ones(B, TEXT)), ("pooled_projections", R(B, 24)), ("guidance", at()))


@small("HunyuanVideoFramepackTransformer3DModel")
def _():
    config = dict(HUNYUAN, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True)
    past = {"clean": 2, "history_2x": 2, "history_4x": 4}
    return config, dict(video(frames=3, size=4), encoder_attention_mask=torch.ones(B, TEXT), pooled_projections=R(B, 24), guidance=at(), image_embeds=R(B, 6, 16), indices_latents=torch.ones(3), **{f"latents_{k}": R(B, 4, v, 4, 4) for k, v in past.items()}, **{f"indices_latents_{k}": torch.ones(v) for k, v in past.items()})


@small("HunyuanVideo15Transformer3DModel")
def _():
    config = dict(LATENT, num_layers=2, num_refiner_layers=1, mlp_ratio=3.0, text_embed_dim=WIDE, text_embed_2_dim=24, image_embed_dim=16, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v", **HEADS)
    return config, dict(video(frames=1), encoder_attention_mask=torch.ones(B, TEXT), encoder_hidden_states_2=R(B, 4, 24), encoder_attention_mask_2=torch.ones(B, 4), image_embeds=torch.zeros(B, 3, 16))


@small("MotifVideoTransformer3DModel")
def _():
    config = dict(in_channels=9, out_channels=4, num_layers=2, num_single_layers=2, num_decoder_layers=1, text_embed_dim=WIDE, rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True, **HEADS)
    return config, video(channels=9)


COG = dict(LATENT, time_embed_dim=24, text_embed_dim=WIDE, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=TEXT, **HEADS)


@small("CogVideoXTransformer3DModel")
def _():
    return COG, dict(hidden_states=R(B, 2, 4, 8, 8), encoder_hidden_states=text(), timestep=at())


@small("ConsisIDTransformer3DModel")
def _():
    config = dict(COG, cross_attn_interval=1, is_train_face=True, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=16, LFE_vit_dim=16, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=2, LFE_output_dim=42, LFE_ff_mult=4, LFE_num_scale=5)
    return config, dict(hidden_states=R(B, 2, 4, 8, 8), encoder_hidden_states=text(), timestep=at(), id_vit_hidden=[R(B, 3, 16) for _ in range(5)], id_cond=R(B, 16))


@small("CosmosTransformer3DModel")
def _():
    config = dict(LATENT, num_layers=2, text_embed_dim=WIDE, adaln_lora_dim=8, max_size=(4, 16, 16), concat_padding_mask=False, **HEADS)
    return config, dict(video(), fps=30)


@small("Cosmos3OmniTransformer")
def _():
    config = dict(head_dim=16, hidden_size=64, intermediate_size=192, latent_channel=4, latent_patch_size=1, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=4, rope_axes_dim=[4, 2, 2], vocab_size=32)
    seen = torch.arange(2, 6)
    return config, dict(input_ids=torch.tensor([1, 2]), text_indexes=torch.tensor([0, 1]), position_ids=torch.zeros(3, 6, dtype=torch.long), und_len=2, sequence_length=6, vision_tokens=[R(1, 4, 1, 2, 2)], vision_token_shapes=[(1, 2, 2)], vision_sequence_indexes=seen, vision_mse_loss_indexes=seen, vision_timesteps=torch.ones(4), vision_noisy_frame_indexes=[torch.tensor([0])])


@small("AllegroTransformer3DModel")
def _():
    config = dict(LATENT, num_layers=2, cross_attention_dim=64, caption_channels=WIDE, sample_height=8, sample_width=8, sample_frames=2, num_attention_heads=3, attention_head_dim=24)
    config["cross_attention_dim"] = 72
    return config, dict(video(), image_rotary_emb=None)


@small("LatteTransformer3DModel")
def _():
    config = dict(LATENT, num_layers=2, sample_size=8, patch_size=2, cross_attention_dim=64, caption_channels=WIDE, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, video_length=2, **HEADS)
    return config, video()


@small("LTXVideoTransformer3DModel")
def _():
    config = dict(LATENT, num_layers=2, cross_attention_dim=64, caption_channels=WIDE, **HEADS)
    return config, dict(hidden_states=R(B, 24, 4), encoder_hidden_states=text(), timestep=at(), encoder_attention_mask=torch.ones(B, TEXT), num_frames=2, height=3, width=4)


LTX2 = dict(LATENT, num_layers=2, cross_attention_dim=64, caption_channels=WIDE, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=4, audio_attention_head_dim=8, audio_cross_attention_dim=32, rope_double_precision=False, **HEADS)


@small("LTX2VideoTransformer3DModel")
def _():
    return LTX2, dict(hidden_states=R(B, 24, 4), audio_hidden_states=R(B, 6, 4), encoder_hidden_states=text(), audio_encoder_hidden_states=text(), timestep=at(), encoder_attention_mask=ones(B, TEXT), num_frames=2, height=3, width=4, audio_num_frames=6, fps=25.0)


@small("MochiTransformer3DModel")
def _():
    config = dict(in_channels=4, num_layers=2, pooled_projection_dim=24, text_embed_dim=WIDE, time_embed_dim=16, max_sequence_length=TEXT, **HEADS)
    return config, dict(video(), encoder_attention_mask=ones(B, TEXT))


@small("EasyAnimateTransformer3DModel")
def _():
    config = dict(LATENT, num_layers=2, mmdit_layers=1, patch_size=2, sample_height=8, sample_width=8, text_embed_dim=WIDE, time_embed_dim=24, **HEADS)
    return config, video()


JOY = dict(in_channels=4, hidden_size=64, num_attention_heads=4, text_dim=WIDE, num_layers=2, rope_dim_list=[4, 6, 6])


@small("JoyImageEditTransformer3DModel")
def _():
    return JOY, video(frames=1)


@small("JoyImageEditPlusTransformer3DModel")
def _():
    return JOY, dict(hidden_states=R(B, 2, 4, 1, 2, 2), timestep=at(), encoder_hidden_states=text(), shape_list=[[(1, 1, 1), (1, 1, 1)]] * B)


@small("Kandinsky5Transformer3DModel")
def _():
    config = dict(in_visual_dim=4, in_text_dim=WIDE, in_text_dim2=24, time_dim=16, out_visual_dim=4, model_dim=64, ff_dim=192, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6))
    inputs = dict(hidden_states=R(B, 2, 8, 8, 4), encoder_hidden_states=R(B, TEXT, WIDE), timestep=at(), pooled_projections=R(B, 24), visual_rope_pos=[torch.arange(n) for n in (2, 4, 4)], text_rope_pos=torch.arange(TEXT))
    return config, inputs


@small("Kandinsky6Transformer3DModel")
def _():
    config = dict(in_visual_dim=4, in_text_dim=WIDE, in_text_dim2=24, time_dim=16, out_visual_dim=4, model_dim=64, ff_dim=256, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=4, out_audio_dim=4)
    inputs = dict(hidden_states=R(B, 2, 8, 8, 4), encoder_hidden_states=text(), pooled_projections=R(B, 24), timestep=at(), audio_hidden_states=R(B, 6, 4))
    return config, inputs


@small("Kandinsky6SRTransformer3DModel")
def _():
    config = dict(in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=64, ff_dim=256, num_visual_blocks=2, axes_dims=(4, 6, 6))
    return config, dict(hidden_states=R(B, 1, 8, 16, 9), timestep=at())


@small("SanaWMLTX2RefinerTransformer3DModel")
def _():
    angles = torch.rand(1, 24, 64)
    return LTX2, dict(hidden_states=R(B, 24, 4), encoder_hidden_states=text(), timestep=torch.full((B, 24), 500.0), video_rotary_emb=(angles.cos(), angles.sin()), encoder_attention_mask=torch.ones(B, TEXT))


@small("MiniMaxH3Transformer3DModel")
def _():
    config = dict(hidden_size=48, num_layers=2, num_refiner_layers=1, ffn_dim=192, in_channels=4, audio_in_channels=6, text_dim=WIDE, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=2, **HEADS)
    kinds = torch.tensor([1] * TEXT + [2] * 6 + [0] * 8)
    places = torch.zeros(TEXT + 14, 3)
    places[:, 0] = torch.arange(TEXT + 14)
    return config, dict(hidden_states=R(B, 8, 16), audio_hidden_states=R(B, 6, 6), encoder_hidden_states=text(), timestep=torch.tensor([0.7, 0.3]), timestep_indices=(kinds == 2).long(), token_tags=kinds, position_ids=places, **{f"{name}_indices": (kinds == tag).nonzero()[:, 0] for tag, name in enumerate(("video", "text", "audio"))})


@small("SanaVideoTransformer3DModel")
def _():
    config = dict(LATENT, num_layers=2, num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=WIDE, sample_size=8, rope_max_seq_len=32, **HEADS)
    return config, video()


@small("TransformerTemporalModel")
def _():
    config = dict(in_channels=32, num_layers=2, norm_num_groups=8, **HEADS)
    return config, dict(hidden_states=R(4, 32, 4, 4), num_frames=2)


# --------------------------------------------------------------------------------------- sound


@small("AceStepTransformer1DModel")
def _():
    config = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=16)
    return config, dict(hidden_states=R(B, 8, 8), timestep=torch.rand(B), timestep_r=torch.rand(B), encoder_hidden_states=R(B, TEXT, 64), context_latents=R(B, 8, 16))


@small("StableAudioDiTModel")
def _():
    config = dict(sample_size=16, in_channels=4, out_channels=4, num_layers=2, num_key_value_attention_heads=2, cross_attention_dim=WIDE, time_proj_dim=16, global_states_input_dim=24, cross_attention_input_dim=WIDE, **HEADS)
    angles = torch.rand(17, 8)
    return config, dict(hidden_states=R(B, 4, 16), timestep=torch.rand(B), encoder_hidden_states=text(), global_hidden_states=R(B, 1, 24), rotary_embedding=(angles.cos(), angles.sin()))


@small("StableAudio3DiTModel")
def _():
    config = dict(io_channels=8, embed_dim=64, depth=2, num_heads=4, cond_token_dim=WIDE, global_cond_dim=12, local_add_cond_dim=5, timestep_features_dim=16, num_memory_tokens=3)
    return config, dict(hidden_states=R(B, 8, 16), timestep=torch.rand(B), encoder_hidden_states=text(), global_hidden_states=R(B, 12))


@small("LongCatAudioDiTTransformer")
def _():
    config = dict(dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=WIDE, latent_dim=8, text_conv=False)
    return config, dict(hidden_states=R(B, 16, 8), encoder_hidden_states=text(), encoder_attention_mask=ones(B, TEXT), attention_mask=ones(B, 16), timestep=torch.rand(B))


@small("MiniMaxMusic3Transformer1DModel")
def _():
    config = dict(in_channels=8, condition_dim=WIDE, num_layers=2, num_attention_heads=4, attention_head_dim=16, ff_inner_dim=192, rotary_dim=4, fourier_embedding_dim=8)
    return config, dict(hidden_states=R(B, 8, 12), timestep=torch.rand(B), encoder_hidden_states=R(B, 12, WIDE))


@small("MiniMaxMusic3RVQDepthDecoder")
def _():
    return dict(hidden_size=64, num_layers=2, num_attention_heads=4, intermediate_size=192, audio_vocab_size=16), dict(inputs_embeds=R(B, 6, 64))


@small("T5FilmDecoder")
def _():
    config = dict(input_dims=16, targets_length=8, d_model=48, num_layers=2, num_heads=3, d_kv=16, d_ff=192, dropout_rate=0.0)
    return config, dict(encodings_and_masks=[(R(B, TEXT, 48), torch.ones(B, TEXT))], decoder_input_tokens=R(B, 8, 16), decoder_noise_time=torch.rand(B))
