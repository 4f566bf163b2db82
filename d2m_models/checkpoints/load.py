"""Saved models and FLUX, from a local folder or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2m_models.checkpoints.places import may_be_hub_name, refuse_pickles


def load_model(path: Path | str, dtype: torch.dtype | None = None) -> nn.Module:
    """A saved MoE/MoB model or dense FLUX transformer, a pipeline's or a single file's, in eval
    mode."""
    path = Path(path).expanduser()
    if path.is_file():
        from d2m_models.checkpoints.single_file import load_single_file

        return load_single_file(path, dtype or torch.float32)
    if (path / "model_index.json").is_file():
        path = path / "transformer"
    config = path / "config.json"
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except OSError as err:
        raise ValueError(
            f"cannot read {config}: {err.strerror or err}; expected a saved model"
        ) from err
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as err:
        raise ValueError(f"{config} is no valid model configuration ({err})") from err
    if kind != "FluxMoETransformer2DModel":
        return load_flux(path, dtype=dtype).eval()
    from d2m_models.checkpoints.source import check_dtypes, open_source
    from d2m_models.flux import FluxMoETransformer2DModel

    refuse_pickles(path)
    source = open_source(path)
    if "quantization_config" not in source.config:
        check_dtypes(source, torch.float32)  # diffusers would cast whatever it finds
    what = f"the model in {path}"
    return _load(FluxMoETransformer2DModel, path, path, what, dtype=dtype).eval()


def load_dense(path: Path | str, dtype: torch.dtype | None = None) -> nn.Module:
    """A dense transformer of any diffusers class, from its folder, a pipeline's, or the hub."""
    from d2m_models.checkpoints.pipelines import load_transformer, read_index

    local = Path(path).expanduser()
    if local.exists() and not any(
        (local / n).is_file() for n in ("config.json", "model_index.json")
    ):
        return load_flux(path, dtype=dtype)  # says what is missing
    index = read_index(path)
    part = None if index is None else "transformer"
    kind = _class_in(local) if index is None else index.get(part, [None, None])[1]
    if kind in (None, "FluxTransformer2DModel"):
        return load_flux(path, dtype=dtype)
    model = load_transformer(path, part, dtype)
    if hasattr(model, "d2m_config"):
        raise ValueError(f"{path} is converted already; expected a dense transformer")
    return model


def _class_in(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_flux(
    path: Path | str, subfolder: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A dense `FluxTransformer2DModel` from a folder, a pipeline's folder or a hub name."""
    from diffusers import FluxTransformer2DModel

    local = Path(path)
    if subfolder is None and (local / "model_index.json").is_file():
        subfolder = "transformer"
    folder = local / subfolder if subfolder else local
    if (local.exists() or not may_be_hub_name(path)) and not (folder / "config.json").is_file():
        state = "has no config.json" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {state}; expected the folder of a saved FluxTransformer2DModel")
    what = f"a FLUX transformer from {folder}"
    return _load(FluxTransformer2DModel, path, folder, what, subfolder=subfolder, dtype=dtype)


def _load(kind: Any, path: Path | str, folder: Path, what: str, **options: Any) -> nn.Module:
    """`kind.from_pretrained(path)`, whose weights are in `folder` if it is a local one."""
    from d2m_models.flux import refuse_missing

    refuse_pickles(folder)
    try:
        model, info = kind.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **options
        )
        refuse_missing(folder, model, info)
        return model
    except Exception as err:  # diffusers, safetensors and the hub client raise many kinds
        raise ValueError(f"cannot load {what}: {' '.join(str(err).split())}") from err
