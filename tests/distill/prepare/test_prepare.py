"""`d2m prepare`: every kind of source, resumed to the byte, damage named."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from helpers.flux_folder import LENGTH, caption, draw, flux_folder, image_folder
from helpers.sources import SMALL, bad, index, png, run, write_files, write_tar
from safetensors.torch import load_file

from distill.cli import main
from distill.data.encode import LatentEncoder, TextEncoder
from distill.data.folder import ShardFile, read_manifest
from distill.errors import UserError
from distill.prepare.buckets import fit, nearest, resolutions
from distill.prepare.colour import to_srgb
from distill.prepare.decode import SMALL as SMALLER
from distill.prepare.prepare import check, prepare
from distill.prepare.run import Settings, bad_limit


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.name != ".lock"}


# --- what is written ------------------------------------------------------------------------


def test_a_folder_of_images(flux, images, tmp_path):
    manifest = run(images, tmp_path / "out", flux)
    assert manifest == read_manifest(tmp_path / "out") and manifest["complete"]
    assert manifest["samples"] == 24 and manifest["bad"] == 0 and len(manifest["shards"]) > 2
    assert {n: b["samples"] for n, b in manifest["buckets"].items()} == {
        "48x80": 8,
        "64x64": 8,
        "96x48": 8,
    }
    assert all(e["bytes"] < 1.5e4 for e in manifest["shards"])
    lines = index(tmp_path / "out")
    assert sorted(lines) == list(range(24))
    assert [lines[i]["caption"] for i in range(24)] == [caption(i) for i in range(24)]
    assert check(tmp_path / "out") == []
    # one sample against the VAE by itself
    from PIL import Image

    names = sorted(p for p in images.iterdir() if p.suffix != ".txt")
    line = lines[7]
    assert names[7].name == line["key"]
    pixels = fit(to_srgb(Image.open(names[7]))[0], (48, 80))
    want = LatentEncoder(str(flux)).encode(torch.from_numpy(pixels)[None])[0]
    shard = next(e for e in manifest["shards"] if e["until"] > 7)
    latent, text, *cached = ShardFile(tmp_path / "out" / shard["file"]).read("48x80", line["row"])
    assert latent.dtype == torch.float16 and text == caption(7) and cached == [None, None]
    torch.testing.assert_close(latent.float(), want, rtol=1e-3, atol=2e-3)


def test_cached_embeddings_are_the_encoders(flux, images, tmp_path):
    settings = Settings(size=64, max_upscale=2.0, text_embeddings=True, length=LENGTH)
    manifest = run(images, tmp_path, flux, settings)
    encoder = TextEncoder(str(flux), length=LENGTH)
    shard = ShardFile(tmp_path / manifest["shards"][0]["file"])
    _, words, text, pooled = shard.read("64x64", 5)
    want = encoder.encode([words])
    assert torch.equal(text, want[0][0]) and torch.equal(pooled, want[1][0])
    empty = load_file(tmp_path / "empty.safetensors")
    assert torch.equal(empty["text"], encoder.encode([""])[0][0])


def test_drawn_latents_differ_and_repeat(flux, images, tmp_path):
    drawn = Settings(size=64, batch=3, max_upscale=2.0, latents="sample", seed=4)
    for name in "ab":
        run(images, tmp_path / name, flux, drawn)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    run(images, tmp_path / "mode", flux, Settings(size=64, batch=3, max_upscale=2.0))
    a, mode = (load_file(tmp_path / n / "shard-00000.safetensors") for n in ("a", "mode"))
    assert not torch.equal(a["latents/64x64"], mode["latents/64x64"])


def test_the_number_of_workers_changes_nothing(flux, images, tmp_path):
    for workers in (0, 1, 5):
        prepare(
            str(images), tmp_path / f"{workers}", str(flux), SMALL, workers=workers, progress=False
        )
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "5")


def test_parts_of_several_machines_are_the_whole(flux, images, tmp_path):
    for i in range(2):
        run(images, tmp_path / f"part-{i}", flux, part=(i, 2))
    found = [index(tmp_path / f"part-{i}") for i in range(2)]
    captions = [found[n % 2][n // 2]["caption"] for n in range(24)]
    assert captions == [caption(n) for n in range(24)]


# --- resolutions ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 256, 512, 1024])
def test_buckets_have_about_one_area(size):
    found = resolutions(size)
    assert (size, size) in found and len(set(found)) == len(found)
    assert {(w, h) for h, w in found} == set(found)
    for h, w in found:
        assert h % 16 == w % 16 == 0 and max(h, w) <= 2 * min(h, w)
        assert abs(h * w / size**2 - 1) <= (0.13 if size == 64 else 0.04)


def test_images_go_to_the_nearest_and_are_cropped_at_the_centre():
    buckets = resolutions(64)
    assert nearest(100, 100, buckets) == (64, 64)
    assert nearest(500, 1000, buckets) == (48, 96) and nearest(1000, 100, buckets) == (96, 48)
    from PIL import Image

    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 96:160] = 255  # only the middle quarter is white
    assert (fit(Image.fromarray(wide), (64, 64))[:, :, 4:-4] == 255).all()


def test_odd_images_become_rgb():
    from PIL import Image

    grey16 = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert np.asarray(to_srgb(grey16)[0]).tolist() == np.full((4, 4, 3), 0x80).tolist()
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(to_srgb(clear)[0]).min() == 255  # transparent is white
    turned = Image.new("RGB", (8, 4))
    turned.getexif()[0x0112] = 6
    data = io.BytesIO()
    turned.save(data, "JPEG", exif=turned.getexif())
    assert to_srgb(Image.open(data))[0].size == (4, 8)


# --- sources --------------------------------------------------------------------------------


def _laion(folder, name="{:05d}.tar", shards=2, each=3):
    """What img2dataset writes from LAION's URL and TEXT columns: .jpg, .txt and .json a sample."""
    folder.mkdir()
    for s in range(shards):
        files = {}
        for i in range(s * each, (s + 1) * each):
            meta = {"url": f"http://x/{i}", "caption": caption(i), "status": "success"}
            meta |= {"text": f"coyo {i}", "NSFW": "UNLIKELY"}
            files[f"{i:09d}.jpg"] = png(i)  # decoded by content, whatever the suffix says
            files[f"{i:09d}.txt"] = caption(i).encode()
            files[f"{i:09d}.json"] = json.dumps(meta).encode()
        write_tar(folder / name.format(s), files)
    return folder


