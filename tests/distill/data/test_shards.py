"""Training batches from prepared shards: pure, rank-independent, and sound with damaged files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from helpers.batches import equal
from helpers.flux_folder import CHANNELS, LENGTH, caption, flux_folder, image_folder

from distill.configs.sections import DataConfig
from distill.data.batch import flux_shift, image_ids
from distill.data.encode import TextEncoder
from distill.data.folder import FORMAT, Sample, ShardFile, read_manifest, write_shard
from distill.data.prefetch import Prefetch
from distill.data.prepared import Shards, open_shards
from distill.data.sources import open_source
from distill.errors import CheckpointError, ConfigError, TrainingError, UserError
from distill.prepare.prepare import prepare
from distill.prepare.run import Settings

SETTINGS = Settings(size=64, batch=4, shard_mb=0.005, max_upscale=2.0, length=LENGTH)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), 26)


@pytest.fixture(scope="module")
def online(flux, images, tmp_path_factory):
    """Shards with captions only: buckets of 9, 9 and 8 samples."""
    folder = tmp_path_factory.mktemp("online")
    prepare(str(images), folder, str(flux), SETTINGS, workers=0, progress=False)
    return folder


@pytest.fixture(scope="module")
def cached(flux, images, tmp_path_factory):
    """The same with the captions' embeddings."""
    folder = tmp_path_factory.mktemp("cached")
    settings = replace(SETTINGS, text_embeddings=True, shard_mb=0.008)
    prepare(str(images), folder, str(flux), settings, workers=0, progress=False)
    return folder


def config(folder, **changes):
    options = {"max_sequence_length": LENGTH, "prefetch": 0, **changes}
    return DataConfig(name="shards", folder=str(folder), **options)


# --- contents -------------------------------------------------------------------------------


def test_a_batch_is_what_flux_takes(cached):
    source = Shards(config(cached), guidance=3.5)
    batch = source.batch(0, 0, 4)
    rows, columns = next(t for t in source.tokens.values() if t[0] * t[1] == batch.x0.shape[1])
    assert batch.x0.shape == batch.noise.shape == (4, rows * columns, CHANNELS)
    assert torch.equal(batch.img_ids, image_ids(rows, columns))
    assert torch.equal(batch.txt_ids, torch.zeros(LENGTH, 3))
    assert batch.guidance.tolist() == [3.5] * 4 and batch.inputs()["guidance"] is batch.guidance
    assert (source.text_tokens, source.channels) == (LENGTH, CHANNELS)
    assert (source.text_dim, source.pooled_dim) == (batch.text.shape[2], batch.pooled.shape[1])
    assert {t.dtype for t in batch.inputs().values()} == {torch.float32}
    assert "guidance" not in Shards(config(cached)).batch(0, 0, 4).inputs()


def test_samples_are_the_shards(cached, flux):
    source = Shards(config(cached))
    encoder = TextEncoder(str(flux), length=LENGTH)
    stored = {}
    for entry in read_manifest(cached)["shards"]:
        file = ShardFile(cached / entry["file"])
        for bucket, count in entry["buckets"].items():
            for row in range(count):
                latent, words, *_ = file.read(bucket, row)
                stored[words, latent.shape] = latent.float()
    assert len(stored) == 26
    batch = source.batch(1, 2, 5)
    for i, number in enumerate(batch.labels.tolist()):
        words = source.caption(number)
        assert torch.equal(batch.x0[i], stored[words, batch.x0[i].shape])
        text, pooled = encoder.encode([words])
        assert torch.equal(batch.text[i], text[0].float())
        assert torch.equal(batch.pooled[i], pooled[0].float())


def test_online_text_is_the_cached_text(online, cached, flux):
    first = Shards(config(online, text_encoders=str(flux)))
    second = Shards(config(cached))
    for step in range(3):
        a, b = first.batch(0, step, 3), second.batch(0, step, 3)
        # The shards differ in size, and so do the batches in which the VAE saw the images.
        torch.testing.assert_close(a.x0, b.x0, rtol=2e-3, atol=2e-3)
        assert equal(replace(a, x0=b.x0), b)


