"""Sources of captioned images for the tests of `d2m prepare`, and what it made of them."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from helpers.flux_folder import draw

from distill.prepare.buckets import resolutions
from distill.prepare.captions import open_captions
from distill.prepare.decode import decode
from distill.prepare.prepare import prepare
from distill.prepare.run import Settings

SMALL = Settings(size=64, batch=3, shard_mb=0.004, max_upscale=2.0)


def png(i, side=64):
    data = io.BytesIO()
    draw(side, side, i).save(data, "PNG")
    return data.getvalue()


def tar_bytes(pairs, mode="w"):
    """pairs: (name, bytes, or a TarInfo without content); a name may come again."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:
        for name, content in pairs:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_tar(path, samples):
    """samples: {name: bytes}, or pairs of them."""
    pairs = samples.items() if isinstance(samples, Mapping) else samples
    path.write_bytes(tar_bytes(pairs, "w:gz" if path.suffix == ".gz" else "w"))
    return path


def write_files(folder, files):
    """files: {name: bytes}"""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def run(source, out, flux, settings=SMALL, **options):
    options = {"workers": 2, **options}
    return prepare(str(source), out, str(flux), settings, progress=False, **options)


def index(folder):
    """{number of a sample in the source: its line in the shards' index}"""
    lines = [x for p in sorted(Path(folder).glob("shard-*.jsonl")) for x in _lines(p)]
    return {line["number"]: line for line in lines}


def bad(folder):
    """The lines of bad.jsonl."""
    return _lines(Path(folder) / "bad.jsonl")


def _lines(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def decoded(source, **reading):
    """Every entry of a source after decoding, without an encoder."""
    items = open_captions(str(source), **reading).items(0)
    return [decode(item, n, resolutions(64), 2.0) for n, item in enumerate(items)]


def kept(entries):
    """[(key, caption)] of those that are samples."""
    return [(d.key, d.caption) for d in entries if d.error is None and d.left_out is None]


def left_out(entries):
    """{key: reason}"""
    return {d.key: d.left_out for d in entries if d.left_out is not None}


def errors(entries):
    """{key: error}"""
    return {d.key: d.error for d in entries if d.error is not None}
