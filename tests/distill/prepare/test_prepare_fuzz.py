"""Damaged files of any kind: the readers name what is wrong, and never give wrong data."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.data.folder import Sample, ShardFile, write_shard
from distill.errors import CheckpointError, UserError
from distill.prepare.captions import ANY_CAPTION, open_captions

many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _tar(samples=5):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for i in range(samples):
            for suffix, content in (("jpg", b"J%d" % i * 300), ("txt", b"caption %d" % i)):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


TAR = _tar()


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
