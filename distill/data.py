"""Training data as a pure function of (seed, step), so that any run can be resumed or repeated
exactly.

Shapes: B batch, S image tokens, C channels of a token, L text tokens, J text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

# Streams keep draws for different purposes apart: the same (seed, step) never reuses random
# numbers.
STREAMS = {"train": 0, "calibrate": 1, "sample": 2, "test": 3, "order": 4, "weights": 5}


def generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """CPU generator for one purpose and step (splitmix64: neighbouring seeds are unrelated)."""
    z = (seed * 0x9E3779B97F4A7C15 + STREAMS[stream] * 0xD1B54A32D192ED03 + step + 1) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return torch.Generator().manual_seed((z ^ (z >> 31)) >> 1)


@dataclass(frozen=True)
class Batch:
    """What one forward of a FLUX transformer needs, and the clean latents and noise of x_t.

    x0, noise [B, S, C]; t [B] in (0, 1), 1 = pure noise; text [B, L, J]; pooled [B, P]; labels [B];
    img_ids [S, 3]; txt_ids [L, 3]; guidance [B], the scale that a guidance-distilled model (FLUX.1
    [dev]) is told, or None. `batch[a:b]` holds those samples.
    """

    PER_SAMPLE: ClassVar[tuple[str, ...]] = (
        "x0",
        "noise",
        "t",
        "text",
        "pooled",
        "labels",
        "guidance",
    )

    x0: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor
    pooled: Tensor
    labels: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None = None

    @property
    def x_t(self) -> Tensor:
        """x_t = (1 - t) x0 + t noise (rectified flow)."""
        t = self.t[:, None, None]
        return (1 - t) * self.x0 + t * self.noise

    @property
    def velocity(self) -> Tensor:
        """The flow-matching target d x_t / dt = noise - x0."""
        return self.noise - self.x0

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of `FluxTransformer2DModel.forward`."""
        inputs = {
            "hidden_states": self.x_t,
            "timestep": self.t,
            "encoder_hidden_states": self.text,
            "pooled_projections": self.pooled,
            "img_ids": self.img_ids,
            "txt_ids": self.txt_ids,
        }
        if self.guidance is not None:
            inputs["guidance"] = self.guidance
        return inputs

    def to(self, device: torch.device | str) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if v is not None})

    def __getitem__(self, rows: slice) -> Batch:
        values = {name: getattr(self, name) for name in self.PER_SAMPLE}
        return replace(self, **{k: v[rows] for k, v in values.items() if v is not None})

    def __len__(self) -> int:
        return self.x0.shape[0]


TIMESTEPS = ("uniform", "logit-normal", "flux-shift", "grid")


def flux_shift(image_tokens: int) -> float:
    """mu of FLUX's resolution-dependent shift: 0.5 at 256 image tokens, 1.15 at 4096, linear."""
    return 0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256)


def sample_timesteps(
    n: int,
    gen: torch.Generator,
    kind: str = "uniform",
    *,
    image_tokens: int | None = None,
    grid: Sequence[float] | None = None,
) -> Tensor:
    """n timesteps in (0, 1].

    uniform:       U(0.001, 0.999)
    logit-normal:  sigmoid(z), z ~ N(0, 1)
    flux-shift:    sigmoid(z + mu(image_tokens)), which is FLUX's shift
                   e^mu / (e^mu + 1/t - 1) of a logit-normal t; larger images get more noise
    grid:          one of `grid`, all equally often: the few noise levels that a step-distilled
                   teacher has learned
    """
    if kind == "uniform":
        return (torch.rand(n, generator=gen) * 0.998 + 0.001).float()
    if kind == "logit-normal":
        return torch.sigmoid(torch.randn(n, generator=gen))
    if kind == "flux-shift":
        if image_tokens is None:
            raise ValueError("timestep sampling 'flux-shift' needs the number of image_tokens")
        return torch.sigmoid(torch.randn(n, generator=gen) + flux_shift(image_tokens))
    if kind == "grid":
        if not grid or not all(0 < t <= 1 for t in grid):
            raise ValueError(f"timestep grid is {grid}; expected numbers in (0, 1]")
        return torch.tensor(grid)[torch.randint(len(grid), (n,), generator=gen)]
    raise ValueError(f"timestep sampling is {kind!r}; expected one of {TIMESTEPS}")


