"""Tiny pipelines of other families than FLUX.1, with random weights, as diffusers saves them."""

import torch
from helpers.flux_folder import clip_tokenizer, t5_tokenizer

WIDTH, POOLED = 16, 12
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MAKERS = {}


def pipeline(name):
    """Registers what builds the pipeline `name` from a folder for tokenizers."""

    def register(make):
        MAKERS[name] = make
        return make

    return register


def pipeline_folder(name, path):
    torch.manual_seed(7)
    pipe = MAKERS[name](path / "tokenizers")
    pipe.save_pretrained(path / "pipeline")
    return path / "pipeline"


def flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def image_vae(**more):
    from diffusers import AutoencoderKL

    levels = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    more = {"latent_channels": 4, "shift_factor": 0.06, "scaling_factor": 1.5, **more}
    return AutoencoderKL(mid_block_add_attention=False, **levels, **kinds, **more)


def video_vae(kind):
    scale = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.8, 1.2, 0.9, 1.1]}
    return kind(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], **scale,
    )  # fmt: skip


def t5(folder, kind="T5"):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    t5_tokenizer(folder / "t5")
    encoder = getattr(transformers, f"{kind}EncoderModel")(config)
    return encoder, transformers.T5TokenizerFast.from_pretrained(folder / "t5")


def clip(folder):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=POOLED // 2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    clip_tokenizer(folder / "clip")
    return CLIPTextModelWithProjection(config), CLIPTokenizer.from_pretrained(folder / "clip")


def bytes_tokenizer():
    """Every byte a token, with Qwen's special ones and a chat template."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: i for i, piece in enumerate([*special, *bytes_to_unicode().values()])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    return tokenizer


QWEN = {
    "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip


def qwen3(**more):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**{**QWEN, "head_dim": 8, **more}))


@pipeline("sd3")
def _(folder):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    one, one_tokens = clip(folder)
    two, two_tokens = clip(folder)
    three, three_tokens = t5(folder)
    transformer = SD3Transformer2DModel(
        in_channels=4, patch_size=2, sample_size=8, num_layers=4, caption_projection_dim=32,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm", out_channels=4, **HEADS,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, flow(), image_vae(), one, one_tokens, two, two_tokens, three, three_tokens
    )


@pipeline("qwen-image")
def _(_folder):
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": WIDTH,
    }  # fmt: skip
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(text_config={**QWEN, "rope_scaling": rope}, vision_config=vision)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=4, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), **HEADS,
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    vae = video_vae(AutoencoderKLQwenImage)
    return QwenImagePipeline(flow(), vae, encoder, bytes_tokenizer(), transformer)


@pipeline("pixart")
def _(folder):
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    encoder, tokenizer = t5(folder)
    transformer = PixArtTransformer2DModel(
        in_channels=4, out_channels=8, num_layers=4, sample_size=32, patch_size=2,
        caption_channels=WIDTH, cross_attention_dim=32, **HEADS,
    )  # fmt: skip
    vae = image_vae(shift_factor=None)
    scheduler = DPMSolverMultistepScheduler()
    return PixArtSigmaPipeline(tokenizer, encoder, vae, transformer, scheduler)


@pipeline("z-image")
def _(_folder):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=4, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(flow(), image_vae(), qwen3(), bytes_tokenizer(), transformer)


@pipeline("flux2")
def _(_folder):
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vae = AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 1.5)
    config = Qwen3Config(**{**QWEN, "head_dim": 8, "hidden_size": 8, "num_hidden_layers": 28})
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=4, joint_attention_dim=24,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, **HEADS,
    )  # fmt: skip
    return Flux2KleinPipeline(flow(), vae, Qwen3ForCausalLM(config), bytes_tokenizer(), transformer)


@pipeline("wan")
def _(folder):
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    encoder, tokenizer = t5(folder, "UMT5")
    transformer = WanTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=4, text_dim=WIDTH, freq_dim=16, ffn_dim=64,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **HEADS,
    )  # fmt: skip
    return WanPipeline(tokenizer, encoder, video_vae(AutoencoderKLWan), flow(), transformer)
