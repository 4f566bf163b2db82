"""Judges of the real architectures with random weights, saved where the real loading code reads."""

from pathlib import Path

import torch

WORDS = "a photo of red green blue cat dog bench yes no two object - colored ? .".split()


def _bert(folder, extra=("[DEC]", "[ENC]")):
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *extra]
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)})
    tokenizer.save_pretrained(folder)
    return tokenizer, len(names)


def clip(folder, projection=12):
    """CLIP with its processor; texts of up to 16 tokens."""
    from helpers.flux_folder import clip_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    size = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**size, "hidden_size": 16, "vocab_size": 64, "max_position_embeddings": 16,
                     "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**size, "hidden_size": 20, "image_size": 32, "patch_size": 8},
        projection_dim=projection,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return Path(folder)


def blip_config(vocab, vision=20):
    from transformers import BlipConfig

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2}  # fmt: skip
    return BlipConfig(
        text_config={**size, "vocab_size": vocab, "encoder_hidden_size": vision, "bos_token_id":
                     vocab - 2, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3},
        vision_config={**size, "hidden_size": vision, "image_size": 32, "patch_size": 8},
        image_text_hidden_size=12,
    )  # fmt: skip


def blip_vqa(folder):
    from transformers import BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    torch.manual_seed(1)
    tokenizer, vocab = _bert(folder)
    BlipForQuestionAnswering(blip_config(vocab, 16)).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return Path(folder)


def mask2former(folder, labels=("cat", "dog", "bench")):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(2)
    backbone = SwinConfig(
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_size=2,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=6, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return Path(folder)


def owl(folder):
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    torch.manual_seed(3)
    size = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**size, "hidden_size": 16, "vocab_size": 64, "max_position_embeddings": 16,
                     "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**size, "hidden_size": 20, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    # a query that starts with token 0 is none
    letters = sorted(set("".join(WORDS)))
    names = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    images = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(images, tokenizer).save_pretrained(folder)
    return Path(folder)


def depth(folder):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(4)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, head_in_index=-1, is_hybrid=False, readout_type="project",
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return Path(folder)


def _words(marks):
    """A tokenizer of whole words with these special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *WORDS, '{"score":', *map(str, range(1, 6)), "}"]
    raw = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>",
                                        eos_token="<|end|>", pad_token="<|end|>")  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def _template(image):
    return (
        "{% for m in messages %}{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
        f"{image} {{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}} {{% endfor %}}"
    )


def llava(folder):
    """LLaVA, as ShareGPT4V is one: CLIP's vision tower and a Llama."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(5)
    tokenizer = _words(["<image>"])
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, num_hidden_layers=2, image_size=32, patch_size=8),
        text_config=LlamaConfig(**size, num_hidden_layers=1, vocab_size=len(tokenizer),
                                bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                                pad_token_id=tokenizer.pad_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, chat_template=_template("<image>"),
                   ).save_pretrained(folder)  # fmt: skip
    return Path(folder)


def image_reward(folder):
    """(folder, the model as transformers has it); on disk the weights have ImageReward's names."""
    from torch import nn
    from transformers import BlipForImageTextRetrieval

    torch.manual_seed(6)
    _, vocab = _bert(folder)
    config = blip_config(vocab)
    model = BlipForImageTextRetrieval(config).eval()
    widths = (16, 12, 8, 6, 4, 1)
    model.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))
    names = {
        "vision_model.embeddings.class_embedding": "blip.visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding.": "blip.visual_encoder.patch_embed.proj.",
        "vision_model.post_layernorm.": "blip.visual_encoder.norm.",
        "vision_model.encoder.layers.": "blip.visual_encoder.blocks.",
        "text_encoder.": "blip.text_encoder.",
    }
    inside = {"self_attn.projection.": "attn.proj.", "self_attn.": "attn.",
              "layer_norm1.": "norm1.", "layer_norm2.": "norm2."}  # fmt: skip
    state = {}
    for key, tensor in model.state_dict().items():
        for new, old in names.items():
            if key.startswith(new):
                key = key.replace(new, old)
                if "visual" in old:
                    for a, b in inside.items():
                        key = key.replace(a, b)
        if key.startswith("mlp."):
            number, kind = key.split(".")[1:]
            key = f"mlp.layers.{(0, 2, 4, 6, 7)[int(number)]}.{kind}"
        state[key] = tensor
    torch.save(state, Path(folder) / "ImageReward.pt")
    config.save_pretrained(folder)
    return Path(folder), model


def mps(folder):
    """A state dict of MPS's names over `clip`'s sizes: 2 layers of 3 heads of 4."""
    d, heads, head, hidden = 12, 3, 4, 48
    inner = heads * head
    shapes = {
        "0.fn.norm.weight": (d,), "0.fn.to_q.weight": (inner, d),
        "0.fn.to_kv.weight": (2 * head, d),
        "0.fn.to_out.weight": (d, inner), "0.fn.ff.0.weight": (2 * hidden, d),
        "0.fn.ff.2.weight": (d, hidden), "1.fn.norm.weight": (d,),
        "1.fn.fused_attn_ff_proj.weight": (inner + 2 * head + 2 * hidden, d),
        "1.fn.attn_out.weight": (d, inner), "1.fn.ff_out.1.weight": (d, hidden),
        "1.fn.rotary_emb.inv_freq": (head // 2,),
    }  # fmt: skip
    from safetensors.torch import save_file
    from transformers import CLIPModel

    clip(folder)
    torch.manual_seed(7)
    state = {f"model.{k}": v for k, v in CLIPModel.from_pretrained(folder).state_dict().items()}
    for layer in range(2):
        for name, shape in shapes.items():
            state[f"cross_model.layers.{layer}.{name}"] = 0.3 * torch.randn(shape)
    save_file({k: v.contiguous() for k, v in state.items()}, Path(folder) / "mps.safetensors")
    return Path(folder)
