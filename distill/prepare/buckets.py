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


def fit(image: Any, bucket: tuple[int, int]) -> np.ndarray:
    """The middle of an RGB PIL image, of the bucket's aspect ratio, resized to it (Lanczos).

    Returns uint8 [3, H, W].
    """
    from PIL import Image

    height, width = bucket
    scale = enlargement(image.height, image.width, bucket)
    left = max((image.width - width / scale) / 2, 0)
    top = max((image.height - height / scale) / 2, 0)
    box = (left, top, image.width - left, image.height - top)
    image = image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def enlargement(height: int, width: int, bucket: tuple[int, int]) -> float:
    """How much larger than itself an image becomes in its bucket; below 1 it shrinks."""
    return max(bucket[0] / height, bucket[1] / width)
