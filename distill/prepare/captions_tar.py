"""WebDataset tar shards as an image-caption source (img2dataset writes LAION and COYO so)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from distill.prepare.item import Captions, Item, fails, listing_hash, sidecar_caption
from distill.prepare.names import (
    HIDDEN,
    IMAGE_SUFFIXES,
    NO_CAPTION_BESIDE,
    OTHER,
    SPECIAL,
    TEXT_SUFFIXES,
    is_hidden,
    split,
)

Reader = Callable[[], bytes]


def open_tars(
    tars: list[Path], out: list[Item], columns: tuple[str, ...], part: tuple[int, int]
) -> Captions:
    """WebDataset shards: consecutive members of one key are one sample (img2dataset's layout).

    Args:
        out: what lies beside them and is left out.
    """
    fingerprint = listing_hash((p.name, p.stat().st_size) for p in tars)
    tars, out = tars[part[0] :: part[1]], out[part[0] :: part[1]]

    def items(start: int) -> Iterator[Item]:
        found = (item for tar in tars for item in _tar_items(tar, columns))
        return islice(chain(found, out), start, None)

    return Captions("webdataset", fingerprint, items)


def _tar_items(path: Path, columns: tuple[str, ...]) -> Iterator[Item]:
    """Items of one tar file; one that is cut off ends with an item that cannot be loaded.

    The members of a key are a.png, a.txt and also a.seg.png. A name that comes again begins anew,
    and so does an image after one that has its caption.
    """
    group: dict[str, Reader] = {}
    parts: set[tuple[str, bool]] = set()  # stems of the group that have an image, or a caption
    key, error = "", None
    try:
        for name, member in _members(path):
            if isinstance(member, str):
                yield Item(f"{path.name}/{name}", left_out=member)
                continue
            stem, suffix = split(name)
            image = suffix in IMAGE_SUFFIXES
            whole = image and {(stem, True), (stem, False)} <= parts
            if whole or name in group or not f"{stem}.".startswith(f"{key}."):
                yield from _samples(path, key, group, columns)
                group, parts, key = {}, set(), stem
            group[name] = member
            if image or suffix in TEXT_SUFFIXES:
                parts.add((stem, image))
    except Exception as err:  # tarfile and the decompressors raise many kinds
        error = err
    yield from _samples(path, key, group, columns)
    if error is not None:
        yield Item(path.name, fails(error))


def _samples(
    path: Path, key: str, group: dict[str, Reader], columns: tuple[str, ...]
) -> Iterator[Item]:
    """One item for every image of a group that has a caption of its own or the group's key."""
    texts: dict[str, dict[str, Reader]] = {}
    for name, read in group.items():
        stem, suffix = split(name)
        if suffix in TEXT_SUFFIXES:
            texts.setdefault(stem, {})[suffix] = read
    images = [name for name in group if split(name)[1] in IMAGE_SUFFIXES]
    stems = [split(name)[0] for name in images]

    def load(image: str, stem: str) -> tuple[bytes, str]:
        beside = {suffix: read() for suffix, read in texts.get(stem, {}).items()}
        return group[image](), sidecar_caption(beside, columns)

    for image, stem in zip(images, stems, strict=True):
        if stem in texts or stem == key:
            shown = stem if stems.count(stem) == 1 else image
            yield Item(f"{path.name}/{shown}", lambda image=image, stem=stem: load(image, stem))
        else:
            yield Item(f"{path.name}/{image}", left_out=NO_CAPTION_BESIDE)
    if not images:
        yield from (Item(f"{path.name}/{name}", left_out=OTHER) for name in group)


class _Header(tarfile.TarInfo):
    """tarfile takes garbage between members for the end; the end is zeros or the file's end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as err:
            if buf.strip(b"\0"):
                raise tarfile.ReadError(f"no file begins where one should: {err}") from None
            raise


def _members(path: Path) -> Iterator[tuple[str, Reader | str]]:
    """(name, its reader or why it is left out) of every file in a tar.

    In a plain tar the readers open it by themselves, so that nothing is read that is skipped; a
    compressed one, whatever it is called, is read from front to back.
    """
    plain = True
    try:
        tar = tarfile.open(path, "r:", tarinfo=_Header)
    except tarfile.ReadError:
        plain = False
        tar = tarfile.open(path, "r|*", tarinfo=_Header)
    with tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isdir():
                continue
            if is_hidden(name):
                yield name, HIDDEN
            elif not member.isfile():
                yield name, SPECIAL
            elif plain:
                where = (path, member.offset_data, member.size)
                yield name, lambda where=where: _read_at(*where)
            else:
                wanted = split(name)[1] in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES)
                data = tar.extractfile(member).read() if wanted else b""  # type: ignore[union-attr]
                yield name, io.BytesIO(data).getvalue


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{path.name} is cut off")
    return data
