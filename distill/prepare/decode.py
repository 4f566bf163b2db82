"""Decoding for `d2m prepare`: items of a source to cropped pixels, in threads, in order."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from distill.errors import UserError
from distill.prepare.buckets import enlargement, fit, nearest
from distill.prepare.colour import to_srgb
from distill.prepare.item import Captions, Item, printable

T, R = TypeVar("T"), TypeVar("R")
SMALL = "smaller than --size (--max-upscale allows smaller ones)"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # decoders that run no programs


@dataclass(frozen=True)
class Decoded:
    """One item after decoding: pixels uint8 [3, H, W], or why there are none.

    error: what is wrong with it. left_out: why it is none to be kept. warning: what is odd in it.
    """

    number: int
    key: str
    caption: str = ""
    bucket: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None
    error: str | None = None
    left_out: str | None = None
    warning: str | None = None


def decode(item: Item, number: int, buckets: list[tuple[int, int]], max_upscale: float) -> Decoded:
    """Read, decode, resize and crop one item; whatever goes wrong is its `error`."""
    from PIL import Image

    key = printable(item.key)
    if item.load is None:
        return Decoded(number, key, left_out=item.left_out)
    try:
        data, caption = item.load()
        image = (
            data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
        )
        image, warning = to_srgb(image)
        bucket = nearest(image.height, image.width, buckets)
        size = (image.height, image.width)
        if enlargement(*size, bucket) > max_upscale:
            return Decoded(number, key, left_out=SMALL)
        return Decoded(number, key, caption, bucket, size, fit(image, bucket), warning=warning)
    except Exception as err:  # decoders raise many kinds, among them SyntaxError and struct.error
        # without addresses: the same damage is to read the same in every run
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(err).__name__}: {err}")
        return Decoded(number, key, error=printable(" ".join(text.split()), 300))


def numbered(captions: Captions, start: int) -> Iterator[tuple[int, Item]]:
    """The source's items from number `start` on; what goes wrong between them is a user's error."""
    number = start
    try:
        for number, item in enumerate(captions.items(start), start):
            yield number, item
    except UserError:
        raise
    except Exception as err:  # readers and the hub client raise many kinds
        raise UserError(
            f"the source cannot be read on after item {number} ({type(err).__name__}: "
            f"{' '.join(str(err).split())}); finished shards are kept, the same command goes on"
        ) from err


def in_order(
    work: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = 4
) -> Iterator[R]:
    """`map(work, items)` in threads, results in the items' order, few of them waiting."""
    if workers < 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers * ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
