"""scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.batch import Batch, generator, image_ids, sample_timesteps


class ClassPrompts:
    """What built-in sources share: a class as prompt, positions, timesteps and pure noise.

    The "text encoder" is a fixed random table (tokens and a pooled vector a class): it never
    depends on the run's seed, so that a cached teacher understands every later run's prompts.

    Args:
        split: "train" or "test". timesteps, timestep_grid: see `sample_timesteps`.
    """

    splits: tuple[str, ...] = ("train", "test")
    num_classes: int
    side: int
    patch: int
    image_tokens: int
    channels: int
    text_tokens, text_dim, pooled_dim = 4, 32, 32

    def __init__(
        self,
        split: str = "train",
        timesteps: str = "uniform",
        timestep_grid: Sequence[float] | None = None,
    ):
        if split not in ("train", "test"):
            raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
        self._positions(split, timesteps, timestep_grid)
        table, size = generator(0, "weights"), (self.num_classes, self.text_tokens, self.text_dim)
        self.text_table = torch.randn(size, generator=table)
        self.pooled_table = torch.randn(self.num_classes, self.pooled_dim, generator=table)

    def _positions(self, split: str, timesteps: str, grid: Sequence[float] | None) -> None:
        self.split, self.timesteps, self.timestep_grid = split, timesteps, grid
        across = self.side // self.patch
        self.img_ids = image_ids(across, across)
        self.txt_ids = torch.zeros(self.text_tokens, 3)

    def times(self, count: int, gen: torch.Generator) -> Tensor:
        """Timesteps [count] as configured."""
        grid, tokens = self.timestep_grid, self.image_tokens
        return sample_timesteps(count, gen, self.timesteps, image_tokens=tokens, grid=grid)

    def epochs(self, seed: int, step: int, size: int) -> Tensor:
        """Which of `len(self)` samples are in a batch: every one once an epoch, position p is entry
        p mod n of epoch p // n's permutation."""
        n = len(self)  # of sources that have a length
        pos = torch.arange(step * size, (step + 1) * size)
        perms = {
            int(e): torch.randperm(n, generator=generator(seed, "order", int(e)))
            for e in set((pos // n).tolist())
        }
        return torch.stack([perms[p // n][p % n] for p in pos.tolist()])

    def prompts(self, labels: Tensor) -> dict[str, Tensor]:
        """Text tokens and pooled vector of each class label."""
        return {"text": self.text_table[labels], "pooled": self.pooled_table[labels]}

    def gather(self, labels: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Batch:
        """The batch of samples with these labels."""
        more = {"img_ids": self.img_ids, "txt_ids": self.txt_ids, **self.prompts(labels)}
        return Batch(x0=x0, noise=noise, t=t, labels=labels, **more)

    def noise_batch(self, seed: int, per_class: int) -> Batch:
        """Pure noise (t = 1) for `per_class` samples of every class."""
        return self.noise_for(torch.arange(self.num_classes).repeat_interleave(per_class), seed)

    def noise_for(self, labels: Tensor, seed: int) -> Batch:
        """Pure noise (t = 1) for a sample of each label."""
        gen, size = generator(seed, "sample"), (len(labels), self.image_tokens, self.channels)
        noise = torch.randn(size, generator=gen)
        return self.gather(labels, torch.zeros_like(noise), noise, torch.ones(len(labels)))

    def to_images(self, tokens: Tensor) -> Tensor:
        """Latent tokens [B, S, C] -> images in 0..1, grey [B, H, W] or RGB [B, H, W, 3]."""
        return (unpatchify(tokens, self.patch).float().clamp(-1, 1) + 1) / 2


class Digits(ClassPrompts):
    """scikit-learn's 1797 handwritten digits (8x8) as 16 image tokens of 4 channels, with the class
    as prompt.
    """

    num_classes = 10
    side, patch = 8, 2
    image_tokens, channels = 16, 4

    def __init__(
        self,
        split: str = "train",
        timesteps: str = "uniform",
        timestep_grid: Sequence[float] | None = None,
    ):
        super().__init__(split, timesteps, timestep_grid)
        from sklearn.datasets import load_digits

        raw = load_digits()
        order = torch.randperm(len(raw.target), generator=generator(0, "order"))
        order = order[297:] if split == "train" else order[:297]
        self.images = torch.from_numpy(raw.images).float()[order]  # grey levels 0..16
        self.labels = torch.from_numpy(raw.target).long()[order]
        self.latents = patchify(self.images / 8 - 1, self.patch)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, seed: int, step: int, count: int, stream: str = "train", rows: slice | None = None
    ) -> Batch:
        """Batch number `step` of the run `seed`, `count` samples over all ranks; called twice, the
        same bit for bit.

        Args:
            rows: only these samples of it, a rank's share; exactly `batch(...)[rows]`.
        """
        idx = self.epochs(seed, step, count)
        gen, x0 = generator(seed, stream, step), self.latents[idx]
        noise = torch.randn(x0.shape, generator=gen)
        batch = self.gather(self.labels[idx], x0, noise, self.times(count, gen))
        return batch if rows is None else batch[rows]


def patchify(images: Tensor, patch: int = 2) -> Tensor:
    """[B, H, W] or [B, H, W, C] -> [B, (H/patch) (W/patch), patch^2 C], row-major as FLUX packs."""
    B, H, W, C = (*images.shape, 1)[:4]
    x = images.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(tokens: Tensor, patch: int = 2) -> Tensor:
    """The inverse of `patchify` for square images; of one channel they are [B, H, W]."""
    B, S, width = tokens.shape
    side, C = round(S**0.5), width // patch**2
    x = tokens.reshape(B, side, side, patch, patch, C).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, side * patch, side * patch, C)
    return x[..., 0] if C == 1 else x
