"""scikit-image's photographs as a data source: 32x32 crops, the picture's name as prompt.

Only pictures that come inside scikit-image's wheel are used, so nothing is downloaded. A crop of a
photograph is a token sequence whose tokens differ far more than those of a digit: sky, fur, brick,
print; and a picture's name tells more than a class.

Shapes: B batch, S image tokens, C channels of a token, L text tokens, J text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import torch
from torch import Tensor

from distill.data.batch import Batch, generator
from distill.data.digits import ClassPrompts, patchify
from distill.errors import UserError

# prompt -> file in skimage/data; retina and ihc are medical pictures, hubble is the deep field
PICTURES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
TEST_SHARE = 0.25  # of every picture's columns, at its right edge


def read_picture(file: str) -> Tensor:
    """One bundled picture at half its resolution: [H, W, 3] in -1..1."""
    import numpy as np
    from PIL import Image

    path = resources.files("skimage") / "data" / file
    if not path.is_file():
        raise UserError(
            f"scikit-image has no data/{file}; install scikit-image>=0.22 from its wheel"
        )
    with path.open("rb") as handle, Image.open(handle) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).float()
    H, W = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    # a 32x32 crop of the full resolution would often show one colour only
    half = pixels[:H, :W].reshape(H // 2, 2, W // 2, 2, 3).mean((1, 3))
    return half / 127.5 - 1


class Photos(ClassPrompts):
    """Crops of 16 photographs as 64 image tokens of 48 channels (4x4 pixels, RGB).

    Test crops come from the right quarter of every picture, training crops from the rest; they
    share no pixel.
    """

    names = tuple(PICTURES)
    num_classes = len(PICTURES)
    side, patch = 32, 4
    image_tokens, channels = (side // patch) ** 2, 3 * patch**2

    def __init__(
        self,
        split: str = "train",
        timesteps: str = "uniform",
        timestep_grid: Sequence[float] | None = None,
    ):
        super().__init__(split, timesteps, timestep_grid)
        self.pictures = []
        for file in PICTURES.values():
            picture = read_picture(file)
            edge = round(picture.shape[1] * (1 - TEST_SHARE))
            self.pictures.append(picture[:, :edge] if split == "train" else picture[:, edge:])

    def batch(
        self, seed: int, step: int, count: int, stream: str = "train", rows: slice | None = None
    ) -> Batch:
        """Batch number `step` of the run `seed`, or only `rows` of it; a function of its arguments.

        Every run of 16 consecutive rows holds each picture once; where a crop lies is random.
        """
        gen = generator(seed, stream, step)
        rounds = -(-count // self.num_classes)
        labels = torch.cat(
            [torch.randperm(self.num_classes, generator=gen) for _ in range(rounds)]
        )[:count]
        place = torch.rand(count, 2, generator=gen, dtype=torch.float64)
        t = self.times(count, gen)
        noise = torch.randn(count, self.image_tokens, self.channels, generator=gen)
        part = rows if rows is not None else slice(None)
        labels, place = labels[part], place[part]
        crops = [self._crop(int(n), y, x) for n, (y, x) in zip(labels, place.tolist(), strict=True)]
        x0 = patchify(torch.stack(crops), self.patch) if crops else noise[:0]
        return self.gather(labels, x0, noise[part], t[part])

    def _crop(self, label: int, y: float, x: float) -> Tensor:
        """The crop of a picture at the given shares of the room it has."""
        picture, side = self.pictures[label], self.side
        top = int(y * (picture.shape[0] - side + 1))
        left = int(x * (picture.shape[1] - side + 1))
        return picture[top : top + side, left : left + side]
