"""Image-caption sources in an order that never changes: folders, tables, tar shards, datasets.

Every reader gives numbered items; item n can be reached again without decoding those before it,
which is what makes `d2m prepare` resumable.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.prepare.item import (
    IMAGE_SUFFIXES,
    Captions,
    Item,
    caption_of,
    listing_hash,
    sidecar_caption,
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
PATH_COLUMNS = ("file_name", "img_path", "image_path", "filename", "path")
# What each data set calls its captions; the rest are tried after these.
CAPTION_COLUMNS = {
    "laion": ("TEXT", "caption"),
    "coyo": ("text", "caption"),
    "journeydb": ("prompt",),
}
ANY_CAPTION = ("caption", "text", "prompt", "TEXT", "txt")
LAYOUTS = ("auto", "folder", "webdataset", "laion", "coyo", "journeydb", "hf")


def open_captions(
    source: str,
    layout: str = "auto",
    *,
    caption_column: str | None = None,
    image_column: str | None = None,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Captions:
    """Open a folder, a table, tar shards or a Hugging Face dataset.

    Args:
        layout: "auto" looks at what is there; "laion", "coyo" and "journeydb" also say what the
            captions' column is called.
        caption_column, image_column: instead of the usual names.
        split, name, streaming: of a Hugging Face dataset.
        part: (i, n) for every n-th item (or tar file) from the i-th on.
    """
    columns = (caption_column,) if caption_column else ()
    columns = columns or (*CAPTION_COLUMNS.get(layout, ()), *ANY_CAPTION)
    path, local = Path(source).expanduser(), _exists(source)
    if layout == "hf" or (
        layout == "auto" and not local and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    ):
        from distill.prepare.captions_hf import open_hf

        return open_hf(source, columns, image_column, split, name, streaming, part)
    if not local:
        raise UserError(
            f"the source {source} does not exist; expected a folder, a .jsonl, .csv or .parquet "
            "table, .tar files, or a Hugging Face dataset (--layout hf)"
        )
    tars = _tars(source)
    if layout == "webdataset" or (tars and layout in ("auto", "laion", "coyo")):
        if not tars:
            raise UserError(f"{source} holds no .tar files, which --layout webdataset expects")
        from distill.prepare.captions_tar import open_tars

        return open_tars(tars, columns, part)
    table = _table(path, layout)
    if table is not None:
        return _open_table(table, columns, image_column, part)
    if layout == "journeydb":
        raise UserError(f"{source} holds no .jsonl file, which --layout journeydb expects")
    if layout in ("auto", "laion", "coyo") and _is_saved_dataset(path):
        from distill.prepare.captions_hf import open_hf

        return open_hf(source, columns, image_column, split, name, streaming, part)
    return _open_folder(path, columns, part)


# --- what is there --------------------------------------------------------------------------


def _expand(pattern: str) -> list[Path]:
    """Files of a path with WebDataset's braces ({00000..00099}) or a glob."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces:
        first, last = braces.groups()
        names = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        return [
            p
            for n in names
            for p in _expand(pattern[: braces.start()] + n + pattern[braces.end() :])
        ]
    path = Path(pattern).expanduser()
    if path.exists() or not re.search(r"[*?\[]", pattern):
        return [path]
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    return sorted(anchor.glob(str(path.relative_to(anchor) if path.is_absolute() else path)))


def _exists(source: str) -> bool:
    return any(path.exists() for path in _expand(source))


