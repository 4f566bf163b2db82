"""Folders of images with a .txt or .json of the same stem beside each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from distill.errors import UserError
from distill.prepare.item import Captions, Item, listing_hash, sidecar_caption
from distill.prepare.names import (
    HIDDEN,
    IMAGE_SUFFIXES,
    OTHER,
    READ_ALREADY,
    SPECIAL,
    TEXT_SUFFIXES,
    is_hidden,
    split,
)


def walk(root: Path) -> tuple[list[str], list[Item]]:
    """(names of the files below `root`, sorted; the entries that are left out).

    Links to folders are followed. No folder is read twice, which ends a loop of links; a hidden one
    is one entry and not entered.
    """
    names: list[str] = []
    out: list[Item] = []
    seen = set()
    errors: list[OSError] = []
    for at, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        where = Path(at).relative_to(root).as_posix()
        prefix = "" if where == "." else f"{where}/"
        status = os.stat(at)
        if (status.st_dev, status.st_ino) in seen:
            out.append(Item(where, left_out=READ_ALREADY))
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        out += [Item(prefix + n, left_out=HIDDEN) for n in folders + files if is_hidden(n)]
        folders[:] = sorted(n for n in folders if not is_hidden(n))
        for name in files:
            if not is_hidden(name):
                if os.path.isfile(os.path.join(at, name)):
                    names.append(prefix + name)
                else:
                    out.append(Item(prefix + name, left_out=SPECIAL))
    for err in errors:
        where = Path(err.filename).relative_to(root).as_posix()
        out.append(Item(where, left_out=f"a folder that cannot be read: {err.strerror}"))
    return sorted(names), sorted(out, key=lambda item: item.key)


def images_of(names: list[str]) -> list[str]:
    return [n for n in names if split(n)[1] in IMAGE_SUFFIXES]


def open_folder(
    path: Path, names: list[str], out: list[Item], columns: tuple[str, ...], part: tuple[int, int]
) -> Captions:
    """The images of a folder in the order of their names; then what is left out of it.

    Args:
        names, out: what `walk` found.
    """
    images = images_of(names)
    stems = {split(n)[0] for n in images}
    texts: dict[str, dict[str, str]] = {}
    out = list(out)
    for name in names:
        stem, suffix = split(name)
        if suffix in TEXT_SUFFIXES and stem in stems:
            texts.setdefault(stem, {})[suffix] = name
        elif suffix not in IMAGE_SUFFIXES:
            out.append(Item(name, left_out=OTHER))
    if not images:
        why = Counter(item.left_out for item in out)
        raise UserError(
            f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no .tar files"
            + "".join(f"; {count} entries: {reason}" for reason, count in why.most_common())
        )
    fingerprint = listing_hash((n, (path / n).stat().st_size) for n in images)

    def load(image: str) -> tuple[bytes, str]:
        beside = texts.get(split(image)[0], {})
        files = {suffix: (path / name).read_bytes() for suffix, name in beside.items()}
        return (path / image).read_bytes(), sidecar_caption(files, columns)

    # Images first: what else comes and goes in the folder does not change their numbers.
    images, out = images[part[0] :: part[1]], out[part[0] :: part[1]]

    def items(start: int) -> Iterator[Item]:
        yield from (Item(n, lambda n=n: load(n)) for n in images[start:])
        yield from out[max(start - len(images), 0) :]

    return Captions("folder", fingerprint, items, len(images) + len(out))
