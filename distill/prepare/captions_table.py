"""Tables of (path of an image, caption): .jsonl, .csv and .parquet. A row is one item."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.prepare.item import Captions, Item, caption_of, listing_hash

PATH_COLUMNS = ("file_name", "img_path", "image_path", "filename", "path")
LOOK = 1000  # rows that are searched for the images' column


def _lines(file: Path) -> Iterator[str]:
    """A byte that is not UTF-8 becomes a lone surrogate: it spoils the field it is in, no more."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        yield from lines


def json_rows(file: Path) -> Iterator[Any]:
    """What every line of a .jsonl holds; of one that cannot be read, its error."""
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except Exception as err:  # also RecursionError, and an integer of too many digits
                yield ValueError(f"line {number} is no JSON: {getattr(err, 'msg', err)}")


def _csv_rows(file: Path) -> Iterator[Any]:
    reader = csv.DictReader(_lines(file), strict=True)
    names, lines = reader.fieldnames, reader.reader  # only the latter counts lines of broken rows
    while True:
        first = lines.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as err:
            yield ValueError(f"lines {first} to {lines.line_num}: {err}")
            continue
        if any(row.pop(None, ())):
            row = ValueError(f"line {lines.line_num} has more than the header's {names}")
        yield row


def _parquet_rows(file: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"reading {file} needs pyarrow: pip install 'dense2moe[data]'") from None
    table = parquet.ParquetFile(file)
    for group in range(table.num_row_groups):
        left = table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(1024, row_groups=[group]):
                for row in _batch_rows(batch):
                    yield row
                    left -= 1
        except Exception as err:  # pyarrow has errors of its own
            yield from repeat(ValueError(f"row group {group}: {err}"), left)


def _batch_rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as err:
        if batch.num_rows == 1:
            return [err]
        return [r for i in range(batch.num_rows) for r in _batch_rows(batch.slice(i, 1))]


ROWS = {".jsonl": json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def open_table(
    table: Path, columns: tuple[str, ...], image_column: str | None, part: tuple[int, int]
) -> Captions:
    """Rows of (path of an image, caption); paths are relative to the table's folder."""
    read = ROWS[table.suffix.lower()]
    try:
        first = list(islice(read(table), LOOK))
    except UserError:
        raise
    except Exception as err:  # pyarrow has errors of its own
        raise UserError(f"cannot read {table}: {' '.join(str(err).split())}") from err
    column = _image_column(table, first, image_column)
    folder = table.parent
    # JourneyDB keeps its pictures under imgs/ beside the annotations.
    roots = [folder, folder / "imgs", folder / "images"]

    def load(row: Any) -> tuple[bytes, str]:
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
            raise ValueError(f"a row without {column}: {row!r:.80}")
        caption = caption_of(row, columns)
        for root in roots:
            if (root / row[column]).is_file():
                return (root / row[column]).read_bytes(), caption
        raise FileNotFoundError(f"{row[column]} is not in {folder}")

    def items(start: int) -> Iterator[Item]:
        rows = islice(read(table), part[0] + start * part[1], None, part[1])
        for number, row in enumerate(rows, start):
            key = row.get(column) if isinstance(row, Mapping) else None
            yield Item(str(key or f"row {number}"), lambda row=row: load(row))

    return Captions("table", listing_hash([(table.name, table.stat().st_size)]), items)


def _image_column(table: Path, rows: list[Any], asked: str | None) -> str:
    names = (asked,) if asked else PATH_COLUMNS
    have = {name for row in rows if isinstance(row, Mapping) for name in row}
    for name in names:
        if name in have:
            return name
    if {"url", "URL"} & have:
        raise UserError(
            f"{table} lists addresses, not images (columns {sorted(have)}); fetch them first, e.g. "
            "with img2dataset --output_format webdataset, and give its folder as the source"
        )
    found = f"the columns {sorted(have)}" if have else "no rows"
    if rows and not have:
        found = f"no row that can be read; the first: {rows[0]!s:.200}"
    raise UserError(f"{table} has {found}; expected one of the columns {list(names)}")
