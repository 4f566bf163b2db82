"""One captioned image, and the sources that give them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """One entry of a source: `load()` gives (encoded bytes or a PIL image, caption), or whatever
    is wrong with the entry is raised by it; left_out: why it is no sample and is not loaded.
    """

    key: str
    load: Callable[[], tuple[Any, str]] | None = None
    left_out: str | None = None


@dataclass(frozen=True)
class Captions:
    """An opened source. fingerprint: of its listing, so that a changed source is noticed.

    items: start -> the items from number `start` on. total: their number where it is known.
    """

    kind: str
    fingerprint: str
    items: Callable[[int], Iterator[Item]]
    total: int | None = None


def fails(error: Exception) -> Callable[[], Any]:
    """A `load` for an entry that could not even be listed."""

    def load() -> Any:
        raise error

    return load


def caption_of(row: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """The first of `columns` that the row has, stripped; of a list of captions the first.

    An error if there is none, if it is empty, or if it is no text: shards hold UTF-8.
    """
    for name in columns:
        value = row.get(name)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, str):
            if value.strip():
                return _checked(value.strip())
            break
    raise ValueError(f"no caption in any of {list(columns)}")


def _checked(caption: str) -> str:
    try:
        caption.encode()
    except UnicodeEncodeError as err:
        raise ValueError(
            f"the caption is no valid Unicode: {caption[err.start]!a} at character {err.start} is "
            "a byte that is not UTF-8, or half a surrogate pair"
        ) from None
    return caption


def printable(text: str, most: int = 1000) -> str:
    """What can be written as UTF-8: undecodable bytes of file names become \\udcXX."""
    return text[:most].encode("utf-8", "backslashreplace").decode()


def listing_hash(entries: Iterable[tuple[str, int]]) -> str:
    text = "\n".join(f"{name}\t{size}" for name, size in entries)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sidecar_caption(files: Mapping[str, bytes], columns: tuple[str, ...]) -> str:
    """From a .txt, or from a .json where that is empty, missing or not what was asked for."""
    if ".txt" in files and (len(columns) > 1 or ".json" not in files):
        text = files[".txt"].decode("utf-8-sig")
        if text.strip() or ".json" not in files:
            return caption_of({"txt": text}, ("txt",))
    if ".json" in files:
        row = json.loads(files[".json"])
        return caption_of(row if isinstance(row, dict) else {}, columns)
    raise ValueError("no caption: neither a .txt nor a .json of its name lies beside it")