def test_timesteps_know_the_number_of_tokens(cached):
    def drawn(kind, **options):
        source = Shards(config(cached, timesteps=kind, **options))
        return [source.batch(0, step, 4) for step in range(12)]

    plain, shifted = drawn("logit-normal"), drawn("flux-shift")
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(
            torch.logit(b.t) - torch.logit(a.t), torch.full((4,), flux_shift(a.x0.shape[1]))
        )
        assert torch.equal(a.noise, b.noise)
    assert len({b.x0.shape[1] for b in plain}) == 3
    grid = torch.cat([b.t for b in drawn("grid", timestep_grid=[0.25, 1.0])])
    assert set(grid.tolist()) == {0.25, 1.0}
    every = torch.cat([b.t for b in plain])
    assert len(set(every.tolist())) == len(every)


# --- order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same(cached, ranks):
    source, own = (
        Shards(config(cached, caption_dropout=0.3)),
        Shards(config(cached, caption_dropout=0.3)),
    )
    for step in range(4):
        whole = source.batch(3, step, 4)
        share = 4 // ranks
        for rank in range(ranks):
            rows = slice(rank * share, (rank + 1) * share)
            assert equal(own.batch(3, step, 4, rows=rows), whole[rows])


def test_every_sample_once_an_epoch(cached):
    source = Shards(config(cached))
    assert len(source) == 26 and source.order.sizes == [9, 9, 8]
    first = torch.cat([source.batch(7, step, 1).labels for step in range(26)]).tolist()
    second = torch.cat([source.batch(7, step, 1).labels for step in range(26, 52)]).tolist()
    assert sorted(first) == sorted(second) == list(range(26)) and first != second
    # batches of 4: 3 + 3 + 2 of them hold all, and 12 - 9 of two buckets a second time
    seen = Counter(n for step in range(8) for n in source.batch(7, step, 4).labels.tolist())
    assert set(seen) == set(range(26)) and sorted(seen.values()) == [1] * 20 + [2] * 6


def test_streams_and_seeds_differ(cached):
    source = Shards(config(cached))
    batch = source.batch(0, 3, 4)
    again = Shards(config(cached)).batch(0, 3, 4)
    assert equal(batch, again)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    other = source.batch(0, 3, 4, "calibrate")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(other.x0, batch.x0) and not torch.equal(other.noise, batch.noise)
    noise = torch.cat([source.batch(0, s, 4).noise[:, 0, :4] for s in range(4)])
    flat = set(map(tuple, noise.tolist()))
    assert len(flat) == 16


def test_captions_are_dropped_at_the_asked_rate(online, cached, flux):
    empty, empty_pooled = TextEncoder(str(flux), length=LENGTH).encode([""])

    def dropped(folder, rate, **options):
        source = Shards(config(folder, caption_dropout=rate, **options))
        batches = [source.batch(0, step, 4) for step in range(40)]
        for b in batches:
            same = [torch.equal(x, empty[0].float()) for x in b.text]
            assert same == [torch.equal(x, empty_pooled[0].float()) for x in b.pooled]
            yield from same

    half = list(dropped(cached, 0.5))
    assert 55 < sum(half) < 105  # of 160
    assert half == list(dropped(online, 0.5, text_encoders=str(flux)))
    assert not any(dropped(cached, 0.0)) and all(dropped(cached, 1.0))


