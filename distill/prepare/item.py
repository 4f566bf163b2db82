"""One captioned image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Item:
    """One image and its caption; `load()` gives (encoded bytes or a PIL image, caption)."""

    key: str
    load: Callable[[], tuple[Any, str]]


@dataclass(frozen=True)
class Captions:
    """An opened source. fingerprint: of its listing, so that a changed source is noticed.

    items: start -> the items from number `start` on. total: their number where it is known.
    """

    kind: str
    fingerprint: str
    items: Callable[[int], Iterator[Item]]
    total: int | None = None


def caption_of(row: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """The first of `columns` that the row has, stripped; of a list of captions the first. An error
    if there is none or it is empty.
    """
    for name in columns:
        value = row.get(name)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, str):
            if value.strip():
                return value.strip()
            break
    raise ValueError(f"no caption in any of {list(columns)}")


def listing_hash(entries: Iterable[tuple[str, int]]) -> str:
    text = "\n".join(f"{name}\t{size}" for name, size in entries)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sidecar_caption(files: Mapping[str, bytes], columns: tuple[str, ...]) -> str:
    """From a .txt, or from a .json where that is empty, missing or not what was asked for."""
    if "txt" in files and (len(columns) > 1 or "json" not in files):
        text = files["txt"].decode("utf-8")
        if text.strip() or "json" not in files:
            return caption_of({"txt": text}, ("txt",))
    if "json" in files:
        row = json.loads(files["json"])
        return caption_of(row if isinstance(row, dict) else {}, columns)
    raise ValueError("no caption: neither .txt nor .json is there")