def _table(folder, column, words, file, nested=""):
    """A table of three images and one whose file is missing."""
    (folder / nested).mkdir(parents=True)
    rows = [{column: f"{i}.png", words: caption(i), "Task1": {"a": 1}} for i in range(4)]
    for i in range(3):
        (folder / nested / f"{i}.png").write_bytes(png(i))
    if file.endswith(".csv"):
        lines = [f"{column},{words}", *(f"{r[column]},{r[words]}" for r in rows)]
        (folder / file).write_text("\n".join(lines))
    elif file.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / file)
    else:
        (folder / file).write_text("\n".join(map(json.dumps, rows)))
    return folder


def _captions(folder):
    return [line["caption"] for _, line in sorted(index(folder).items())]


@pytest.mark.parametrize("layout", ["auto", "webdataset", "laion"])
def test_tar_shards_of_img2dataset(flux, tmp_path, layout):
    source = _laion(tmp_path / "laion")
    manifest = run(source, tmp_path / "out", flux, layout=layout)
    assert manifest["samples"] == 6 and manifest["source"]["kind"] == "webdataset"
    assert _captions(tmp_path / "out") == [caption(i) for i in range(6)]
    assert index(tmp_path / "out")[4]["key"] == "00001.tar/000000004"


def test_compressed_tars_braces_and_another_column(flux, tmp_path):
    source = _laion(tmp_path / "coyo", "{:05d}.tar.gz")
    pattern = f"{source}/{{00000..00001}}.tar.gz"
    run(pattern, tmp_path / "out", flux, layout="coyo", caption_column="text")
    assert _captions(tmp_path / "out") == [f"coyo {i}" for i in range(6)]


