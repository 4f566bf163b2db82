"""Image-caption sources in an order that never changes: folders, tables, tar shards, datasets.

Every reader gives numbered items; item n can be reached again without decoding those before it,
which is what makes `d2m prepare` resumable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from distill.errors import UserError
from distill.prepare.captions_folder import images_of, open_folder, walk
from distill.prepare.captions_hf import open_hf
from distill.prepare.captions_table import LOOK, json_rows, open_table
from distill.prepare.captions_tar import open_tars
from distill.prepare.item import Captions, Item
from distill.prepare.names import HIDDEN, OTHER, TABLE_SUFFIXES, is_hidden, is_tar

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
    paths = _expand(source)
    path, local = Path(source).expanduser(), any(p.exists() for p in paths)
    hub = not local and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if layout == "hf" or (layout == "auto" and hub):
        return open_hf(source, columns, image_column, split, name, streaming, part)
    if not local:
        raise UserError(
            f"the source {source} does not exist; expected a folder, a .jsonl, .csv or .parquet "
            "table, .tar files, or a Hugging Face dataset (--layout hf)"
        )
    names, out = walk(path) if path.is_dir() else ([], [])
    if layout in ("auto", "webdataset", "laion", "coyo"):
        tars, beside = _tars(source, [path / n for n in names] or paths)
        if tars:
            return open_tars(tars, [*out, *beside], columns, part)
        if layout == "webdataset":
            raise UserError(f"{source} holds no .tar files, which --layout webdataset expects")
    table = _table(path, names, layout)
    if table is not None:
        return open_table(table, columns, image_column, part)
    if layout == "journeydb":
        raise UserError(f"{source} holds no .jsonl file, which --layout journeydb expects")
    if layout in ("auto", "laion", "coyo") and _is_saved_dataset(names):
        return open_hf(source, columns, image_column, split, name, streaming, part)
    return open_folder(path, names, out, columns, part)


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


def _tars(source: str, paths: list[Path]) -> tuple[list[Path], list[Item]]:
    """(the tar files among `paths`; what else is there, which is left out beside them)."""
    tars = [p for p in paths if is_tar(p.name) and not is_hidden(p.name)]
    missing = [str(p) for p in tars if not p.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of the tar files of {source} do not exist: {missing[:3]}")
    beside = sorted(set(paths) - set(tars))
    return tars, [Item(p.name, left_out=HIDDEN if is_hidden(p.name) else OTHER) for p in beside]


def _table(path: Path, names: list[str], layout: str) -> Path | None:
    """The table that lists the images: the path itself, metadata.*, or JourneyDB's .jsonl."""
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise UserError(
                f"{path} is a {path.suffix or 'nameless'} file; expected a folder, "
                f"a table ({', '.join(TABLE_SUFFIXES)}) or .tar files"
            )
        return path
    if layout != "journeydb":
        for suffix in TABLE_SUFFIXES:
            for name in names:
                if name.lower() == f"metadata{suffix}":
                    return path / name
    if layout in ("auto", "journeydb"):
        for name in names:
            if "/" not in name and name.lower().endswith(".jsonl"):
                rows = islice(json_rows(path / name), LOOK)
                row = next((r for r in rows if isinstance(r, Mapping)), {})
                if layout == "journeydb" or "img_path" in row:
                    return path / name
    return None


def _is_saved_dataset(names: list[str]) -> bool:
    """A folder of `datasets.save_to_disk`, or one of parquet files and no images."""
    if {"dataset_info.json", "dataset_dict.json"} & set(names):
        return True
    return any(n.lower().endswith(".parquet") for n in names) and not images_of(names)
