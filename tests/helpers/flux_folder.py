"""A tiny FLUX folder in the real layout (vae, two text encoders, tokenizers, transformer)."""

import json
from pathlib import Path

import numpy as np
import torch

WORDS = "a photo of red green blue square circle line cat dog tree house on white black sky".split()
TEXT_DIM, POOLED_DIM, CHANNELS, LENGTH = 16, 12, 16, 6


def flux_folder(path, guidance=False, factor=8):
    """Save one; the VAE has FLUX's shift and scale and its factor of 8, but 4 latent channels."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    path = Path(path)
    torch.manual_seed(5)
    levels = factor.bit_length()
    AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=CHANNELS // 4,
        norm_num_groups=2,
        layers_per_block=1,
        mid_block_add_attention=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(path / "vae")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=POOLED_DIM,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).save_pretrained(path / "text_encoder")
    T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).save_pretrained(path / "text_encoder_2")
    clip_tokenizer(path / "tokenizer")
    t5_tokenizer(path / "tokenizer_2")
    FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    ).save_pretrained(path / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(path / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def t5_tokenizer(path):
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    vocab += [(f"\u2581{word}", -2.0) for word in WORDS]
    tokenizer = T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(path)


def clip_tokenizer(path):
    from transformers import CLIPTokenizer

    letters = sorted(set("".join(WORDS)))
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for piece in [*letters, *(f"{c}</w>" for c in letters)]:
        vocab[piece] = len(vocab)
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8).save_pretrained(path)


def draw(height, width, seed):
    """A random smooth picture as a PIL image."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def caption(seed):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, 4))


def image_folder(path, count=24, side=64):
    """PNG and JPEG images of three aspect ratios with a .txt beside each."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = [(side, side), (side, side * 3 // 2), (side * 2, side)][i % 3]
        suffix = ".png" if i % 2 else ".jpg"
        draw(height + i % 5, width + i % 3, i).save(path / f"image-{i:03d}{suffix}")
        (path / f"image-{i:03d}.txt").write_text(caption(i))
    return path