@pytest.mark.parametrize("texts", [{}, {"txt": b" \n"}])
def test_coyos_text_column_without_txt(flux, tmp_path, texts):
    texts = {**texts, "json": b'{"url": "x", "text": "one cat"}'}
    write_tar(tmp_path / "0.tar", {"a.png": png(0), **{f"a.{s}": t for s, t in texts.items()}})
    run(tmp_path / "0.tar", tmp_path / "out", flux, layout="coyo")
    assert _captions(tmp_path / "out") == ["one cat"]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(png(0))
    for suffix, text in texts.items():
        (tmp_path / "files" / f"a.{suffix}").write_bytes(text)
    run(tmp_path / "files", tmp_path / "out-files", flux)
    assert _captions(tmp_path / "out-files") == ["one cat"]


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_table_of_files(flux, tmp_path, file):
    source = _table(tmp_path / "s", "file_name", "text", file)
    manifest = run(source, tmp_path / "out", flux)
    assert _captions(tmp_path / "out") == [caption(i) for i in range(3)]
    assert manifest["bad"] == 1
    [lost] = bad(tmp_path / "out")
    assert lost["number"] == 3 and "3.png is not in" in lost["error"]


@pytest.mark.parametrize("layout", ["auto", "journeydb"])
def test_journeydb(flux, tmp_path, layout):
    source = _table(tmp_path / "j", "img_path", "prompt", "train_anno.jsonl", nested="imgs")
    manifest = run(source, tmp_path / "out", flux, layout=layout)
    assert _captions(tmp_path / "out") == [caption(i) for i in range(3)] and manifest["bad"] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_dataset(flux, tmp_path, streaming, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = {"image": [draw(64, 64, i) for i in range(5)], "text": [caption(i) for i in range(5)]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "train.parquet")
    for source in ("saved", "files"):
        out = tmp_path / f"out-{source}"
        manifest = run(tmp_path / source, out, flux, streaming=streaming)
        assert manifest["source"]["kind"] == "hf" and manifest["samples"] == 5
        assert _captions(out) == [caption(i) for i in range(5)]
    latents = [
        load_file(tmp_path / f"out-{s}" / "shard-00000.safetensors")["latents/64x64"]
        for s in ("saved", "files")
    ]
    assert torch.equal(*latents)


@pytest.mark.parametrize("layout", ["auto", "laion"])
def test_addresses_alone_are_refused(flux, tmp_path, layout):
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    import pyarrow

    (tmp_path / "laion").mkdir()
    rows = pyarrow.Table.from_pylist([{"URL": "http://x/0.jpg", "TEXT": "a cat"}])
    parquet.write_table(rows, tmp_path / "laion" / "part-0.parquet")
    with pytest.raises(UserError, match="lists addresses.*img2dataset"):
        run(tmp_path / "laion", tmp_path / "out", flux, layout=layout)


def test_sources_that_are_none_say_what_was_expected(flux, tmp_path):
    with pytest.raises(UserError, match="does not exist; expected a folder"):
        run(tmp_path / "nothing", tmp_path / "out", flux)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        run(tmp_path / "empty", tmp_path / "out", flux)
    (tmp_path / "metadata.jsonl").write_text('{"URL": "http://x", "TEXT": "a cat"}')
    with pytest.raises(UserError, match="lists addresses.*img2dataset"):
        run(tmp_path / "metadata.jsonl", tmp_path / "out", flux, layout="laion")


# --- what goes wrong ------------------------------------------------------------------------


def _damaged(folder):
    source = image_folder(folder, 12)
    (source / "image-001.png").write_bytes(b"no image")
    whole = (source / "image-004.jpg").read_bytes()
    (source / "image-004.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "image-006.txt").unlink()
    (source / "image-007.txt").write_text("  ")
    draw(16, 16, 0).save(source / "image-009.png")
    return source


def test_unreadable_images_are_counted_listed_and_capped(flux, tmp_path):
    source = _damaged(tmp_path / "s")
    manifest = run(source, tmp_path / "out", flux)
    assert (manifest["samples"], manifest["bad"]) == (7, 4)
    assert manifest["left_out"] == {SMALLER: {"count": 1, "first": ["image-009.png"]}}
    lost = bad(tmp_path / "out")
    assert [b["number"] for b in lost] == [1, 4, 6, 7]
    assert "UnidentifiedImageError" in lost[0]["error"] and "no caption" in lost[2]["error"]
    with pytest.raises(UserError, match="4 of 8 entries cannot be used.*--max-bad 3"):
        run(source, tmp_path / "capped", flux, max_bad="3")
    # What was done until then is kept, and a larger limit goes on to the same result.
    assert run(source, tmp_path / "capped", flux, max_bad="4") == manifest
    assert contents(tmp_path / "capped") == contents(tmp_path / "out")


def test_bad_limit():
    assert bad_limit("25", 10**6) == 25 and bad_limit("1%", 10**6) == 10**4
    assert bad_limit("1%", 3) == 10
    with pytest.raises(UserError, match="--max-bad is 'few'"):
        bad_limit("few", 1)


@pytest.mark.parametrize("cut", ["data", "header", "garbage"])
def test_a_truncated_tar_gives_what_it_has(flux, tmp_path, cut):
    source = _laion(tmp_path / "laion", each=4)
    first = source / "00000.tar"
    with tarfile.open(first) as tar:
        members = {m.name: m for m in tar}
    data = first.read_bytes()
    if cut == "data":
        data = data[: members["000000003.jpg"].offset_data + 100]
    elif cut == "header":
        data = data[: members["000000003.jpg"].offset + 100]
    else:
        at = members["000000003.jpg"].offset
        data = data[:at] + b"\xff" * 512 + data[at + 512 :]
    first.write_bytes(data)
    manifest = run(source, tmp_path / "out", flux)
    assert _captions(tmp_path / "out") == [caption(i) for i in (0, 1, 2, 4, 5, 6, 7)]
    # the file, and the image that ends with it
    assert manifest["bad"] == (2 if cut == "data" else 1)
    assert "00000.tar" in (tmp_path / "out" / "bad.jsonl").read_text()


def test_latents_that_are_not_finite_are_left_out(flux, images, tmp_path, monkeypatch):
    encode = LatentEncoder.encode

    def broken(self, pixels, generators=None):
        out = encode(self, pixels, generators)
        out[0] = float("nan")
        return out

    monkeypatch.setattr(LatentEncoder, "encode", broken)
    manifest = run(images, tmp_path / "out", flux)
    assert manifest["bad"] > 0 and manifest["samples"] + manifest["bad"] == 24
    for entry in manifest["shards"]:
        tensors = load_file(tmp_path / "out" / entry["file"])
        assert all(t.isfinite().all() for n, t in tensors.items() if n.startswith("latents"))


def test_nothing_left_is_an_error(flux, images, tmp_path):
    for _ in range(2):  # also when it is complete
        with pytest.raises(UserError, match="gave no sample: 24 left out: smaller than --size"):
            run(images, tmp_path / "out", flux, Settings(size=256))


def test_images_without_captions_are_an_error_with_its_reason(flux, tmp_path):
    write_files(tmp_path / "s", {f"{i}.png": png(i) for i in range(12)})
    most = "11 times ValueError: no caption: neither a .txt nor a .json of its name lies"
    with pytest.raises(UserError, match=f"--max-bad 1% allows: all for the same reason, {most}"):
        run(tmp_path / "s", tmp_path / "out", flux)
    with pytest.raises(
        UserError,
        match=r"gave no sample: 12 cannot be used .*, all for the same reason, 12 times Val",
    ):
        run(tmp_path / "s", tmp_path / "out", flux, max_bad="12")


def test_other_settings_models_or_sources_are_refused(flux, images, tmp_path):
    run(images, tmp_path / "out", flux)
    with pytest.raises(UserError, match="settings seed 0, now it is 1"):
        run(images, tmp_path / "out", flux, Settings(**{**vars(SMALL), "seed": 1}))
    more = image_folder(tmp_path / "more", 25)
    with pytest.raises(UserError, match="begun with source fingerprint"):
        run(more, tmp_path / "out", flux)
    with pytest.raises(UserError, match="begun with source part '0/1', now it is '0/2'"):
        run(images, tmp_path / "out", flux, part=(0, 2))
    with pytest.raises(UserError, match="is not empty"):
        run(more, images, flux)


def test_a_full_disk_is_named_and_loses_nothing(flux, images, tmp_path, monkeypatch):
    import errno

    rename, done = os.replace, []

    def full(*args):
        done.append(args)
        if len(done) == 6:  # the second shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(*args)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write .*shard-00001.*No space left on device"):
        run(images, tmp_path / "out", flux)
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert len(read_manifest(tmp_path / "out")["shards"]) == 1
    run(images, tmp_path / "out", flux)
    run(images, tmp_path / "straight", flux)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_signal_stops_it_and_the_same_command_goes_on(
    flux, images, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = ["prepare", str(images), str(out), "--model", str(flux), "--device", "cpu"]
    command += ["--size", "64", "--shard-mb", "0.004", "--batch", "3"]
    encode, calls = LatentEncoder.encode, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*args)

    monkeypatch.setattr(LatentEncoder, "encode", stopped)
    assert main(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    begun = read_manifest(out)
    assert begun["shards"] and not begun["complete"] and check(out)[-1].startswith("it is not")
    assert main(command) == 0
    run(images, tmp_path / "straight", flux, replace(SMALL, max_upscale=1.0))
    assert contents(out) == contents(tmp_path / "straight")


def test_two_runs_at_once_are_refused(flux, images, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    run(images, tmp_path / "out", flux)
    with open(tmp_path / "out" / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `d2m prepare`"):
            run(images, tmp_path / "out", flux)
    run(images, tmp_path / "out", flux)


def test_check_names_a_damaged_file(flux, images, tmp_path, capsys):
    out = tmp_path / "out"
    run(images, out, flux)
    assert main(["prepare", "--check", str(out)]) == 0 and "24 samples" in capsys.readouterr().out
    shard = out / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["prepare", "--check", str(out)]) == 2
    assert "shard-00001.safetensors has another SHA-256" in capsys.readouterr().err
    shard.write_bytes(data[:-1])
    assert "shard-00001.safetensors has" in check(out)[0]
    shard.unlink()
    assert "No such file" in check(out)[0]


# --- killed and resumed ---------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from distill.prepare.prepare import prepare
from distill.prepare.run import Settings
from distill.data.encode import LatentEncoder
source, out, straight, flux = sys.argv[1:]
settings = Settings(size=64, batch=3, shard_mb=0.004, max_upscale=2.0)

def run():
    prepare(source, out, flux, settings, progress=False, workers=2)

def child(kill_at):
    # kill_at n: SIGKILL itself before its n-th rename (odd) or right after it (even)
    replace, calls = os.replace, []
    def counted(*args):
        calls.append(args)
        if kill_at is not None and len(calls) == abs(kill_at):
            if kill_at > 0:
                replace(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
    os.replace = counted
    run()

def fork(kill_at, delay=None):
    pid = os.fork()
    if pid == 0:
        try:
            child(kill_at)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

LatentEncoder(flux)  # imports what it needs, once for all that follow
# A shard is four renames: its index, itself, bad.jsonl, manifest.json.
for at in (-1, 1, -2, -3, 3, -4, 6, -8):
    assert os.WTERMSIG(fork(at)) == signal.SIGKILL, at
rng = random.Random(0)
for _ in range(2):
    fork(None, rng.uniform(0.05, 0.3))
assert fork(None) == 0
out = straight
assert fork(None) == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_writes_the_same_bytes(flux, tmp_path):
    source = _damaged(tmp_path / "s")
    image_folder(tmp_path / "s" / "more", 30)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    straight = tmp_path / "straight"
    paths = [source, tmp_path / "killed", straight, flux]
    command = [sys.executable, *map(str, [script, *paths])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(read_manifest(straight)["shards"]) > 4
    assert contents(tmp_path / "killed") == contents(straight)
    assert check(tmp_path / "killed") == []


def test_the_command(flux, images, tmp_path, capsys):
    command = ["prepare", str(images), str(tmp_path / "o"), "--model", str(flux), "--size", "64"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "24 samples in 1 shards; 0 unreadable" in capsys.readouterr().out
    assert main([*command, "--seed", "3"]) == 2
    assert "begun with settings seed 0" in capsys.readouterr().err
    for extra, message in (
        (["--part", "2/2"], "--part is '2/2'"),
        (["--batch", "0"], "--batch is 0"),
        (["--size", "40"], "--size is 40"),
    ):
        assert main([*command, *extra]) == 2
        assert message in capsys.readouterr().err
    assert main(["prepare", str(images), str(tmp_path / "p")]) == 2
    assert "--model is missing" in capsys.readouterr().err
