"""safetensors files read and written tensor by tensor, without mapping them into memory.

A mapped file of 5 GB counts as 5 GB of resident memory; plain reads of one tensor at a time do not.

    file = | header length, 8 bytes LE | JSON header, padded to 8 | tensors back to back |
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2m_models.files import write_json

T = TypeVar("T")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_WRITEBACK = 256 << 20
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a safetensors file, at byte `begin` of it."""

    path: Path
    begin: int

    def read(self, buffer: Tensor | None = None) -> Tensor:
        """The tensor, in memory of its own or in the first bytes of `buffer` (uint8)."""
        raw = torch.empty(self.nbytes, dtype=torch.uint8) if buffer is None else buffer
        raw = raw[: self.nbytes]
        view = memoryview(raw.numpy())
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin)
            done = 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self.path} ends within the tensor {self.name}")
                done += count
        return raw.view(self.dtype).view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in file order; none is read.

    Raises:
        ValueError: the file is truncated, no safetensors, or of a dtype torch does not have.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # it checks every length, offset, shape and dtype of the header
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or no safetensors file ({error}); download it again"
        ) from None
    header, start = _parse(path)
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, which is not supported")
        begin = start + entry["data_offsets"][0]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        tensors.append(StoredTensor(name, dtype, shape, path, begin))
    tensors.sort(key=lambda tensor: tensor.begin)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """What else the header of a file holds that `read_header` takes."""
    return _parse(path)[0].get("__metadata__") or {}


def _parse(path: Path) -> tuple[dict, int]:
    """The header, and the byte at which the tensors begin."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the tensors as they come; see `d2m_models.files` for what makes it a whole file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    waiting = 0
    with open(path, "wb", buffering=0) as file:
        _write(file, struct.pack("<Q", len(text)) + text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise RuntimeError(f"{spec} was planned, got {tensor.dtype} {tensor.shape}")
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
            _write(file, memoryview(raw.numpy()))
            waiting += spec.nbytes
            if waiting > _WRITEBACK and hasattr(os, "posix_fadvise"):
                # The disk gets to work now, not all at once at the end.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                waiting = 0


def _write(file, data) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def pack(specs: Iterable[T], limit: int) -> list[list[T]]:
    """What has `.nbytes`, in order, in files of at most `limit` (a larger one gets its own)."""
    files: list[list[T]] = []
    room = -1
    for spec in specs:
        if spec.nbytes > room:
            files.append([])
            room = limit
        files[-1].append(spec)
        room -= spec.nbytes
    return files


def file_names(count: int) -> list[str]:
    """File names as diffusers gives them."""
    if count == 1:
        return ["diffusion_pytorch_model.safetensors"]
    return [f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def write_index(folder: Path, files: dict[str, Sequence[TensorSpec]]) -> None:
    """The index that diffusers reads for a checkpoint of several files; of one there is none."""
    if len(files) == 1:
        return
    total = sum(spec.nbytes for specs in files.values() for spec in specs)
    names = {spec.name: file for file, specs in files.items() for spec in specs}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})
