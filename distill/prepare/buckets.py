"""Aspect-ratio buckets: a few resolutions of about the same area; every image goes to the nearest.

Shapes: H, W pixels of a bucket.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distill.errors import UserError

GRID = 16  # pixels a token of FLUX is wide: the VAE's factor of 8 times the packing's 2


def resolutions(size: int, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) of every bucket, from tall to wide.

    Sides are multiples of size / 16 rounded to 16 pixels (64 at 1024, as SDXL's buckets): for each
    width the height whose area is nearest to size^2, as long as neither side is more than
    `max_aspect` times the other.
    """
    if size < GRID or size % GRID:
        raise UserError(f"--size is {size}; expected a multiple of {GRID} pixels")
    if max_aspect < 1:
        raise UserError(f"--max-aspect is {max_aspect}; expected at least 1")
    step = max(GRID, round(size / GRID / GRID) * GRID)
    area, found = size * size, {(size, size)}
    for width in range(step, 4 * size, step):
        height = max(round(area / width / step), 1) * step
        if max(height, width) <= max_aspect * min(height, width):
            found |= {(height, width), (width, height)}
    return sorted(found, key=lambda hw: (hw[1] / hw[0], hw))


def nearest(height: int, width: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest in log(width / height); ties go to the first."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda hw: abs(math.log(hw[1] / hw[0]) - aspect))


def to_rgb(image: Any) -> Any:
    """A PIL image upright (EXIF) and in RGB; transparency on white, 16-bit grey scaled to 8."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Any, bucket: tuple[int, int]) -> np.ndarray:
    """A PIL image resized (Lanczos) until it just covers the bucket, then cropped at the centre.

    Returns uint8 [3, H, W].
    """
    from PIL import Image

    height, width = bucket
    scale = max(height / image.height, width / image.width)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def enlargement(height: int, width: int, bucket: tuple[int, int]) -> float:
    """How much larger than itself an image becomes in its bucket; below 1 it shrinks."""
    return max(bucket[0] / height, bucket[1] / width)
