"""Black Forest Labs' single-file layout of FLUX, as a table to and from diffusers' names.

One tensor of theirs holds the rows of one or more of diffusers' one after another, so that a part
is a range of bytes of the file; only the halves (shift, scale) of the last AdaLN change places.
What the table does not name, routers and neuron orders, keeps its own name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from d2m_models.checkpoints.tensor_files import StoredTensor, read_header, read_metadata

CONFIG, HISTORY = "d2m_config", "d2m_conversion"  # of the metadata, both JSON
LAST_ADALN = "norm_out.linear."
_PREFIX = "model.diffusion_model."  # of files that hold text encoders and VAE as well
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm.scale": ("attn.norm_q",),
    "img_attn.norm.key_norm.scale": ("attn.norm_k",),
    "txt_attn.norm.query_norm.scale": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm.scale": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm.scale": ("attn.norm_q",),
    "norm.key_norm.scale": ("attn.norm_k",),
}


def bfl_names(double: int, single: int) -> dict[str, tuple[str, ...]]:
    """{tensor of theirs: diffusers' tensors whose rows it holds, in this order}."""
    places = [("", "", _ENDS)]
    places += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", _DOUBLE) for i in range(double)]
    places += [
        (f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", _SINGLE) for i in range(single)
    ]
    names = {}
    for before, ours, table in places:
        for theirs, parts in table.items():
            if theirs.endswith(".scale"):
                names[before + theirs] = tuple(f"{ours}{part}.weight" for part in parts)
                continue
            for kind in ("weight", "bias"):
                names[f"{before}{theirs}.{kind}"] = tuple(f"{ours}{p}.{kind}" for p in parts)
    return names


def swap_halves(tensor: Tensor) -> Tensor:
    """[shift; scale] <-> [scale; shift], along the rows."""
    return tensor.roll(tensor.shape[0] // 2, 0)


@dataclass(frozen=True)
class _Swapped(StoredTensor):
    def read(self, buffer: Tensor | None = None) -> Tensor:
        return swap_halves(super().read(buffer))


def is_bfl(names: Collection[str]) -> bool:
    """Whether a file with tensors of these names is in this layout."""
    return any(name.removeprefix(_PREFIX).startswith("double_blocks.") for name in names)


def read_bfl(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Config and tensors under diffusers' names; none is read.

    Raises:
        ValueError: the file is in another layout, or its configuration cannot be told.
    """
    stored = read_header(path)
    if not is_bfl(stored):
        raise ValueError(
            f"{path} is no single file of FLUX (it has no double_blocks.0...); expected one in "
            "Black Forest Labs' layout, or the folder of a saved FLUX transformer"
        )
    if any(name.startswith(_PREFIX) for name in stored):
        stored = {
            name.removeprefix(_PREFIX): t for name, t in stored.items() if name.startswith(_PREFIX)
        }
    written = read_metadata(path).get(CONFIG)
    try:
        config = json.loads(written) if written is not None else _config(stored)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not tell its configuration: {error}") from error
    width = stored["img_in.weight"].shape[0]
    tensors: dict[str, StoredTensor] = {}
    for theirs, ours in bfl_names(_depth(stored, "double"), _depth(stored, "single")).items():
        if theirs not in stored:
            continue  # guidance; of anything else the check of the model says that it is missing
        tensor = stored.pop(theirs)
        kind = _Swapped if ours[0].startswith(LAST_ADALN) else StoredTensor
        rows = [width] * (len(ours) - 1)
        begin, row_bytes = tensor.begin, tensor.nbytes // max(tensor.shape[0], 1)
        for name, size in zip(ours, [*rows, tensor.shape[0] - sum(rows)], strict=True):
            shape = (size, *tensor.shape[1:])
            tensors[name] = kind(name, tensor.dtype, shape, tensor.path, begin)
            begin += size * row_bytes
    return config, tensors | stored


def _depth(names: Collection[str], kind: str) -> int:
    return next(i for i in count() if not any(n.startswith(f"{kind}_blocks.{i}.") for n in names))


def _config(stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """FLUX.1's configuration from shapes alone, as files of others do not bring it along."""
    width, channels = stored["img_in.weight"].shape
    out = stored["final_layer.linear.weight"].shape[0]
    head = stored["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    if head != 128:
        raise ValueError(
            f"its heads have {head} channels; FLUX.1's have 128, of which 16, 56 and 56 hold the "
            "position"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": _depth(stored, "double"),
        "num_single_layers": _depth(stored, "single"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": stored["txt_in.weight"].shape[1],
        "pooled_projection_dim": stored["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in stored,
        "axes_dims_rope": [16, 56, 56],
    }