def patchify(images: Tensor, patch: int = 2) -> Tensor:
    """[B, H, W] -> [B, (H/patch) (W/patch), patch^2], row-major as FLUX packs latents."""
    B, H, W = images.shape
    x = images.reshape(B, H // patch, patch, W // patch, patch)
    return x.permute(0, 1, 3, 2, 4).reshape(B, (H // patch) * (W // patch), patch * patch)


def unpatchify(tokens: Tensor, patch: int = 2) -> Tensor:
    """The inverse of `patchify` for square images."""
    B, S, _ = tokens.shape
    side = round(S**0.5)
    x = tokens.reshape(B, side, side, patch, patch).permute(0, 1, 3, 2, 4)
    return x.reshape(B, side * patch, side * patch)


class ClassPrompts:
    """What sources with a class label as prompt share: prompts, positions and pure noise.

    The "text encoder" is a fixed random table (tokens and a pooled vector a class): it never
    depends on the run's seed, so that a cached teacher understands every later run's prompts.
    """

    num_classes: int
    image_tokens: int
    channels: int
    text_tokens, text_dim, pooled_dim = 4, 32, 32

    def __init__(self, across: int):
        """across: image tokens on a side."""
        table = generator(0, "weights")
        self.text_table = torch.randn(
            self.num_classes, self.text_tokens, self.text_dim, generator=table
        )
        self.pooled_table = torch.randn(self.num_classes, self.pooled_dim, generator=table)
        rows, columns = torch.arange(across).repeat_interleave(across), torch.arange(across)
        self.img_ids = torch.stack(
            [torch.zeros(len(rows), dtype=torch.long), rows, columns.repeat(across)], 1
        ).float()
        self.txt_ids = torch.zeros(self.text_tokens, 3)

    def prompts(self, labels: Tensor) -> dict[str, Tensor]:
        """Text tokens and pooled vector of each class label."""
        return {"text": self.text_table[labels], "pooled": self.pooled_table[labels]}

    def noise_batch(self, seed: int, per_class: int) -> Batch:
        """Pure noise (t = 1) for `per_class` samples of every class."""
        labels = torch.arange(self.num_classes).repeat_interleave(per_class)
        noise = torch.randn(
            len(labels), self.image_tokens, self.channels, generator=generator(seed, "sample")
        )
        return Batch(
            x0=torch.zeros_like(noise),
            noise=noise,
            t=torch.ones(len(labels)),
            labels=labels,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            **self.prompts(labels),
        )


class Digits(ClassPrompts):
    """scikit-learn's 1797 handwritten digits (8x8) as 16 image tokens of 4 channels, with the class
    as prompt.
    """

    num_classes = 10
    image_tokens, channels = 16, 4
    side = 8

    def __init__(
        self,
        split: str = "train",
        timesteps: str = "uniform",
        timestep_grid: Sequence[float] | None = None,
    ):
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
        from sklearn.datasets import load_digits

        raw = load_digits()
        order = torch.randperm(len(raw.target), generator=generator(0, "order"))
        order = order[297:] if split == "train" else order[:297]
        images = torch.from_numpy(raw.images).float()[order]
        self.images = images  # grey levels 0..16, what the judge sees
        self.labels = torch.from_numpy(raw.target).long()[order]
        self.latents = patchify(images / 8 - 1)
        self.timesteps, self.timestep_grid = timesteps, timestep_grid
        self.split = split
        super().__init__(across=4)

    def __len__(self) -> int:
        return len(self.labels)

    def _indices(self, seed: int, step: int, size: int) -> Tensor:
        """Every sample once an epoch: position p is entry p mod n of epoch p // n's permutation."""
        n = len(self)
        pos = torch.arange(step * size, (step + 1) * size)
        perms = {
            int(e): torch.randperm(n, generator=generator(seed, "order", int(e)))
            for e in set((pos // n).tolist())
        }
        return torch.stack([perms[p // n][p % n] for p in pos.tolist()])

    def batch(
        self, seed: int, step: int, count: int, stream: str = "train", rows: slice | None = None
    ) -> Batch:
        """Batch number `step` of the run `seed`, `count` samples over all ranks; called twice, the
        same bit for bit.

        Args:
            rows: only these samples of it, a rank's share; exactly `batch(...)[rows]`.
        """
        idx = self._indices(seed, step, count)
        gen = generator(seed, stream, step)
        x0 = self.latents[idx]
        batch = Batch(
            x0=x0,
            noise=torch.randn(x0.shape, generator=gen),
            t=sample_timesteps(
                count,
                gen,
                self.timesteps,
                image_tokens=self.image_tokens,
                grid=self.timestep_grid,
            ),
            labels=self.labels[idx],
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            **self.prompts(self.labels[idx]),
        )
        return batch if rows is None else batch[rows]

    def to_images(self, tokens: Tensor) -> Tensor:
        """Latent tokens [B, 16, 4] -> grey images [B, 8, 8] in 0..1."""
        return (unpatchify(tokens).float().clamp(-1, 1) + 1) / 2
