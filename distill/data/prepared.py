"""Training batches from folders that `d2m prepare` wrote; a source as `Digits` is one.

Shapes: B batch, S image tokens, C channels, L text tokens, J text width, P pooled width.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.configs.sections import DataConfig
from distill.data.batch import Batch, generator, image_ids, sample_timesteps
from distill.data.folder import ShardFile, damage, read_manifest
from distill.data.order import BucketOrder
from distill.errors import CheckpointError, ConfigError, TrainingError, UserError
from distill.families.family import Family
from distill.families.flux import Flux
from distill.files import fingerprint

OPEN_FILES = 8  # mapped at once; pages that were read count as this process's memory


def open_shards(
    config: DataConfig, device: str = "cpu", guidance: float | None = None,
    family: Family | None = None,
) -> Any:  # fmt: skip
    """The source of a `DataConfig` named "shards", read ahead as `config.prefetch` says."""
    from distill.data.prefetch import Prefetch

    if device == "cuda":  # a thread of its own would take the first GPU
        device = f"cuda:{torch.cuda.current_device()}"
    source = Shards(config, device, guidance, family)
    return Prefetch(source, config.prefetch) if config.prefetch else source


def manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folder's own manifest, or those of its sub-folders (the parts of several machines)."""
    folders = [folder]
    if not (folder / "manifest.json").is_file():
        folders = sorted(p.parent for p in folder.glob("*/manifest.json")) or [folder]
    found = [(f, read_manifest(f)) for f in folders]
    for f, manifest in found:
        if not manifest["complete"]:
            raise UserError(f"{f} is not complete; run its `d2m prepare` command again")
        for part in ("vae", "text"):
            if manifest[part] != found[0][1][part]:
                raise UserError(f"{f} and {found[0][0]} were prepared with another {part}")
    return found


def folder_fingerprint(config: DataConfig) -> str:
    """Hash of the SHA-256s of all shards in their order."""
    assert config.folder is not None
    parts = manifests(Path(config.folder).expanduser())
    return fingerprint([entry["sha256"] for _, m in parts for entry in m["shards"]])


