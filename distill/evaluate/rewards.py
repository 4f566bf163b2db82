"""CLIP score, ImageReward and MPS: how well an image fits its prompt, and how well it is liked.

ImageReward's package wants libraries of 2023, and MPS has none: both models' published weights are
read into transformers' BLIP and CLIP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.evaluate.judges import Item, Judges, batches, place


def clip_score(items: Sequence[Item], judges: Judges) -> dict[str, dict[str, float]]:
    """100 max(cos(image, prompt), 0), Hessel et al. 2021, without their factor of 2.5."""
    clip = judges.need("model", judges.clip)
    values: dict[str, float] = {}
    for part in batches(items, 16):
        images = clip.images([item.open() for item in part])
        texts = clip.texts([item.prompt.text for item in part])
        scores = 100 * torch.cosine_similarity(images, texts).clamp(min=0)
        values |= dict(zip((item.key for item in part), scores.tolist(), strict=True))
    return {"clip": values}


def weights_of(name: str, file: str) -> tuple[dict[str, Tensor], Path | None]:
    """(state dict, local folder) of a checkpoint: a file, a folder with it, or the hub's.

    Pickles hold tensors alone or are refused (`weights_only`).
    """
    path = Path(name)
    if not path.exists():
        from huggingface_hub import hf_hub_download

        repository, _, revision = name.partition("@")
        path = Path(hf_hub_download(repository, file, revision=revision or None))
    if path.is_dir():
        path = next((p for p in (path / file, path / "model.safetensors") if p.exists()), path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path), path.parent
    return torch.load(path, map_location="cpu", weights_only=True), path.parent


class ImageReward:
    """BLIP's [CLS] over image and text through an MLP, standardised (Xu et al. 2023).

    config.json of a BlipConfig beside the weights takes the place of the published sizes.
    """

    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the reward, in the published code
    # names of BLIP's own code -> transformers'
    NAMES = ((r"^blip\.visual_encoder\.", "vision_model."), (r"^blip\.", ""),
             (r"\.blocks\.", ".encoder.layers."), (r"\.attn\.proj\.", ".self_attn.projection."),
             (r"\.attn\.", ".self_attn."), (r"\.norm(\d)\.", r".layer_norm\1."),
             (r"model\.norm\.", "model.post_layernorm."),
             (r"model\.patch_embed\.proj\.", "model.embeddings.patch_embedding."),
             (r"model\.pos_embed$", "model.embeddings.position_embedding"),
             (r"model\.cls_token$", "model.embeddings.class_embedding"))  # fmt: skip

    def __init__(self, name: str, device: torch.device):
        from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor

        state, folder = weights_of(name, "ImageReward.pt")
        config = BlipConfig(
            vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                           "num_attention_heads": 16, "image_size": 224, "hidden_act": "gelu",
                           "layer_norm_eps": 1e-6},
            text_config={"hidden_size": 768, "encoder_hidden_size": 1024, "vocab_size": 30524},
        )  # fmt: skip
        if folder is not None and (folder / "config.json").exists():
            config = BlipConfig.from_pretrained(folder)
        self.model = BlipForImageTextRetrieval(config)
        self.model.mlp = nn.Sequential(*(
            nn.Linear(*reversed(state[f"mlp.layers.{i}.weight"].shape)) for i in (0, 2, 4, 6, 7)
        ))  # fmt: skip
        renamed = {}
        for key, tensor in state.items():
            for old, new in self.NAMES:
                key = re.sub(old, new, key)
            if match := re.fullmatch(r"mlp\.layers\.(\d)\.(\w+)", key):
                key = f"mlp.{(0, 2, 4, 6, 7).index(int(match[1]))}.{match[2]}"
            renamed[key] = tensor
        missing, _ = self.model.load_state_dict(renamed, strict=False)
        needed = [k for k in missing if k.startswith(("vision_model", "text_encoder", "mlp"))]
        if needed := [k for k in needed if "position_ids" not in k]:
            raise ValueError(f"the checkpoint lacks {needed[:3]}; expected ImageReward.pt's names")
        self.model.eval().to(device)
        side = config.vision_config.image_size
        # shortest side, bicubic, then the middle, as ImageReward's own transform
        self.processor = BlipImageProcessor(size={"height": side, "width": side})
        self.side, self.device = side, device

    @torch.no_grad()
    def __call__(self, image: Any, tokens: Any) -> float:
        pixels = self.processor(images=square(image, self.side), return_tensors="pt")
        seen = self.model.vision_model(pixels["pixel_values"].to(self.device)).last_hidden_state
        read = self.model.text_encoder(
            tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
            encoder_hidden_states=seen,
        ).last_hidden_state
        return float((self.model.mlp(read[:, 0].float()) - self.MEAN) / self.STD)


def square(image: Any, side: int) -> Any:
    """The shorter side scaled to `side` (bicubic), the middle cut out: torchvision's Resize and
    CenterCrop."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    width, height = int(side * width / short), int(side * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def image_reward(items: Sequence[Item], judges: Judges) -> dict[str, dict[str, float]]:
    from transformers import AutoTokenizer

    judge = judges.need("model", lambda name: ImageReward(name, judges.device))
    tokenizer = judges.need("tokenizer", lambda name: AutoTokenizer.from_pretrained(**place(name)))
    length = {"padding": "max_length", "truncation": True, "max_length": 35}
    return {"image_reward": {
        item.key: judge(item.open(), tokenizer(item.prompt.text, return_tensors="pt", **length))
        for item in items
    }}  # fmt: skip