def test_memory_stays_while_every_sample_is_read(tmp_path):
    psutil = pytest.importorskip("psutil")
    shards = []
    for i in range(40):
        latent = torch.randn(3, 4096, 64, generator=torch.Generator().manual_seed(i)).half()
        parts = torch.zeros(LENGTH, 4).bfloat16(), torch.zeros(4).bfloat16()
        size = (1024, 1024)
        group = [Sample(3 * i + j, "", "a", size, size, latent[j], *parts) for j in range(3)]
        shards.append(write_shard(tmp_path, i, group, 3 * i + 3))
    text = {"length": LENGTH, "dim": 4, "pooled_dim": 4}
    buckets = {"1024x1024": {"samples": 120, "tokens": [64, 64]}}
    about = {"format": FORMAT, "complete": True, "vae": {"channels": 64}, "text": text}
    (tmp_path / "manifest.json").write_text(
        json.dumps({**about, "buckets": buckets, "shards": shards})
    )
    source, process = Shards(config(tmp_path)), psutil.Process()
    seen, memory = set(), []
    for step in range(120):
        batch = source.batch(0, step, 1)
        seen.add(batch.labels.item())
        memory.append(process.memory_info().rss)
    assert len(seen) == 120
    size = sum(e["bytes"] for e in shards)  # 63 MB, of which a rank keeps 8 files of 1.6 MB mapped
    assert max(memory[20:]) - min(memory[10:20]) < size / 2


# --- damage ---------------------------------------------------------------------------------


def damaged(cached, tmp_path, kind, which=1):
    folder = tmp_path / "shards"
    shutil.copytree(cached, folder)
    file = folder / f"shard-{which:05d}.safetensors"
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(data[:-50])
    elif kind == "header":
        data[:8] = b"\xff" * 8
        file.write_bytes(data)
    else:
        head = int.from_bytes(data[:8], "little") + 8
        for at in range(head, len(data), 16):  # every sample has a flipped bit
            data[at] ^= 1
        file.write_bytes(data)
    return folder


def one_bad_row(folder, which, bucket, row):
    """Flip a bit of one sample's latent."""
    file = folder / f"shard-{which:05d}.safetensors"
    data = bytearray(file.read_bytes())
    head = int.from_bytes(data[:8], "little") + 8
    start, stop = json.loads(data[8:head])[f"latents/{bucket}"]["data_offsets"]
    size = (stop - start) // json.loads(data[8:head])[f"latents/{bucket}"]["shape"][0]
    data[head + start + row * size] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("verify", [False, True])
def test_one_damaged_sample_is_replaced_alone_whatever_was_read_before(cached, tmp_path, verify):
    folder = tmp_path / "shards"
    shutil.copytree(cached, folder)
    whole = Shards(config(cached))
    bucket = next(b for b in range(3) if len(whole.parts[whole.buckets[b]]) > 1)
    name = whole.buckets[bucket]
    which = whole.parts[name][1]
    one_bad_row(folder, which, name, 0)
    number = whole.starts[name][1]
    stand_in = whole.starts[name][2 % len(whole.parts[name])]
    steps = list(range(16))

    def read(source, order):
        return {step: source.batch(0, step, 4) for step in order}

    continued = Shards(config(folder, verify=verify))
    first = read(continued, steps)
    assert sum((b.labels == whole.offsets[bucket] + number).any() for b in first.values()) > 1
    for other in (
        read(continued, steps),
        read(Shards(config(folder)), reversed(steps)),
        {step: Shards(config(folder)).batch(0, step, 4) for step in steps},
    ):
        assert all(equal(first[step], other[step]) for step in steps)
    good = Shards(config(cached))
    latent = good._read(bucket, stand_in)[0].float()
    for step in steps:
        batch, sound = first[step], good.batch(0, step, 4)
        for i, label in enumerate(sound.labels.tolist()):
            replaced = label == whole.offsets[bucket] + number
            assert torch.equal(batch.x0[i], latent if replaced else sound.x0[i])
    assert list(continued.bad) == [which] and not continued.lost


