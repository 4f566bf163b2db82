"""Hypothesis strategies: folders, tars and tables of captioned images as the world has them.

A source is a list of pieces that do not touch each other. Every piece knows how many entries it is
and which captions must be kept; what only decoding can tell (a damaged picture) it leaves open.
"""

import csv
import io
import json
import tarfile
from dataclasses import dataclass, field

from helpers.sources import tar_bytes
from hypothesis import strategies as st
from PIL import Image

FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("RGB", "F", "I", "CMYK", "LAB", "YCbCr", "PA", "LA", "I;16B"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
    "BMP": ("RGB", "1"),
}
SUFFIXES = (".png", ".JPG", ".jpeg", ".webp", ".Tiff", ".gif")  # need not be the format's own
TAILS = st.text(st.sampled_from(".-_ ,\"'éA𝄞\n\\%{"), max_size=6)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NESTED = tar_bytes([("a.png", b"x"), ("a.txt", b"a")], "w:bz2")


@dataclass
class Piece:
    """files: (name, bytes) in order. entries: how many they are. keep: captions to be kept."""

    files: list = field(default_factory=list)
    entries: int = 1
    keep: list = field(default_factory=list)


def _encode(kind, mode, height, width):
    data = io.BytesIO()
    Image.new(mode, (width, height)).save(data, kind)
    return data.getvalue()


@st.composite
def pictures(draw):
    """(bytes, whether it must be kept; None: who knows)"""
    kind = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[kind]))
    sides = st.sampled_from([64, 65, 100]) | st.integers(1, 300)
    height, width = draw(sides), draw(sides)
    data = _encode(kind, mode, height, width)
    good = mode != "I" and min(height, width) >= 64 and max(height, width) <= 128
    damage = draw(st.sampled_from([None, None, None, "cut", "flip", "none"]))
    if damage == "cut":
        return data[: draw(st.integers(0, len(data) - 1))], None
    if damage == "flip":
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :], None
    if damage == "none":
        return draw(st.binary(max_size=50)), None
    return data, good or None


@st.composite
def captions(draw):
    """({suffix: bytes}, the caption or None)"""
    text = draw(WORDS)
    kind = draw(st.sampled_from(["txt", "txt", "bom", "json", "surrogate", "latin", "utf16", "no"]))
    if kind == "txt":
        files = {".txt": text.encode()}
        return files, text.encode().decode("utf-8-sig").strip() or None
    if kind == "bom":
        return {".TXT": b"\xef\xbb\xbf" + text.encode()}, text.strip() or None
    if kind == "json":
        return {".json": json.dumps({"caption": text}).encode()}, text.strip() or None
    bad = {
        "surrogate": {".json": json.dumps({"caption": text + "\ud83d"}).encode()},
        "latin": {".txt": b"caf\xe9 cat"},
        "utf16": {".txt": "a cat".encode("utf-16")},
        "no": {},
    }
    return bad[kind], None


@st.composite
def samples(draw, key):
    """One image of the key `key`, and its caption."""
    data, good = draw(pictures())
    files, words = draw(captions())
    name = key + draw(st.sampled_from(SUFFIXES))
    piece = Piece([(name, data), *((key + suffix, text) for suffix, text in files.items())])
    if good and words is not None:
        piece.keep = [words]
    return piece


@st.composite
def strays(draw, key):
    """What lies about beside the images; key: begins no name of another piece."""
    name, data = draw(
        st.sampled_from(
            [
                (f"{key}.txt", b"a caption without an image"),
                (f"{key}.tar.bz2", NESTED),
                (f"{key}.zip", b"PK"),
                (f"{key}", b""),
                (f"._{key}.png", b"x"),
                (f".{key}", b"x"),
                (f"{key}.heic", b"x"),
            ]
        )
    )
    return Piece([(name, data)])


@st.composite
def pieces(draw, more=()):
    """Up to six of any kind. more: strategies of (key) for one kind of source alone."""
    found = []
    for i in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([samples, samples, strays, *more]))
        folder = draw(st.sampled_from(["", "", "sub dir/", "a/b.c/"]))
        piece = draw(kind(f"{i:03d}{draw(TAILS)}"))
        piece.files = [(folder + name, data) for name, data in piece.files]
        found.append(piece)
    return found


# --- tars only ------------------------------------------------------------------------------


@st.composite
def twice(draw, key):
    """The same key again, adjacent."""
    one, two = draw(samples(key)), draw(samples(key))
    two.files[0] = (one.files[0][0], two.files[0][1])
    return Piece([*one.files, *two.files], 2, one.keep + two.keep)


@st.composite
def several(draw, key):
    """Several images under one key, with one caption."""
    images = [(f"{key}{suffix}", draw(pictures())[0]) for suffix in (".png", ".jpg")]
    return Piece([*images, (f"{key}.txt", b"both")], 2)


@st.composite
def linked(draw, key):
    info = tarfile.TarInfo(f"{key}.png")
    info.type, info.linkname = draw(st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE])), "x"
    return Piece([(f"{key}.png", info)])


def directory(key):
    info = tarfile.TarInfo(f"{key}.png")
    info.type = tarfile.DIRTYPE
    return st.just(Piece([(f"{key}.png", info)], 0))


TAR_ONLY = (twice, several, linked, directory)


# --- tables ---------------------------------------------------------------------------------

LINES = (b'{"file_name": "a', b'"0.png" x,a', b"\xff\xfe\x00", b"[1]", b"[" * 9999)


@st.composite
def rows(draw):
    """({name: bytes} of the images, rows: mappings or broken lines, captions that must be kept)"""
    files, found, keep = {}, [], []
    for i in range(draw(st.integers(1, 8))):
        data, good = draw(pictures())
        name, words = f"{i}{draw(TAILS)}.png", draw(WORDS)
        row = {"file_name": name, "text": words}
        kind = draw(st.sampled_from(["good", "good", "gone", "surrogate", "line", "huge", "short"]))
        if kind != "gone":
            files[name] = data
        if kind == "good" and good and words.strip():
            keep.append(words.strip())
        elif kind == "surrogate":
            row["text"] += "\udce9 cat"
        elif kind == "line":
            row = draw(st.sampled_from(LINES))
        elif kind == "huge":
            row["text"] = "x" * 200_000
        elif kind == "short":
            row["text"] = " "
        found.append(row)
    return files, found, keep


def jsonl(found):
    return b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in found)


def table_csv(found):
    lines = [b"file_name,text\n"]
    for row in found:
        text = io.StringIO(newline="")
        if not isinstance(row, bytes):
            csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(row.values())
            row = text.getvalue().encode("utf-8", "surrogateescape")
        lines.append(row.removesuffix(b"\n") + b"\n")
    return b"".join(lines)