class MPS:
    """CLIP ViT-H/14 and cross attention of image to text under a condition (Zhang et al. 2024).

    The state dict has the names "model.*" (transformers' CLIP) and "cross_model.*". The published
    checkpoint is a pickled module; `torch.save(torch.load(FILE, weights_only=False).state_dict(),
    NEW)` inside the MPS repository makes the state dict of it.
    """

    CONDITION = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
        "structure, instance, texture, quantity, attributes, position, number, location, word, "
        "things."
    )
    RELEVANT = 0.01  # of the largest similarity to the condition; other tokens are masked

    def __init__(self, name: str, clip: Any, device: torch.device):
        try:
            state, _ = weights_of(name, "model.safetensors")
        except Exception as err:
            raise UserError(
                f"mps: cannot read {name!r} ({type(err).__name__}); expected a state dict. Of the "
                "published MPS_overall_checkpoint.pth make one inside its repository: torch.save("
                "torch.load(FILE, weights_only=False).state_dict(), NEW); then say "
                "--judge mps.model=NEW"
            ) from err
        own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        clip.model.load_state_dict(own, strict=False)
        self.model, self.clip, self.device = clip.model, clip, device
        self.cross = {k.removeprefix("cross_model."): v.to(device).float()
                      for k, v in state.items() if k.startswith("cross_model.")}  # fmt: skip
        if not self.cross:
            raise UserError(f"mps: {name!r} has no tensors named cross_model.*")

    def _text(self, text: str) -> tuple[Tensor, Tensor]:
        """(every token's features [1, n, d], the text's [1, d])."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.clip.tokenizer(text, max_length=length, padding="max_length", truncation=True,
                                  return_tensors="pt")["input_ids"].to(self.device)  # fmt: skip
        output = self.model.text_model(ids)
        project = self.model.text_projection
        return project(output.last_hidden_state), project(output.pooler_output)

    @torch.no_grad()
    def __call__(self, image: Any, prompt: str) -> float:
        pixels = self.clip.processor(images=image, return_tensors="pt")["pixel_values"]
        seen = self.model.vision_model(pixels.to(self.device)).last_hidden_state
        seen = self.model.visual_projection(seen)
        tokens, text = self._text(prompt)
        near = (self._text(self.CONDITION)[0] @ tokens.mT).amax(1, keepdim=True)  # [1, 1, n]
        mask = torch.where(near / near.max() > self.RELEVANT, 0.0, float("-inf"))
        found = cross(seen, tokens, mask, self.cross)[:, 0]
        return float(self.model.logit_scale.exp() * torch.cosine_similarity(text, found))


def cross(x: Tensor, context: Tensor, mask: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """MPS's layers over image tokens x [B, n, d]: each attends to the text, then to itself,
    rotary, with one key and value for all heads and a SwiGLU beside the attention."""
    for i in range(1 + max(int(name.split(".")[1]) for name in weights)):
        w = {k.split(".fn.")[1]: v for k, v in weights.items() if k.startswith(f"layers.{i}.0.")}
        h = nn.functional.layer_norm(x, x.shape[-1:], w["norm.weight"])
        k, v = (context @ w["to_kv.weight"].T).chunk(2, -1)
        out = _attend(h @ w["to_q.weight"].T, k, v, mask) @ w["to_out.weight"].T
        x = x + out + _swiglu(h @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        w = {k.split(".fn.")[1]: v for k, v in weights.items() if k.startswith(f"layers.{i}.1.")}
        h = nn.functional.layer_norm(x, x.shape[-1:], w["norm.weight"])
        inner, hidden = w["attn_out.weight"].shape[1], w["ff_out.1.weight"].shape[1]
        fused = h @ w["fused_attn_ff_proj.weight"].T
        head = (fused.shape[-1] - inner - 2 * hidden) // 2
        q, k, v, ff = fused.split((inner, head, head, 2 * hidden), -1)
        out = _attend(_rotate(q, head), _rotate(k, head), v) @ w["attn_out.weight"].T
        x = x + out + _swiglu(ff) @ w["ff_out.1.weight"].T
    return x


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Heads' queries [B, n, heads * d] over one key and value [B, m, d]."""
    q = q.unflatten(-1, (-1, k.shape[-1])).transpose(1, 2)
    scores = q @ k[:, None].mT * k.shape[-1] ** -0.5
    shares = (scores if mask is None else scores + mask[:, None]).softmax(-1)
    return (shares @ v[:, None]).transpose(1, 2).flatten(2)


def _rotate(x: Tensor, head: int) -> Tensor:
    """Rotary embedding of every head of x [B, n, heads * head], halves as pairs."""
    speed = 10000.0 ** -(torch.arange(0, head, 2, device=x.device) / head)
    angle = torch.arange(x.shape[1], device=x.device)[:, None] * speed
    angle = torch.cat((angle, angle), -1)[:, None]  # [n, 1, head]
    x = x.unflatten(-1, (-1, head))
    a, b = x.chunk(2, -1)
    return (x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()).flatten(2)


def _swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return nn.functional.silu(gate) * value


def mps(items: Sequence[Item], judges: Judges) -> dict[str, dict[str, float]]:
    clip = judges.need("clip", judges.clip)
    judge = judges.need("model", lambda name: MPS(name, clip, judges.device))
    return {"mps": {item.key: judge(item.open(), item.prompt.text) for item in items}}