def _tars(source: str) -> list[Path]:
    paths = _expand(source)
    if len(paths) == 1 and paths[0].is_dir():
        paths = sorted(p for p in paths[0].rglob("*") if p.name.endswith(TAR_SUFFIXES))
    missing = [str(p) for p in paths if p.name.endswith(TAR_SUFFIXES) and not p.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of the tar files of {source} do not exist: {missing[:3]}")
    return [p for p in paths if p.name.endswith(TAR_SUFFIXES)]


def _table(path: Path, layout: str) -> Path | None:
    """The table that lists the images: the path itself, metadata.*, or JourneyDB's .jsonl."""
    if path.is_file():
        if path.suffix not in TABLE_SUFFIXES:
            raise UserError(
                f"{path} is a {path.suffix or 'nameless'} file; expected a folder, "
                f"a table ({', '.join(TABLE_SUFFIXES)}) or .tar files"
            )
        return path
    if layout != "journeydb":
        for suffix in TABLE_SUFFIXES:
            if (path / f"metadata{suffix}").is_file():
                return path / f"metadata{suffix}"
    if layout in ("auto", "journeydb"):
        for file in sorted(path.glob("*.jsonl")):
            row = next(_json_rows(file), None)
            if layout == "journeydb" or (isinstance(row, dict) and "img_path" in row):
                return file
    return None


def _is_saved_dataset(path: Path) -> bool:
    """A folder of `datasets.save_to_disk`, or one of parquet files and no images."""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return True
    return any(path.rglob("*.parquet")) and next(_images(path), None) is None


# --- folders --------------------------------------------------------------------------------


def _images(path: Path) -> Iterator[Path]:
    return (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _open_folder(path: Path, columns: tuple[str, ...], part: tuple[int, int]) -> Captions:
    """Images with a .txt or .json of the same stem beside them (img2dataset's "files" too)."""
    names = sorted(p.relative_to(path).as_posix() for p in _images(path))
    if not names:
        raise UserError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no .tar files")
    fingerprint = listing_hash((n, (path / n).stat().st_size) for n in names)
    names = names[part[0] :: part[1]]

    def load(file: Path) -> tuple[bytes, str]:
        return file.read_bytes(), _sidecar(file, columns)

    def items(start: int) -> Iterator[Item]:
        return (Item(n, lambda n=n: load(path / n)) for n in names[start:])

    return Captions("folder", fingerprint, items, len(names))


def _sidecar(image: Path, columns: tuple[str, ...]) -> str:
    files = {s: image.with_suffix(f".{s}") for s in ("txt", "json")}
    return sidecar_caption({s: f.read_bytes() for s, f in files.items() if f.is_file()}, columns)


# --- tables ---------------------------------------------------------------------------------


def _json_rows(file: Path) -> Iterator[Any]:
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as err:
                    yield err


def _rows(file: Path) -> Iterator[Any]:
    """Rows of a table as mappings; a line that cannot be read is given as its error."""
    if file.suffix == ".jsonl":
        yield from _json_rows(file)
    elif file.suffix == ".csv":
        with open(file, encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines)
    else:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(
                f"reading {file} needs pyarrow: pip install 'dense2moe[data]'"
            ) from None
        for batch in parquet.ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()


def _open_table(
    table: Path, columns: tuple[str, ...], image_column: str | None, part: tuple[int, int]
) -> Captions:
    """Rows of (path of an image, caption); paths are relative to the table's folder."""
    try:
        first = next(_rows(table), None)
    except UserError:
        raise
    except Exception as err:  # pyarrow has errors of its own
        raise UserError(f"cannot read {table}: {' '.join(str(err).split())}") from err
    names = (image_column,) if image_column else PATH_COLUMNS
    known = [n for n in names if isinstance(first, Mapping) and n in first]
    if not known:
        have = sorted(first) if isinstance(first, Mapping) else "no rows"
        if isinstance(first, Mapping) and {"url", "URL"} & set(first):
            raise UserError(
                f"{table} lists addresses, not images (columns {have}); fetch them first, e.g. "
                "with img2dataset --output_format webdataset, and give its folder as the source"
            )
        raise UserError(f"{table} has {have}; expected one of the columns {list(names)}")
    folder, column = table.parent, known[0]
    # JourneyDB keeps its pictures under imgs/ beside the annotations.
    roots = [folder, folder / "imgs", folder / "images"]

    def load(row: Any) -> tuple[bytes, str]:
        if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
            raise ValueError(f"a row without {column}: {row!r:.80}")
        caption = caption_of(row, columns)
        for root in roots:
            if (root / row[column]).is_file():
                return (root / row[column]).read_bytes(), caption
        raise FileNotFoundError(f"{row[column]} is not in {folder}")

    def items(start: int) -> Iterator[Item]:
        rows = islice(_rows(table), part[0] + start * part[1], None, part[1])
        for number, row in enumerate(rows, start):
            key = row.get(column) if isinstance(row, Mapping) else None
            yield Item(str(key or f"row {number}"), lambda row=row: load(row))

    return Captions("table", listing_hash([(table.name, table.stat().st_size)]), items)
