"""What the name of a file says: image, caption, archive, table, or nothing to look at."""

from __future__ import annotations

from posixpath import splitext

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TEXT_SUFFIXES = (".txt", ".json")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
# What macOS, Windows and network drives lay between the files of their users, in lower case.
SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}
SYSTEM |= {"system volume information", "lost+found"}

# Why an entry of a source is left out.
HIDDEN = "hidden or a system's"
SPECIAL = "no regular file (a link, a pipe)"
READ_ALREADY = "a folder that is read already (a link to it)"
OTHER = "neither an image nor an image's caption"
NO_CAPTION_BESIDE = "beside an image of this key, without a caption of its own"


def split(name: str) -> tuple[str, str]:
    """(path without the last suffix, that suffix in lower case with its dot)."""
    stem, suffix = splitext(name)
    return stem, suffix.lower()


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder it lies in, begins with a dot or belongs to a system."""
    parts = name.split("/")
    return any((p.startswith(".") and p not in (".", "..")) or p.lower() in SYSTEM for p in parts)


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES)