class Shards:
    """Latents and captions of a prepared folder.

    Every global batch has one resolution. Which samples it holds is a function of (seed, step)
    alone (see `distill.data.order`), and every sample's noise, timestep and dropped caption one of
    (seed, its number in the run), so a rank reads and draws its own rows only.

    A sample that is damaged, or in a shard that is missing or truncated, does not change the order:
    one of the bucket's next sound shard stands in for it. Which one depends on the files alone and
    not on what was read before, so that ranks never disagree and a resumed run sees the same. More
    than `max_bad_shards` shards in which something is damaged are an error.
    """

    def __init__(
        self, config: DataConfig, device: str = "cpu", guidance: float | None = None,
        family: Family | None = None,
    ):  # fmt: skip
        assert config.folder is not None
        self.config, self.device, self.guidance = config, device, guidance
        self.family = family or Flux()
        parts = manifests(Path(config.folder).expanduser())
        first = parts[0][1]
        self.shards = [(folder, entry) for folder, m in parts for entry in m["shards"]]
        names = sorted({name for _, entry in self.shards for name in entry["buckets"]})
        if not names:
            raise UserError(f"{config.folder} has no samples")
        self.buckets = names
        self.tokens = {n: b["tokens"] for _, m in parts for n, b in m["buckets"].items()}
        # Of every bucket: its shards, and the number of the first sample of each.
        self.parts = {
            name: [i for i, (_, e) in enumerate(self.shards) if name in e["buckets"]]
            for name in names
        }
        self.starts = {
            name: [0, *accumulate(self.shards[i][1]["buckets"][name] for i in self.parts[name])]
            for name in names
        }
        self.order = BucketOrder([self.starts[name][-1] for name in names])
        self.offsets = [0, *accumulate(self.order.sizes)]
        self.vae: Any = None
        self.lost: set[int] = set()  # shards of which nothing can be read
        # these and those of which samples are damaged, as far as this process has met them
        self.bad: dict[int, str] = {}
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = Lock()
        self.channels = first["vae"]["channels"]
        self._set_text(first["text"], parts[0][0])
        from tqdm import tqdm

        checked = tqdm(self.shards, "verifying shards", unit="shard", disable=not config.verify)
        for i, (folder, entry) in enumerate(checked):
            if wrong := damage(folder, entry):
                self.lost.add(i)
            elif config.verify:
                wrong = damage(folder, entry, ("file",))
            if wrong:
                self._count(i, wrong)

    def _set_text(self, cached: dict[str, Any] | None, folder: Path) -> None:
        config, self.encoder, self._empty = self.config, None, None
        if cached is not None:
            self.text_tokens = cached["length"]
            self.text_dim, self.pooled_dim = cached["dim"], cached["pooled_dim"]
            if config.max_sequence_length != cached["length"]:
                raise ConfigError(
                    f"data.max_sequence_length is {config.max_sequence_length}, but {folder} holds "
                    f"embeddings of {cached['length']} tokens; expected the same"
                )
            from safetensors.torch import load_file

            if config.caption_dropout:
                try:
                    empty = load_file(folder / "empty.safetensors")
                except Exception as err:  # safetensors has its own error type
                    raise CheckpointError(f"cannot read {folder}/empty.safetensors: {err}") from err
                self._empty = empty["text"].float(), empty.get("pooled", torch.zeros(0)).float()
            return
        if config.text_encoders is None:
            raise ConfigError(
                f"{folder} holds no text embeddings; expected data.text_encoders, the FLUX folder "
                "or hub name whose T5 and CLIP encode the captions"
            )
        self.text_tokens = config.max_sequence_length
        if isinstance(self.family, Flux):
            from distill.data.encode import text_sizes

            self.text_dim, self.pooled_dim = text_sizes(config.text_encoders)
        else:
            _, self.text_dim, self.pooled_dim = self.family.sizes()

    def __len__(self) -> int:
        return self.offsets[-1]

    def batch(
        self, seed: int, step: int, count: int, stream: str = "train", rows: slice | None = None
    ) -> Batch:
        """Batch number `step` of the run `seed`, `count` samples over all ranks; exactly the same
        whenever and wherever it is asked for.

        Args:
            rows: only these samples of it; exactly `batch(...)[rows]`.
        """
        bucket, first = self.order.batch(seed, step, count)
        take = np.arange(count)[rows if rows is not None else slice(None)]
        numbers = self.order.samples(seed, bucket, first + take)
        with self._lock:
            samples = [
                self._sample(bucket, int(n), generator(seed, stream, step * count + int(row)))
                for n, row in zip(numbers, take, strict=True)
            ]
        x0, noise, t, text, pooled = (torch.stack(column) for column in zip(*samples, strict=True))
        return Batch(
            x0=x0,
            noise=noise,
            t=t,
            text=text,
            pooled=pooled,
            labels=torch.from_numpy(numbers + self.offsets[bucket]),
            img_ids=image_ids(*self.tokens[self.buckets[bucket]]),
            txt_ids=torch.zeros(self.text_tokens, 3),
            grid=(1, *self.tokens[self.buckets[bucket]]),
            family=self.family,
            guidance=None if self.guidance is None else torch.full((len(t),), self.guidance),
        )

    def _sample(self, bucket: int, number: int, gen: torch.Generator) -> tuple[Tensor, ...]:
        """(x0 [S, C], noise [S, C], t [], text [L, J], pooled [P]) of one sample, in fp32."""
        latent, caption, text, pooled = self._read(bucket, number)
        noise = torch.randn(latent.shape, generator=gen)
        kind, grid = self.config.timesteps, self.config.timestep_grid
        t = sample_timesteps(1, gen, kind, image_tokens=len(latent), grid=grid)[0]
        drop = bool(torch.rand((), generator=gen) < self.config.caption_dropout)
        if text is None:
            text, pooled = self._encode("" if drop else caption)
        elif drop and self._empty is not None:
            text, pooled = self._empty
        pooled = torch.zeros(0) if pooled is None else pooled
        return latent.float(), noise, t, text.float(), pooled.float()

    def _encode(self, caption: str) -> tuple[Tensor, Tensor]:
        if self.encoder is None:
            from distill.data.encode import text_encoder

            assert self.config.text_encoders is not None
            self.encoder = text_encoder(
                self.config.text_encoders, self.family, self.device, length=self.text_tokens
            )
        text, pooled = self.encoder.encode([caption])
        return text[0], pooled[0]

    def caption(self, number: int) -> str:
        """The caption of a sample by its number, `Batch.labels`."""
        bucket = bisect_right(self.offsets, number) - 1
        with self._lock:
            return self._read(bucket, number - self.offsets[bucket])[1]

    def decode(self, latents: Tensor, img_ids: Tensor) -> Tensor | None:
        """Latents [B, S, C] at img_ids [S, 3] as images [B, H, W, 3] in 0..1, with the VAE that is
        beside the text encoders; None if there is none.
        """
        model = self.config.text_encoders
        if model is None or (Path(model).is_dir() and not (Path(model) / "vae").is_dir()):
            return None
        from distill.data.encode import LatentEncoder

        if self.vae is None:
            self.vae = LatentEncoder(model, self.device, family=self.family)
        rows = int(img_ids[:, 1].max()) + 1
        images = [self.vae.decode(one[None], rows)[0] for one in latents]
        return torch.stack(images).permute(0, 2, 3, 1)

    # --- files ------------------------------------------------------------------------------

    def _read(self, bucket: int, number: int) -> tuple[Tensor, str, Tensor | None, Tensor | None]:
        """A sample's parts, or those of the one that stands in for it."""
        name = self.buckets[bucket]
        for shard, row in self._places(name, number):
            try:
                return self._file(shard).read(name, row)
            except CheckpointError as err:
                self._count(shard, str(err))
        raise TrainingError(f"no sound sample is left of the bucket {name}: {self._reasons()}")

    def _places(self, name: str, number: int) -> Iterator[tuple[int, int]]:
        """(shard, row) of a sample, then of those that may stand in for it: at the same place in
        the following shards of the bucket, then at the place after it in all of them, and so on.
        """
        starts, shards = self.starts[name], self.parts[name]
        own = bisect_right(starts, number) - 1
        place, later, longest = number - starts[own], 0, 1
        while later < longest:
            for part in chain(range(own, len(shards)), range(own)):
                if shards[part] not in self.lost:
                    yield shards[part], (place + later) % (starts[part + 1] - starts[part])
            later, longest = later + 1, max(stop - start for start, stop in pairwise(starts))

    def _file(self, shard: int) -> ShardFile:
        if shard not in self._open:
            folder, entry = self.shards[shard]
            self._open[shard] = ShardFile(folder / entry["file"])
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _count(self, shard: int, why: str) -> None:
        """Say once that a shard is damaged; too many are an error, whenever they are met again."""
        most = self.config.max_bad_shards
        if shard not in self.bad:
            self.bad[shard] = why
            print(
                "d2m: warning: replacing samples of a damaged shard "
                f"({len(self.bad)} of at most {most}): {why}",
                file=sys.stderr,
            )
        if len(self.bad) > most:
            raise TrainingError(
                f"{len(self.bad)} of {len(self.shards)} shards are damaged, data.max_bad_shards "
                f"allows {most}: {self._reasons()}; put them back, or raise the limit"
            )

    def _reasons(self) -> str:
        more = f" and {len(self.bad) - 3} more" if len(self.bad) > 3 else ""
        return "; ".join(list(self.bad.values())[:3]) + more
