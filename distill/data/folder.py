"""The folder `d2m prepare` writes: shards of latents, an index beside each, a manifest.

manifest.json          settings, buckets, every shard's size and SHA-256, entries left out
shard-00000.safetensors   for each bucket of H x W pixels, n samples:
    latents/HxW [n, S, C]   captions/HxW: UTF-8 bytes, caption i ends at ends/HxW [n]
    crc/HxW [n]: CRC-32 of each sample's bytes   text/HxW [n, L, J], pooled/HxW [n, P] if cached
shard-00000.jsonl      one line a sample: its bucket, row, key, caption, number in the source
empty.safetensors      the empty prompt's embedding, if embeddings are cached
bad.jsonl              what could not be read, and why
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import files as ckpt
from distill.errors import CheckpointError, UserError

FORMAT = "d2m-latents-1"


@dataclass
class Sample:
    """One encoded image. latent [S, C]; text [L, J] and pooled [P] where they are cached."""

    number: int
    key: str
    caption: str
    bucket: tuple[int, int]
    size: tuple[int, int]
    latent: Tensor
    text: Tensor | None = None
    pooled: Tensor | None = None


def bucket_name(bucket: tuple[int, int]) -> str:
    return f"{bucket[0]}x{bucket[1]}"


def bucket_size(name: str) -> tuple[int, int]:
    height, _, width = name.partition("x")
    return int(height), int(width)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _crc(caption: bytes, *tensors: Tensor | None) -> int:
    value = zlib.crc32(caption)
    for t in tensors:
        if t is not None:
            value = zlib.crc32(t.contiguous().view(torch.uint8).numpy(), value)
    return value


def write_shard(folder: Path, number: int, samples: Sequence[Sample], until: int) -> dict[str, Any]:
    """Write shard `number` and its index; returns its entry in the manifest.

    until: number of the first item of the source after this shard's.
    """
    name = f"shard-{number:05d}"
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[bucket_name(sample.bucket)].append(sample)
    tensors, lines = {}, []
    for bucket, group in sorted(groups.items()):
        captions = [s.caption.encode() for s in group]
        tensors[f"latents/{bucket}"] = torch.stack([s.latent for s in group])
        tensors[f"captions/{bucket}"] = torch.frombuffer(
            bytearray(b"".join(captions)), dtype=torch.uint8
        )
        tensors[f"ends/{bucket}"] = torch.tensor([len(c) for c in captions]).cumsum(0)
        for part in ("text", "pooled"):
            if getattr(group[0], part) is not None:
                tensors[f"{part}/{bucket}"] = torch.stack([getattr(s, part) for s in group])
        tensors[f"crc/{bucket}"] = torch.tensor(
            [_crc(c, s.latent, s.text, s.pooled) for c, s in zip(captions, group, strict=True)]
        )
        for row, s in enumerate(group):
            line = {"bucket": bucket, "row": row, "number": s.number, "key": s.key}
            lines.append({**line, "size": list(s.size), "caption": s.caption})
    shard, index = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    ckpt.write_text(index, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    ckpt.save_plain(shard, tensors)
    return {
        "file": shard.name,
        "bytes": shard.stat().st_size,
        "sha256": sha256(shard),
        "index": index.name,
        "index_sha256": sha256(index),
        "samples": len(samples),
        "buckets": {bucket: len(group) for bucket, group in sorted(groups.items())},
        "until": until,
    }


def read_manifest(folder: Path | str) -> dict[str, Any]:
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise UserError(
            f"cannot read {path}: {err.strerror or err}; expected a folder of `d2m prepare`"
        ) from err
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{path} is no valid JSON ({err}); prepare the folder anew") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
    return manifest


def damage(folder: Path, entry: dict[str, Any], checksums: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a shard, or None.

    Args:
        checksums: whose SHA-256 to compare, "file" (the shard) and "index".
    """
    try:
        size = (folder / entry["file"]).stat().st_size
        if size != entry["bytes"]:
            return f"{entry['file']} has {size} bytes, not {entry['bytes']}"
        for file in checksums:
            want = entry["sha256" if file == "file" else "index_sha256"]
            if sha256(folder / entry[file]) != want:
                return f"{entry[file]} has another SHA-256 than the manifest"
    except OSError as err:
        return f"{entry['file']}: {err.strerror or err}"
    return None


class ShardFile:
    """A memory-mapped shard: reading a sample reads and checks its bytes and no others."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._names = set(self._file.keys())
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path.name} cannot be opened: {err}") from err
        self._ends: dict[str, list[int]] = {}

    def read(self, bucket: str, row: int) -> tuple[Tensor, str, Tensor | None, Tensor | None]:
        """(latent [S, C], caption, text [L, J] or None, pooled [P] or None) of one sample."""
        from safetensors import SafetensorError

        try:
            if bucket not in self._ends:
                self._ends[bucket] = [0, *self._file.get_tensor(f"ends/{bucket}").tolist()]
            start, stop = self._ends[bucket][row : row + 2]
            caption = self._file.get_slice(f"captions/{bucket}")[start:stop].numpy().tobytes()
            latent, text, pooled = (
                self._row(p, bucket, row) for p in ("latents", "text", "pooled")
            )
            crc = int(self._row("crc", bucket, row))
            if latent is None or _crc(caption, latent, text, pooled) != crc:
                raise CheckpointError(f"{self.path.name}: sample {row} of {bucket} is damaged")
            return latent, caption.decode(), text, pooled
        except (SafetensorError, OSError, ValueError, TypeError) as err:
            raise CheckpointError(f"{self.path.name}: cannot read {bucket}: {err}") from err

    def _row(self, part: str, bucket: str, row: int) -> Tensor | None:
        name = f"{part}/{bucket}"
        return self._file.get_slice(name)[row : row + 1][0] if name in self._names else None
