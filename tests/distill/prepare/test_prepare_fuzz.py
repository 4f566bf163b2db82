"""Damaged files of any kind: the readers name what is wrong, and never give wrong data."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers import any_source
from helpers.flux_folder import flux_folder
from helpers.sources import bad, index, run, tar_bytes, write_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.data.folder import Sample, ShardFile, read_manifest, write_shard
from distill.errors import CheckpointError, UserError
from distill.prepare.captions import ANY_CAPTION, open_captions
from distill.prepare.run import Settings

many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


TAR = tar_bytes(
    (f"{i:05d}.{suffix}", content)
    for i in range(5)
    for suffix, content in (("jpg", b"J%d" % i * 300), ("txt", b"caption %d" % i))
)


@given(cut=st.integers(0, len(TAR)), flips=st.lists(st.integers(0, len(TAR) * 8 - 1), max_size=3))
@many
def test_a_damaged_tar_gives_sound_items_or_errors(tmp_path, cut, flips):
    data = bytearray(TAR)
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "0.tar"
    path.write_bytes(data[:cut])
    items = list(open_captions(str(path)).items(0))
    again = [item.key for item in open_captions(str(path)).items(0)]
    assert [item.key for item in items] == again
    assert [item.key for item in open_captions(str(path)).items(2)] == again[2:]
    errors = 0
    for item in items:
        try:
            item.load()
        except Exception:  # `d2m prepare` counts it
            errors += 1
    if not flips and cut == len(TAR):
        assert (len(items), errors) == (5, 0)
    if not flips:  # all that lies before the cut is there
        whole = sum(cut >= (i + 1) * 4 * 512 - 500 for i in range(5))
        assert len(items) - errors >= whole - 1


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """(bytes of a shard file, its samples)"""
    folder = tmp_path_factory.mktemp("shard")
    g = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            i,
            f"{i}",
            f"caption {i}",
            (32, 32) if i % 2 else (16, 48),
            (1, 1),
            torch.randn(4 if i % 2 else 3, 8, generator=g).half(),
            torch.randn(2, 4, generator=g).bfloat16(),
            torch.randn(4, generator=g).bfloat16(),
        )
        for i in range(6)
    ]
    write_shard(folder, 0, samples, 6)
    return (folder / "shard-00000.safetensors").read_bytes(), samples


@given(data=st.data())
@many
def test_a_damaged_shard_gives_what_was_written_or_an_error(shard, tmp_path, data):
    whole, samples = shard
    damaged = bytearray(whole)
    for bit in data.draw(st.lists(st.integers(0, len(whole) * 8 - 1), max_size=3)):
        damaged[bit // 8] ^= 1 << bit % 8
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    path = tmp_path / "shard.safetensors"
    path.write_bytes(damaged[:cut])
    rows = {}
    try:
        file = ShardFile(path)
    except CheckpointError:
        return
    for s in samples:
        bucket = f"{s.bucket[0]}x{s.bucket[1]}"
        row = rows[bucket] = rows.get(bucket, -1) + 1
        try:
            latent, caption, text, pooled = file.read(bucket, row)
        except CheckpointError as err:
            assert damaged[:cut] != whole and "shard.safetensors" in str(err)
            continue
        assert torch.equal(latent, s.latent) and caption == s.caption
        assert torch.equal(text, s.text) and torch.equal(pooled, s.pooled)


@given(text=st.text(max_size=80))
@many
def test_any_line_of_a_table_is_an_item_or_an_error(tmp_path, text):
    first = json.dumps({"file_name": "a.png", "text": "a"})
    (tmp_path / "metadata.jsonl").write_text(f"{first}\n{text}\n", encoding="utf-8", newline="")
    (tmp_path / "a.png").write_bytes(b"png")
    items = list(open_captions(str(tmp_path)).items(0))
    assert items[0].load() == (b"png", "a")
    for item in items[1:]:
        with pytest.raises((ValueError, OSError)):
            item.load()


@given(row=st.dictionaries(st.sampled_from([*ANY_CAPTION, "url"]), st.text(max_size=4) | st.none()))
def test_a_caption_is_a_row_s_own_text_or_missing(row):
    from distill.prepare.item import caption_of

    try:
        caption = caption_of(row, ANY_CAPTION)
    except ValueError as err:
        assert not isinstance(err, UserError) and "no caption" in str(err)
    else:
        assert caption and caption in [v.strip() for v in row.values() if v]


# --- `d2m prepare` of anything --------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("flux"))


def accounted(flux, source, out, entries, keep):
    """Prepare it: every entry is kept, bad or left out, with a reason; what is sound is kept."""
    settings = Settings(size=64, max_upscale=2.0)
    try:
        manifest = run(source, out, flux, settings, max_bad="1000", workers=0)
    except UserError as err:
        assert not keep and ("gave no sample" in str(err) or not (out / "manifest.json").exists())
        if "gave no sample" not in str(err):
            assert "holds no images" in str(err) or "no row" in str(err) or "columns" in str(err)
            return
        manifest = read_manifest(out)
    lost, rest = bad(out), manifest["left_out"]
    counts = manifest["samples"], len(lost), sum(entry["count"] for entry in rest.values())
    assert manifest["complete"] and manifest["bad"] == len(lost)
    assert entries is None or sum(counts) == entries, (counts, lost, rest)
    assert all(b["error"] and b["key"] for b in lost) and all(e["first"] for e in rest.values())
    found = Counter(line["caption"] for line in index(out).values())
    assert Counter(keep) <= found and found.total() == manifest["samples"]


def any_folder(data, work):
    pieces = data.draw(any_source.pieces())
    for piece in pieces:
        write_files(work / "source", dict(piece.files))
    return work / "source", pieces


def any_tar(data, work):
    pieces = data.draw(any_source.pieces(any_source.TAR_ONLY))
    mode = data.draw(st.sampled_from(["w", "w", "w:gz", "w:bz2", "w:xz"]))
    whole = tar_bytes([pair for piece in pieces for pair in piece.files], mode)
    (work / "source.tar").write_bytes(whole)
    return work / "source.tar", pieces


def any_table(data, work):
    files, rows, keep = data.draw(any_source.rows())
    name, write = data.draw(
        st.sampled_from(
            [("metadata.jsonl", any_source.jsonl), ("Metadata.CSV", any_source.table_csv)]
        )
    )
    write_files(work / "source", {**files, name: write(rows)})
    return work / "source", [any_source.Piece([], len(rows), keep)]


def cut_tar(data, work):
    """Any tar that is damaged: only what must hold of every source is known of it."""
    path, _ = any_tar(data, work)
    whole = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    return path, [any_source.Piece([], None)]


# 500 in all
@pytest.mark.parametrize("count", [10, pytest.param(125, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", [any_folder, any_tar, any_table, cut_tar])
def test_of_any_source_every_entry_is_accounted_for(source, count, flux):
    @given(data=st.data())
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    def check(data):
        with tempfile.TemporaryDirectory() as work:
            path, pieces = source(data, Path(work))
            entries = None if pieces[0].entries is None else sum(p.entries for p in pieces)
            keep = [words for piece in pieces for words in piece.keep]
            accounted(flux, path, Path(work) / "out", entries, keep)

    check()
