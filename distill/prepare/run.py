"""The state of one `d2m prepare`: encoders, the shard being filled, the manifest.

A shard is a function of the source's items [start, until) and the settings alone, and the manifest
that names it is replaced only after it is on disk. So a run that was killed at any moment goes on
after the last shard that the manifest names, and writes what it would have written.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import files as ckpt
from distill.data.batch import generator
from distill.data.encode import DTYPES, LatentEncoder, text_encoder
from distill.data.folder import FORMAT, Sample, bucket_size, damage, read_manifest, write_shard
from distill.errors import CheckpointError, UserError
from distill.families.registry import open_family
from distill.prepare.decode import Decoded

NAMED = 3  # entries the manifest names under a reason


@dataclass(frozen=True)
class Settings:
    """What the shards' contents depend on beside the source and the models.

    size: side of the square bucket; max_aspect, max_upscale: larger ratios of sides and of
    enlargement than these are cropped to the nearest bucket and left out. latents: "mode" or
    "sample" of the VAE's posterior. dtype: of stored latents. precision: of the VAE. shard_mb: size
    that no shard exceeds. batch: images the VAE encodes at once. length: T5 tokens a caption in
    cached embeddings.
    """

    size: int = 1024
    max_aspect: float = 2.0
    max_upscale: float = 1.0
    latents: str = "mode"
    dtype: str = "float16"
    precision: str = "float32"
    text_embeddings: bool = False
    length: int = 512
    text_precision: str = "bfloat16"
    shard_mb: float = 256.0
    batch: int = 8
    seed: int = 0


class Sizes:
    """A sample's size in a shard.

    about: the encoders' part of the manifest. text_rows: tokens of a cached text, padding included.
    """

    def __init__(self, settings: Settings, about: dict[str, Any], text_rows: int):
        self.settings, self.about, self.text_rows = settings, about, text_rows

    def tokens(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens that an image of `bucket` pixels becomes."""
        side = 2 * self.about["vae"]["factor"]
        return bucket[0] // side, bucket[1] // side

    def sample_bytes(self, item: Decoded) -> int:
        """What one sample takes in a shard, but for its share of the header."""
        rows, columns = self.tokens(item.bucket)
        size = len(item.caption.encode()) + 16  # with its end and its CRC
        size += (
            rows * columns * self.about["vae"]["channels"] * DTYPES[self.settings.dtype].itemsize
        )
        if text := self.about["text"]:
            width = self.text_rows * text["dim"] + text["pooled_dim"]
            size += width * DTYPES[self.settings.text_precision].itemsize
        return size


class Encoders(Sizes):
    """The VAE and, for cached embeddings, the text encoders."""

    def __init__(self, model: str, settings: Settings, device: str):
        family = open_family(model)
        self.vae = vae = LatentEncoder(model, device, settings.precision, family)
        self.text = text = None
        about: dict[str, Any] = {
            "vae": {
                "fingerprint": vae.fingerprint,
                "shift_factor": _plain(vae.shift),
                "scaling_factor": _plain(vae.scale),
                "factor": vae.factor,
                "channels": vae.channels,
            },
            "text": None,
        }
        if settings.text_embeddings:
            options = (device, settings.text_precision, settings.length)
            self.text = text = text_encoder(model, family, *options)
            about["text"] = {
                "fingerprint": text.fingerprint,
                "length": text.length,
                "dim": text.text_dim,
                "pooled_dim": text.pooled_dim,
            }
        super().__init__(settings, about, 0 if text is None else text.rows)

    def empty(self) -> dict[str, Tensor]:
        """The empty prompt's embedding; nothing where none are cached."""
        if self.text is None:
            return {}
        text, pooled = (x[0].cpu() for x in self.text.encode([""]))
        return {"text": text} | ({"pooled": pooled} if len(pooled) else {})

    def submit(self, images: list[Decoded]) -> Callable[[], list[Sample]]:
        """Start to encode; what comes back gives the samples."""
        samples = self.encode(images)
        return lambda: samples

    def encode(self, images: list[Decoded]) -> list[Sample]:
        """Images of one bucket to samples, in their order."""
        pixels = torch.from_numpy(np.stack([d.pixels for d in images]))
        draws = None
        if self.settings.latents == "sample":
            draws = [generator(self.settings.seed, "sample", d.number) for d in images]
        latents = self.vae.encode(pixels, draws).to(DTYPES[self.settings.dtype])
        samples = []
        for d, latent in zip(images, latents, strict=True):
            text = pooled = None
            if self.text is not None:
                text, pooled = (x[0].cpu() for x in self.text.encode([d.caption]))
                pooled = pooled if len(pooled) else None
            samples.append(
                Sample(d.number, d.key, d.caption, d.bucket, d.size, latent.clone(), text, pooled)
            )
        return samples


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