def test_a_bucket_with_one_shard_finds_stand_ins_in_it(tmp_path):
    latent = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    parts = torch.zeros(LENGTH, 4).bfloat16(), torch.zeros(4).bfloat16()
    size = (64, 64)
    shard = write_shard(tmp_path, 0, [Sample(i, "", "a", size, size, latent[i], *parts)
                                      for i in range(4)], 4)  # fmt: skip
    about = {
        "format": FORMAT,
        "complete": True,
        "vae": {"channels": 4},
        "text": {"length": LENGTH, "dim": 4, "pooled_dim": 4},
        "buckets": {"64x64": {"samples": 4, "tokens": [2, 2]}},
        "shards": [shard],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    for row, expected in ((3, [0, 1, 2, 0]), (0, [1, 1, 2, 1])):
        one_bad_row(tmp_path, 0, "64x64", row)
        source = Shards(config(tmp_path))
        assert [source._read(0, i)[0].equal(latent[e]) for i, e in enumerate(expected)] == [1] * 4
    for row in (1, 2):
        one_bad_row(tmp_path, 0, "64x64", row)
    with pytest.raises(TrainingError, match="no sound sample is left of the bucket 64x64"):
        Shards(config(tmp_path))._read(0, 0)


@pytest.mark.parametrize("kind", ["missing", "truncated", "header", "bits"])
def test_a_damaged_shard_is_skipped_and_the_rest_stays(cached, tmp_path, kind, capsys):
    folder = damaged(cached, tmp_path, kind)
    whole, source = Shards(config(cached)), Shards(config(folder))
    lost = set()
    for bucket, name in enumerate(whole.buckets):
        if 1 in whole.parts[name]:
            part = whole.parts[name].index(1)
            lost |= {whole.offsets[bucket] + n for n in range(*whole.starts[name][part : part + 2])}
    assert lost
    for step in range(12):
        good, batch = whole.batch(0, step, 4), source.batch(0, step, 4)
        for name in ("noise", "t", "labels"):
            assert torch.equal(getattr(good, name), getattr(batch, name))
        for i, number in enumerate(good.labels.tolist()):
            assert torch.equal(good.x0[i], batch.x0[i]) == (number not in lost)
    assert list(source.bad) == [1]
    message = capsys.readouterr().err
    assert message.count("replacing samples of a damaged shard (1 of at most 1)") == 1
    assert "shard-00001.safetensors" in message


def test_too_many_damaged_shards_are_an_error(cached, tmp_path):
    folder = damaged(cached, tmp_path, "truncated")
    with pytest.raises(TrainingError, match="1 of .* shards are damaged.*allows 0.*shard-00001"):
        Shards(config(folder, max_bad_shards=0))
    shutil.rmtree(folder)
    source = Shards(config(damaged(cached, tmp_path, "bits"), max_bad_shards=0))
    with pytest.raises(TrainingError, match="shards are damaged"):
        for step in range(12):
            source.batch(0, step, 4)


def test_verify_reads_every_shard_at_the_start(cached, tmp_path):
    folder = damaged(cached, tmp_path, "bits")
    assert Shards(config(folder)).bad == {}
    assert "another SHA-256" in Shards(config(folder, verify=True)).bad[1]


def test_no_sound_shard_left(cached, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(cached, folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")
    source = Shards(config(folder, max_bad_shards=99))
    with pytest.raises(TrainingError, match="no sound sample is left of the bucket"):
        source.batch(0, 0, 1)


# --- folders --------------------------------------------------------------------------------


def test_parts_of_several_machines_are_one_source(images, flux, tmp_path):
    for i in range(2):
        out = tmp_path / f"part-{i}"
        settings = replace(SETTINGS, text_embeddings=True)
        prepare(str(images), out, str(flux), settings, workers=0, progress=False, part=(i, 2))
    source = Shards(config(tmp_path))
    labels = torch.cat([source.batch(0, step, 1).labels for step in range(26)]).tolist()
    assert sorted(labels) == list(range(26))
    assert sorted(source.caption(n) for n in range(26)) == sorted(caption(n) for n in range(26))


def test_sizes_can_be_mixed(images, flux, tmp_path):
    for size in (64, 96):
        settings = replace(SETTINGS, size=size, text_embeddings=True)
        prepare(str(images), tmp_path / f"{size}", str(flux), settings, workers=0, progress=False)
    source = Shards(config(tmp_path, timesteps="flux-shift"))
    assert len(source.buckets) == 6 and len(source) == 52
    counts = {source.batch(0, step, 2).x0.shape[1] for step in range(27)}
    assert counts == {15, 16, 18, 32, 35, 36} == {a * b for a, b in source.tokens.values()}


def test_what_does_not_fit_is_named(online, cached, images, flux, tmp_path):
    with pytest.raises(ConfigError, match="data.text_encoders, the FLUX folder"):
        Shards(config(online))
    with pytest.raises(ConfigError, match="holds embeddings of 6 tokens"):
        Shards(config(cached, max_sequence_length=512))
    with pytest.raises(UserError, match="expected a folder of `d2m prepare`"):
        Shards(config(images))
    shutil.copytree(cached, tmp_path / "half")
    manifest = tmp_path / "half" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"complete": true', '"complete": false'))
    with pytest.raises(UserError, match="not complete; run its `d2m prepare`"):
        Shards(config(tmp_path / "half"))
    manifest.write_text(text.replace("d2m-latents-1", "d2m-latents-9"))
    with pytest.raises(CheckpointError, match="'d2m-latents-9'; this version reads"):
        Shards(config(tmp_path / "half"))


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_built_in_sources_open_by_name(name):
    pytest.importorskip({"digits": "sklearn", "photos": "skimage"}[name])
    source = open_source(DataConfig(name=name, timesteps="logit-normal"))
    batch = source.batch(0, 0, 3)
    assert batch.x0.shape[2] == source.channels and batch.text.shape[2] == source.text_dim
    assert equal(source.batch(0, 0, 3, rows=slice(1, 2)), batch[1:2])


# --- reading ahead --------------------------------------------------------------------------


class Counting:
    """A source that keeps a list of the calls."""

    def __init__(self, source):
        self.source, self.calls = source, []

    def batch(self, *args):
        self.calls.append(args)
        if args[1] == 13:
            raise CheckpointError("step 13")
        return self.source.batch(*args)


def test_prefetched_batches_are_the_same(cached):
    inner = Counting(Shards(config(cached)))
    ahead, plain = Prefetch(inner, 2), Shards(config(cached))
    try:
        for step in range(4):  # two accumulated halves a step
            for rows in (slice(0, 2), slice(2, 4)):
                assert equal(ahead.batch(0, step, 4, "train", rows), plain.batch(0, step, 4)[rows])
        # another stream and another start in between
        assert equal(ahead.batch(0, 0, 3, "test"), plain.batch(0, 0, 3, "test"))
        assert equal(ahead.batch(0, 9, 4), plain.batch(0, 9, 4))
        for step in (10, 11, 12):
            assert equal(ahead.batch(0, step, 4), plain.batch(0, step, 4))
        with pytest.raises(CheckpointError, match="step 13"):
            ahead.batch(0, 13, 4)
    finally:
        ahead.close()
    run = [a for a in inner.calls if a[3] == "train" and a[4] is None]
    assert [a[1] for a in run[:5]] == [9, 10, 11, 12, 13]  # each computed once, in order
    assert [a[1] for a in inner.calls if a[3] == "test"] == [0]  # not read ahead
    halves = [(a[1], a[4].start) for a in inner.calls if a[4] is not None]
    assert halves[-4:-2] == [(3, 0), (3, 2)] or (3, 2) in halves
    assert len(halves) <= 8 + 3  # little is computed in vain


def test_open_shards_prefetches(cached):
    source = open_shards(config(cached, prefetch=2))
    assert isinstance(source, Prefetch) and source.text_tokens == LENGTH and len(source) == 26
    source.close()
