"""Hugging Face datasets as an image-caption source (the `datasets` package, imported here only)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.prepare.item import Captions, Item, caption_of

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


def open_hf(
    source: str,
    columns: tuple[str, ...],
    image_column: str | None,
    split: str,
    name: str | None,
    streaming: bool,
    part: tuple[int, int],
) -> Captions:
    """A dataset on the hub, or local: saved with `save_to_disk`, or files `load_dataset` reads."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading a Hugging Face dataset needs `datasets`: pip install 'dense2moe[data]'"
        ) from None
    path = Path(source).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))
            if isinstance(data, Mapping):
                data = data[split]
            if streaming:
                data = data.to_iterable_dataset()
        else:
            data = datasets.load_dataset(
                str(path) if path.exists() else source, name, split=split, streaming=streaming
            )
        if part != (0, 1):
            data = data.shard(num_shards=part[1], index=part[0])
    except Exception as err:  # the library and the hub client raise many kinds
        raise UserError(
            f"cannot open the dataset {source} (split {split!r}): {' '.join(str(err).split())}"
        ) from err
    column = _image_column(data, image_column, source)
    if isinstance((data.features or {}).get(column), datasets.Image):
        data = data.cast_column(column, datasets.Image(decode=False))

    def load(row: Any) -> tuple[Any, str]:
        row = data[row] if isinstance(row, int) else row
        return _image(row[column], path), caption_of(row, columns)

    def items(start: int) -> Iterator[Item]:
        # By number where that is possible: a row that cannot be read is that row's error.
        rows = (data.skip(start) if start else data) if streaming else range(start, len(data))
        for number, row in enumerate(rows, start):
            yield Item(f"{split}/{number}", lambda row=row: load(row))

    from distill.files import fingerprint  # brings torch, which `d2m --help` does without

    # A streamed dataset has no fingerprint of its own: its name, split and revision must do.
    version = getattr(data.info, "version", None)
    own = [str(version), data.info.download_checksums and sorted(data.info.download_checksums)]
    if not streaming:
        own = [len(data), sorted(data.features)]
    total = None if streaming else len(data)
    return Captions("hf", fingerprint(source, name, split, own), items, total)


def _image_column(data: Any, asked: str | None, source: str) -> str:
    features = data.features
    if features is None:  # a streamed dataset may know its columns only when read
        features = dict.fromkeys(next(iter(data), {}))
    if asked is not None:
        if asked not in features:
            raise UserError(f"--image-column is {asked!r}; {source} has {sorted(features)}")
        return asked
    images = [n for n, f in features.items() if type(f).__name__ == "Image"]
    images += [n for n in IMAGE_COLUMNS if n in features]
    if images:
        return images[0]
    hint = ""
    if {"url", "URL"} & set(features):
        hint = "; it lists addresses: fetch the images first, e.g. with img2dataset"
    raise UserError(
        f"{source} has the columns {sorted(features)}, none with images; expected --image-column "
        f"or one of {list(IMAGE_COLUMNS)}{hint}"
    )


def _image(value: Any, folder: Path) -> Any:
    """Encoded bytes, or the PIL image a dataset decoded itself."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        file = Path(value) if Path(value).is_absolute() else folder / value
        return file.read_bytes()
    if value is None:
        raise ValueError("no image")
    return value
