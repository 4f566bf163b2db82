"""WebDataset tar shards as an image-caption source (img2dataset writes LAION and COYO so)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from distill.prepare.item import IMAGE_SUFFIXES, Captions, Item, listing_hash, sidecar_caption


def open_tars(tars: list[Path], columns: tuple[str, ...], part: tuple[int, int]) -> Captions:
    """WebDataset shards: consecutive members of one stem are one sample (img2dataset's layout)."""
    fingerprint = listing_hash((p.name, p.stat().st_size) for p in tars)
    tars = tars[part[0] :: part[1]]

    def items(start: int) -> Iterator[Item]:
        return islice((item for tar in tars for item in _tar_items(tar, columns)), start, None)

    return Captions("webdataset", fingerprint, items)


def _tar_items(path: Path, columns: tuple[str, ...]) -> Iterator[Item]:
    """Items of one tar file; one that is cut off ends with an item that cannot be loaded."""
    group: dict[str, Callable[[], bytes]] = {}
    current = None
    try:
        for stem, suffix, read in _members(path):
            if stem != current:
                yield from _tar_item(path, current, group, columns)
                current, group = stem, {}
            group[suffix] = read
    except (tarfile.TarError, OSError, EOFError) as err:
        error: Exception | None = err
    else:
        error = None
    yield from _tar_item(path, current, group, columns)
    if error is not None:
        yield Item(path.name, lambda: _raise(error))


def _raise(error: Exception) -> Any:
    raise error


def _members(path: Path) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """(stem, suffix without its dot, reader) of every file in a tar.

    In a plain .tar the readers open it by themselves, so that nothing is read that is skipped; a
    compressed one is read from front to back.
    """
    plain = path.suffix == ".tar"
    with tarfile.open(path, "r:" if plain else "r|*") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            if not member.isfile() or base.startswith("."):
                continue
            stem, _, suffix = base.partition(".")
            if plain:
                where = (path, member.offset_data, member.size)
                read = lambda where=where: _read_at(*where)  # noqa: E731
            else:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                read = io.BytesIO(data).getvalue
            yield f"{folder}/{stem}" if folder else stem, suffix.lower(), read
        if plain:
            _check_end(path, tar.offset)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{path.name} is cut off")
    return data


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes garbage between members for the end; the end is zeros or the file's end."""
    with open(path, "rb") as file:
        file.seek(offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"{path.name} has no valid header at byte {offset}")


def _tar_item(
    path: Path, stem: str | None, group: Mapping[str, Callable[[], bytes]], columns: tuple[str, ...]
) -> Iterator[Item]:
    images = [s for s in group if f".{s}" in IMAGE_SUFFIXES]
    if stem is None or not images:
        return

    def load() -> tuple[bytes, str]:
        texts = {s: group[s]() for s in ("txt", "json") if s in group}
        return group[images[0]](), sidecar_caption(texts, columns)

    yield Item(f"{path.name}/{stem}", load)
