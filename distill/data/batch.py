"""Training data as a pure function of (seed, step), so that any run can be resumed or repeated
exactly.

Shapes: B batch, S image tokens, C channels of a token, L text tokens, J text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.families.family import Family
from distill.families.flux import Flux

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
    """What one forward of a transformer needs, and the clean latents and noise of x_t.

    x0, noise [B, S, C]; t [B] in (0, 1), 1 = pure noise; text [B, L, J]; pooled [B, P]; labels [B];
    img_ids [S, 3]; txt_ids [L, 3]; guidance [B], the scale that a guidance-distilled model (FLUX.1
    [dev]) is told, or None; grid: (frames, rows, columns) of the tokens, which all families but
    FLUX.1 need; family: what makes a model's arguments of these. `batch[a:b]` holds those samples.
    """

    PER_SAMPLE: ClassVar = ("x0", "noise", "t", "text", "pooled", "labels", "guidance")

    x0: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor
    pooled: Tensor
    labels: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None = None
    grid: tuple[int, int, int] | None = None
    family: Family = Flux()

    @property
    def x_t(self) -> Tensor:
        """The noisy latents [B, S, C]."""
        return self.family.noised(self)

    @property
    def velocity(self) -> Tensor:
        """What the model is to predict; for rectified flow d x_t / dt = noise - x0."""
        return self.family.target(self)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the transformer's forward."""
        return self.family.inputs(self)

    def to(self, device: torch.device | str) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items()})

    def __getitem__(self, rows: slice) -> Batch:
        values = {name: getattr(self, name) for name in self.PER_SAMPLE}
        return replace(self, **{k: v[rows] for k, v in values.items() if v is not None})

    def __len__(self) -> int:
        return self.x0.shape[0]


def image_ids(rows: int, columns: int) -> Tensor:
    """img_ids [S, 3] = (0, row, column) of every token, as FLUX's rotary embedding takes them."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    return ids.reshape(rows * columns, 3)


def held_out_batch(
    source: Any, count: int, seed: int, grid: Sequence[float] | None = None
) -> Batch:
    """`count` triples (x_t, t, c) from test data, t spread evenly over (0, 1) or over the entries
    of `grid`."""
    batch = source.batch(seed, 0, count, "test")
    if grid is None:
        t = (torch.arange(count) + 0.5) / count
    else:
        t = torch.tensor(grid)[torch.arange(count) % len(grid)]
    return replace(batch, t=t[torch.randperm(count, generator=generator(seed, "test", 1))])


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
