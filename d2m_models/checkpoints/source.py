"""Finds the tensors of a saved FLUX transformer without loading them, and says what is wrong.

A source is a folder as `save_pretrained` writes it, a pipeline's folder (its `transformer` is found
itself), a hub id, of which only the transformer is downloaded, or a single file in Black Forest
Labs' layout.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from d2m_models.checkpoints.bfl import is_bfl, read_bfl
from d2m_models.checkpoints.places import may_be_hub_name, refuse_pickles
from d2m_models.checkpoints.tensor_files import StoredTensor, read_header
from d2m_models.flux import FluxMoETransformer2DModel

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Source:
    """A checkpoint's config, its tensors by name in file order, and its folder or single file."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def place(self, name: str) -> tuple[str, int]:
        """Where a tensor lies; sorting by it makes reads sequential."""
        return str(self.tensors[name].path), self.tensors[name].begin

    def digest(self) -> str:
        """Changes when a file or a tensor's place in it does; no tensor is read."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors, key=self.place):
            tensor = self.tensors[name]
            digest.update(repr((name, str(tensor.dtype), tensor.shape, tensor.begin)).encode())
        for path in sorted({tensor.path for tensor in self.tensors.values()}):
            stat = path.stat()
            digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()[:16]


def open_source(path: str | Path, subfolder: str | None = None, variant: str | None = None):
    """Reads config, index and file headers, nothing else.

    Args:
        path: local folder, hub id or single file. subfolder: folder within it.
        variant: as diffusers', "fp16" for diffusion_pytorch_model.fp16.safetensors.

    Raises:
        ValueError: what is there is no FLUX transformer in this format, or is not complete.
    """
    local = Path(path).expanduser()
    if local.is_file() and local.suffix == ".safetensors":
        return Source(local, *read_bfl(local))
    folder = _find_folder(path, subfolder, variant)
    config_path = folder / "config.json"
    if not config_path.is_file():
        _refuse_single_files(sorted(folder.glob("*.safetensors")))
        raise ValueError(f"{folder} has no config.json; expected a folder that diffusers saved")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is no valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds {type(config).__name__}; expected a JSON object")
    tensors: dict[str, StoredTensor] = {}
    for file in _find_files(folder, variant):
        found = read_header(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{file} holds {twice[0]}, which another shard holds as well")
        tensors |= found
    return Source(folder, config, tensors)


def _find_folder(path: str | Path, subfolder: str | None, variant: str | None) -> Path:
    local = Path(path).expanduser()
    if local.is_file():
        raise ValueError(f"{local} is a file; expected the folder of a saved FLUX transformer")
    if not local.is_dir():
        if not may_be_hub_name(path):
            raise ValueError(f"{path} does not exist")
        local = _download(str(path), subfolder, variant)
    if subfolder is None and (local / "model_index.json").is_file():
        subfolder = "transformer"
    folder = local / subfolder if subfolder else local
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist")
    return folder


def _download(name: str, subfolder: str | None, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download

    end = f".{variant}*.safetensors" if variant else ".safetensors"
    folders = [f"{subfolder}/"] if subfolder else ["", "transformer/"]
    patterns = ["model_index.json"]
    patterns += [f"{folder}{file}" for folder in folders for file in ("config.json", "*.json")]
    patterns += [f"{folder}diffusion_pytorch_model*{end}" for folder in folders]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, gated, unknown: the hub client raises many kinds
        raise ValueError(
            f"{name} is no local folder, and it cannot be downloaded: "
            f"{' '.join(str(error).split())}"
        ) from error


def _find_files(folder: Path, variant: str | None) -> list[Path]:
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    whole = folder / f"{stem}.safetensors"
    index = (
        folder / f"diffusion_pytorch_model.safetensors.index{f'.{variant}' * bool(variant)}.json"
    )
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(name for name in names if not (folder / name).is_file())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is no index of a sharded checkpoint") from None
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}; "
                f"download them again"
            )
        return sorted(folder / name for name in names)
    if whole.is_file():
        return [whole]
    others = sorted(file.name for file in folder.glob("diffusion_pytorch_model*"))
    _refuse_single_files(sorted(folder.glob("*.safetensors")))
    refuse_pickles(folder)
    hint = f"; there are {others}, see --variant" if others else ""
    raise ValueError(f"{folder} has neither {whole.name} nor {index.name}{hint}")


def _refuse_single_files(files: list[Path]) -> None:
    for file in files:
        if is_bfl(read_header(file)):
            raise ValueError(
                f"{file.parent} is no saved model, but holds a single file in Black Forest Labs' "
                f"layout; name the file itself: {file}"
            )


def check_dense_source(source: Source) -> FluxTransformer2DModel:
    """The dense model on the meta device, if the source is a complete dense FLUX."""
    kind = source.config.get("_class_name")
    if kind == "FluxMoETransformer2DModel":
        raise ValueError(f"{source.folder} is converted already; --to-dense turns it back")
    return _check(source, kind, FluxTransformer2DModel)


def check_moe_source(source: Source) -> FluxMoETransformer2DModel:
    """The converted model on the meta device, if the source is a complete one."""
    return _check(source, source.config.get("_class_name"), FluxMoETransformer2DModel)


def _check(source: Source, kind: str | None, cls: type) -> Any:
    if kind != cls.__name__:
        raise ValueError(
            f"{source.folder} holds the class {kind or '(none)'}; expected {cls.__name__}"
        )
    if "quantization_config" in source.config:
        raise ValueError(
            f"{source.folder} is quantized; start from the model in bf16, fp16 or fp32"
        )
    try:
        with torch.device("meta"):
            model = cls.from_config(source.config)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{source.folder}/config.json makes no {cls.__name__}: {error}") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in source.tensors]
    unknown = [name for name in source.tensors if name not in expected]
    wrong = [
        f"{name} is {list(source.tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in source.tensors and source.tensors[name].shape != shape
    ]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("does not fit:", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{source.folder} {what} {', '.join(names[:3])}{more}")
    return model


def check_dtypes(source: Source, wanted: torch.dtype | None) -> torch.dtype:
    """The one floating dtype of the source, or `wanted`; mixtures and fp8 are not guessed at."""
    counts = Counter(
        t.dtype for name, t in source.tensors.items()
        if "router" not in name and "neuron_order" not in name
    )  # fmt: skip
    for dtype in counts:
        if dtype not in FLOATS:
            name = next(n for n, t in source.tensors.items() if t.dtype == dtype)
            raise ValueError(
                f"{source.folder} holds {dtype} ({name}); expected bf16, fp16 or fp32. "
                f"Quantized and fp8 checkpoints cannot be converted: start from the original"
            )
    if wanted is not None:
        return wanted
    if len(counts) > 1:
        found = ", ".join(f"{count} tensors in {dtype}" for dtype, count in counts.most_common())
        raise ValueError(f"{source.folder} mixes dtypes ({found}); choose one with --dtype")
    return next(iter(counts))
