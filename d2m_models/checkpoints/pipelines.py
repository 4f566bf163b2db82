"""A whole diffusers pipeline around a model: any family's, from local folders or the hub."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from d2m_models.checkpoints.origin import base_pipeline
from d2m_models.checkpoints.places import may_be_hub_name
from d2m_models.checkpoints.single_file import load_single_file
from d2m_models.checkpoints.source import open_source
from d2m_models.conversion.any_model import ENTRY, load_any
from d2m_models.flux import FluxMoETransformer2DModel

INDEX = "model_index.json"
OFFLOADS = ("model", "sequential", "group")


def load_pipeline(
    model: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: str | None = None,
) -> diffusers.DiffusionPipeline:
    """The pipeline of `base`, of the class that its model_index.json names, around `model`.

    Args:
        model: folder or hub id of a transformer (converted or dense), or of a whole pipeline.
        base: folder or hub id of the pipeline whose other parts are used; by default `model` itself
            where it is a whole pipeline, else what its configuration records as its origin.
        dtype: of all parts; by default the one in which the model is saved. Routers are fp32.
        offload: None, or how parts wait in host memory for their turn on the device: "model" (one
            part at a time), "sequential" (one layer at a time), "group" (block by block, the next
            one being fetched while one runs).

    Raises:
        ValueError: what is missing, or cannot be loaded, and why.
    """
    device = torch.device(device)
    if offload is not None and (offload not in OFFLOADS or device.type == "cpu"):
        raise ValueError(
            f"offload is {offload!r} on the device {device}; expected one of {OFFLOADS} on a GPU"
        )
    whole = None if Path(model).expanduser().is_file() else read_index(model)
    if whole is None:
        transformer = load_transformer(model, dtype=dtype)
    else:
        transformer = load_transformer(model, part_of(whole, model), dtype)
    if base is None:
        base = model if whole is not None else base_of(transformer, model)
    if base is None:
        raise ValueError(
            f"{model} is a transformer alone and does not say which pipeline it belongs to; name "
            "the folder or hub id of one as base"
        )
    index = whole if base is model else read_index(base)
    if index is None:
        raise ValueError(f"base is {base}, which has no {INDEX}; expected a whole pipeline")
    parts = {part_of(index, base): transformer, "dtype": dtype or transformer.dtype}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(_place(base), **parts)
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise many kinds
        raise ValueError(f"cannot load the pipeline {base}: {_one_line(error)}") from error
    # where a pipeline may do without (Wan's), diffusers ignores the one it is given
    pipe.register_modules(**{part_of(index, base): transformer})
    return _put(pipe, device, offload)


def load_transformer(
    model: str | Path, subfolder: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of a folder or hub id: ours, or the diffusers class that its config.json names.

    Args:
        dtype: by default the one that most of the saved weights have.
    """
    source = open_source(model, subfolder)
    if source.folder.is_file():
        return load_single_file(source.folder, dtype)
    name = source.config.get("_class_name")
    kind = FluxMoETransformer2DModel
    if name != kind.__name__:
        kind = getattr(diffusers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
            raise ValueError(f"{model} holds the class {name}; expected a model of diffusers")
    sizes: Counter[torch.dtype] = Counter()
    for tensor in source.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes * tensor.dtype.is_floating_point
    dtype = dtype or max(sizes, key=lambda found: sizes[found], default=None)
    try:
        if ENTRY in source.config:
            return load_any(kind, source.folder, dtype=dtype, use_safetensors=True)
        return kind.from_pretrained(source.folder, dtype=dtype, use_safetensors=True).eval()
    except Exception as error:
        raise ValueError(f"cannot load {name} from {model}: {_one_line(error)}") from error


def base_of(transformer: nn.Module, path: str | Path) -> str | None:
    """The pipeline that a model was made of, as it records it itself, or the one it lies in."""
    around = base_pipeline(path)
    found = (transformer.config.get("origin") or {}).get("base")
    if found and not found.endswith(".safetensors"):
        return found
    return around if (Path(around) / INDEX).is_file() else None


def read_index(model: str | Path) -> dict[str, Any] | None:
    """model_index.json of a pipeline; None for anything else."""
    return _read(model, INDEX)


def read_config(model: str | Path, part: str) -> dict[str, Any]:
    """config.json of a pipeline's part."""
    found = _read(model, f"{part}/config.json")
    if found is None:
        raise ValueError(f"{model} has no {part}/config.json; expected a whole pipeline")
    return found


def part_of(index: dict[str, Any], owner: str | Path) -> str:
    """The name of the denoiser among a pipeline's parts."""
    for part in ("transformer", "unet"):
        if index.get(part, [None])[0] is not None:
            return part
    raise ValueError(f"{owner} ({index.get('_class_name')}) has no part 'transformer' or 'unet'")


def _read(model: str | Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or hub repository; None where there is no such file."""
    folder = Path(model).expanduser()
    path: Path | None = folder / name
    if not folder.is_dir():
        if folder.exists() or not may_be_hub_name(model):
            what = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"{model} {what}; expected a folder or a hub id (owner/name)")
        path = _fetch(str(model), name)
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; expected a JSON object")
    return found


def _fetch(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # unknown, gated, offline: the hub client raises many kinds
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(
            f"{repository} is no local folder, and it cannot be downloaded: {_one_line(error)}"
        ) from error


def _place(model: str | Path) -> str:
    folder = Path(model).expanduser()
    return str(folder) if folder.is_dir() else str(model)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _put(pipe: Any, device: torch.device, offload: str | None) -> Any:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(
            onload_device=device, offload_type="block_level", num_blocks_per_group=1,
            use_stream=device.type == "cuda",
        )  # fmt: skip
    else:
        pipe.to(device)
    return pipe