class Run:
    """The state of one `d2m prepare`: its manifest, bad items, and the shard being filled."""

    def __init__(self, out: Path, settings: Settings, encoders: Any, source: dict[str, Any]):
        self.out, self.settings, self.encoders = out, settings, encoders
        self.pending: dict[tuple[int, int], list[Decoded]] = defaultdict(list)
        self.encoding: list[Callable[[], list[Sample]]] = []
        self.bytes = 0
        start = {
            "format": FORMAT,
            "complete": False,
            "settings": asdict(settings),
            "source": source,
            **encoders.about,
            "samples": 0,
            "bad": 0,
            "left_out": {},
            "warnings": {},
            "buckets": {},
            "shards": [],
        }
        self.manifest, self.bad = start, []
        if (out / "manifest.json").exists():
            self.manifest = read_manifest(out)
            same(self.manifest, start, out)
            self.bad = read_bad(out)[: self.manifest["bad"]]
            for entry in self.manifest["shards"]:
                if wrong := damage(out, entry):
                    raise CheckpointError(f"{out}: {wrong}; remove the folder and prepare it anew")
            if "left_out" not in self.manifest:
                raise UserError(
                    f"{out} was begun by a version that numbered items otherwise; finish it with "
                    "that one, or remove the folder and prepare it anew"
                )

    @property
    def next(self) -> int:
        """Number of the first item that no finished shard covers."""
        return self.manifest["shards"][-1]["until"] if self.manifest["shards"] else 0

    def note(self, what: str, why: str, key: str) -> None:
        """Count an entry under its reason in the manifest's "left_out" or "warnings"."""
        entry = self.manifest[what].setdefault(why, {"count": 0, "first": []})
        entry["count"] += 1
        entry["first"] += [key][: NAMED - len(entry["first"])]

    def add(self, item: Decoded) -> None:
        """Take one decoded image, in the source's order."""
        size = self.encoders.sample_bytes(item)
        waiting = self.pending[item.bucket]
        if self.bytes and self.bytes + size > self.settings.shard_mb * 1e6:
            self.close(item.number)
            waiting = self.pending[item.bucket]
        self.bytes += size
        waiting.append(item)
        if item.warning is not None:
            self.note("warnings", item.warning, item.key)
        if len(waiting) == self.settings.batch:
            self._encode(item.bucket)

    def _encode(self, bucket: tuple[int, int]) -> None:
        self.encoding.append(self.encoders.submit(self.pending.pop(bucket)))

    def _encoded(self) -> list[Sample]:
        """The shard's samples; those whose latents are not finite are bad."""
        found = [sample for wait in self.encoding for sample in wait()]
        self.encoding = []
        why = "the VAE's latents are not finite"
        samples = []
        for s in sorted(found, key=lambda s: s.number):
            if torch.isfinite(s.latent).all():
                samples.append(s)
            else:
                self.bad.append({"number": s.number, "key": s.key, "error": why})
        return samples

    def close(self, until: int, complete: bool = False) -> None:
        """Write the shard that is being filled and the manifest that names it."""
        for bucket in sorted(self.pending):
            if self.pending[bucket]:
                self._encode(bucket)
        self.pending.clear()
        self.bytes = 0
        done, samples = self.manifest, self._encoded()
        if not samples and not complete:
            return  # nothing but bad ones: they belong to the shard that comes next
        if samples:
            entry = write_shard(self.out, len(done["shards"]), samples, until)
            done["shards"].append(entry)
            done["samples"] += len(samples)
            for name, count in entry["buckets"].items():
                rows, columns = self.encoders.tokens(bucket_size(name))
                bucket = done["buckets"].setdefault(name, {"samples": 0, "tokens": [rows, columns]})
                bucket["samples"] += count
        self.bad.sort(key=lambda b: b["number"])
        done |= {"complete": complete, "bad": len(self.bad)}
        done["buckets"] = dict(sorted(done["buckets"].items()))
        ckpt.write_text(self.out / "bad.jsonl", "".join(json.dumps(b) + "\n" for b in self.bad))
        ckpt.write_text(self.out / "manifest.json", json.dumps(done, indent=1) + "\n")

    def reject(self, item: Decoded, max_bad: str) -> None:
        """Count an unreadable item; too many of them are an error."""
        self.bad.append({"number": item.number, "key": item.key, "error": item.error})
        if len(self.bad) > bad_limit(max_bad, item.number + 1):
            last = "; ".join(f"{b['key']}: {b['error']}" for b in self.bad[-3:])
            raise UserError(
                f"{len(self.bad)} of {item.number + 1} entries cannot be used, more than "
                f"--max-bad {max_bad} allows: {commonest(self.bad)}; the last: {last}"
            )


def commonest(bad: list[dict[str, Any]]) -> str:
    """The reason most items are bad for, with its number."""
    [(reason, count)] = Counter(b["error"] for b in bad).most_common(1)
    return f"{'all' if count == len(bad) else 'mostly'} for the same reason, {count} times {reason}"


def bad_limit(text: str, seen: int) -> float:
    """ "25" bad images at most, or "1%" of those seen (and ten at any time)."""
    try:
        if text.endswith("%"):
            return max(10, float(text[:-1]) / 100 * seen)
        return int(text)
    except ValueError:
        raise UserError(f"--max-bad is {text!r}; expected a number or a share like 1%") from None


def same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    """A UserError that names the first setting, model or source in which two manifests differ."""
    for part in ("settings", "source", "vae", "text"):
        if part not in new or old.get(part) == new[part]:
            continue
        was, now = old.get(part) or {}, new[part] or {}
        key = next((k for k in {**was, **now} if was.get(k) != now.get(k)), "")
        raise UserError(
            f"{out} was begun with {part} {key} {was.get(key)!r}, now it is {now.get(key)!r}; "
            "repeat the first command, or choose another output folder"
        )


def read_bad(out: Path) -> list[dict[str, Any]]:
    try:
        lines = (out / "bad.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, json.JSONDecodeError) as err:
        raise CheckpointError(f"cannot read {out / 'bad.jsonl'}: {err}") from err
