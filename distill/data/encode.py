"""A family's own encoders: images to packed latents (VAE), captions to embeddings; FLUX.1's text
encoders (T5 and CLIP) are run here, those of other families by their pipelines.

Shapes: B batch, H x W pixels, h x w = H/8 x W/8 latents of c = 16 channels, S = hw/4 image tokens,
C = 4c = 64 channels of a token, L text tokens, J text width, P pooled width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.checkpoints.pipelines import read_index
from d2m_models.checkpoints.places import may_be_hub_name
from distill.errors import CheckpointError, UserError, library_errors
from distill.families.family import Family
from distill.families.flux import Flux
from distill.families.packing import pack, unpack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _check_parts(model: str, *names: str) -> None:
    """Checks that a local FLUX folder has the sub-folders; hub names are taken as they are."""
    path = Path(model).expanduser()
    if path.is_dir():
        missing = [n for n in names if not (path / n).is_dir()]
        if missing:
            raise UserError(
                f"{path} has no folder {missing[0]}/; expected FLUX's layout with "
                f"{', '.join(n + '/' for n in names)}"
            )
    elif not may_be_hub_name(model):
        raise UserError(f"{model} does not exist; expected a FLUX folder or a hub name")


def _load(kind: Any, model: str, part: str, **options: Any) -> Any:
    path = Path(model).expanduser()
    try:
        return kind.from_pretrained(
            str(path) if path.exists() else model, subfolder=part, **options
        )
    except Exception as err:  # diffusers, transformers, safetensors and the hub raise many kinds
        raise CheckpointError(
            f"cannot load {part} from {model}: {' '.join(str(err).split())}"
        ) from err


def weights_fingerprint(module: nn.Module, settings: Any, head: int | None = None) -> str:
    """SHA-256 (16 digits) over settings and weights; with `head` only each tensor's first bytes."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().contiguous().flatten()
        if head is not None:
            flat = flat[: head // value.element_size()]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(flat.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _own_precision(device: str) -> Iterator[None]:
    """Without gradients and outside a surrounding autocast: what an encoder gives must not depend
    on who asks.
    """
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        yield


def _vae_class(model: str, family: Family) -> Any:
    import diffusers

    if isinstance(family, Flux):
        return diffusers.AutoencoderKL
    with library_errors():
        return getattr(diffusers, read_index(model)["vae"][1])


class LatentEncoder:
    """The VAE of a pipeline's folder or hub name: images to packed, scaled latents.

    latents = (z - shift) * scale, z the mode of the VAE's posterior, or a draw; shift and scale are
    the family's, for FLUX.1 numbers. A VAE for video is given one frame.
    """

    def __init__(
        self, model: str, device: str = "cpu", dtype: str = "float32", family: Family | None = None
    ):
        family = family or Flux()
        _check_parts(model, "vae")
        kind = _vae_class(model, family)
        self.vae = _load(kind, model, "vae", dtype=DTYPES[dtype], use_safetensors=True)
        self.vae.eval().requires_grad_(False)
        config = self.vae.config
        self.shift, self.scale = family.scaling(self.vae)
        levels = config.get("temperal_downsample", config.get("block_out_channels", ())[1:])
        self.factor, self.video = 2 ** len(levels), "temperal_downsample" in config
        self.channels = 4 * (config["z_dim"] if self.video else config["latent_channels"])
        keys = ("latent_channels", "shift_factor", "scaling_factor", "block_out_channels")
        keys = [k for k in (*keys, "latents_mean", "latents_std") if k in config]
        self.fingerprint = weights_fingerprint(self.vae, {k: config[k] for k in keys})
        self.device, self.dtype = device, DTYPES[dtype]
        self.vae.to(device)

    def tokens(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens that an image of `bucket` pixels becomes."""
        return bucket[0] // (2 * self.factor), bucket[1] // (2 * self.factor)

    def encode(self, images: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """uint8 [B, 3, H, W] -> fp32 [B, S, C] on the CPU.

        Args:
            generators: one an image to draw z from the posterior with; None for its mode.
        """
        x = images.to(self.device, torch.float32) / 127.5 - 1
        with _own_precision(self.device):
            x = x[:, :, None] if self.video else x
            posterior = self.vae.encode(x.to(self.dtype)).latent_dist
        z = posterior.mean.float()
        if generators is not None:
            shape = z.shape[1:]
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
            z = z + posterior.std.float() * noise.to(z.device)
        packed = pack(z[:, :, 0] if self.video else z).cpu()
        return (packed - self.shift) * self.scale

    def decode(self, tokens: Tensor, rows: int) -> Tensor:
        """The way back: [B, S, C] of `rows` rows of tokens -> images [B, 3, H, W] in 0..1 on the
        CPU.
        """
        z = unpack(tokens.cpu().float() / self.scale + self.shift, rows).to(self.device)
        z = z[:, :, None] if self.video else z
        with _own_precision(self.device):
            x = self.vae.decode(z.to(self.dtype)).sample.float().cpu()
        x = x[:, :, 0] if self.video else x
        return (x / 2 + 0.5).clamp(0, 1)


class TextEncoder:
    """T5 (tokens) and CLIP (pooled vector) of a FLUX folder or hub name.

    Every caption is encoded by itself: a batched product's rounding depends on the batch's size,
    and a sample's embedding must not depend on the number of ranks. At 512 tokens a caption, that
    fills a GPU.
    """

    def __init__(self, model: str, device: str = "cpu", dtype: str = "bfloat16", length: int = 512):
        try:
            from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
        except ImportError:
            raise UserError(
                "the text encoders need `transformers`: pip install 'dense2moe[data]'"
            ) from None
        _check_parts(model, "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        kind, safe = DTYPES[dtype], {"use_safetensors": True}
        self.clip = _load(CLIPTextModel, model, "text_encoder", dtype=kind, **safe)
        self.t5 = _load(T5EncoderModel, model, "text_encoder_2", dtype=kind, **safe)
        self.clip_tokenizer = _load(AutoTokenizer, model, "tokenizer")
        self.t5_tokenizer = _load(AutoTokenizer, model, "tokenizer_2")
        for module in (self.clip, self.t5):
            module.eval().requires_grad_(False).to(device)
        self.device, self.length, self.rows = device, length, length
        self.text_dim = self.t5.config.d_model
        self.pooled_dim = self.clip.config.hidden_size
        # 9.5 GB of T5: the first 4 KiB of every tensor tell versions apart.
        parts = [weights_fingerprint(m, {}, 4096) for m in (self.clip, self.t5)]
        self.fingerprint = "-".join(parts)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> (text [B, L, J], pooled [B, P]) on the encoders' device, in their dtype.

        Longer captions are cut at L = `length` T5 tokens and CLIP's 77, shorter ones are padded and
        the padding is encoded too, as FLUX was trained (no attention mask).
        """
        most, text, pooled = self.clip_tokenizer.model_max_length, [], []
        with _own_precision(self.device):
            for caption in captions:
                text.append(self.t5(self._ids(self.t5_tokenizer, caption, self.length))[0])
                pooled.append(
                    self.clip(self._ids(self.clip_tokenizer, caption, most)).pooler_output
                )
        return torch.cat(text), torch.cat(pooled)

    def _ids(self, tokenizer: Any, caption: str, length: int) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer([caption], max_length=length, **options).input_ids.to(self.device)


class PipelineText:
    """The text encoders of a family's pipeline, run by its own `encode_prompt`, a caption at a time
    (see `TextEncoder`); text shorter than L is followed by zeros."""

    def __init__(
        self, model: str, family: Family, device: str = "cpu", dtype: str = "bfloat16",
        length: int = 512,
    ):  # fmt: skip
        from diffusers import DiffusionPipeline

        path = Path(model).expanduser()
        try:
            self.pipe = DiffusionPipeline.from_pretrained(
                str(path) if path.exists() else model, transformer=None, vae=None,
                dtype=DTYPES[dtype],
            )  # fmt: skip
        except Exception as err:  # diffusers, transformers and the hub raise many kinds
            raise CheckpointError(
                f"cannot load the text encoders of {model}: {' '.join(str(err).split())}"
            ) from err
        # where a pipeline may do without (Wan's), diffusers has loaded it nevertheless
        given = [n for n in self.pipe.components if n == "vae" or n.startswith("transformer")]
        self.pipe.register_modules(**dict.fromkeys(given))
        self.pipe.to(device)
        self.family, self.device, self.length = family, device, length
        parts = sorted(self.pipe.components.items())
        modules = [m.eval().requires_grad_(False) for _, m in parts if isinstance(m, nn.Module)]
        # the first 4 KiB of every tensor tell versions apart
        self.fingerprint = "-".join(weights_fingerprint(m, {}, 4096) for m in modules)
        self.rows = family.text_rows(self.pipe, length)
        _, self.text_dim, self.pooled_dim = family.sizes()

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> (text [B, L, J], pooled [B, P]); P is 0 where there is none."""
        texts, pooled = [], []
        with _own_precision(self.device):
            for caption in captions:
                text, vector = self.family.encode(self.pipe, caption, self.length)
                text = text[: self.rows]
                texts.append(nn.functional.pad(text, (0, 0, 0, self.rows - len(text))))
                pooled.append(text.new_zeros(0) if vector is None else vector)
        return torch.stack(texts), torch.stack(pooled)


def text_encoder(model: str, family: Family, *args: Any, **options: Any) -> Any:
    """The encoder of a family's captions."""
    if isinstance(family, Flux):
        return TextEncoder(model, *args, **options)
    return PipelineText(model, family, *args, **options)


def text_sizes(model: str) -> tuple[int, int]:
    """(J, P) of the text encoders from their configurations, without loading them."""
    from transformers import AutoConfig

    _check_parts(model, "text_encoder", "text_encoder_2")
    clip = _load(AutoConfig, model, "text_encoder")
    clip = getattr(clip, "text_config", clip)
    return _load(AutoConfig, model, "text_encoder_2").d_model, clip.hidden_size
