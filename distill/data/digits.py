"""scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.batch import Batch, generator, sample_timesteps


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
