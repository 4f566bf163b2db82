"""`d2m prepare --ray` on a local cluster: the single process's folder, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'dense2moe[ray]'")
os.environ["RAY_worker_niceness"] = "0"  # 15 else: they would starve beside other tests
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from helpers.flux_folder import flux_folder, image_folder
from helpers.sources import bad, run
from test_prepare import contents

from distill.errors import UserError
from distill.prepare.ray import Pool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = image_folder(tmp_path_factory.mktemp("images"), 40)
    for i in (3, 17, 30):
        (folder / f"image-{i:03d}.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def alone(flux, images, tmp_path_factory):
    """What a single process writes."""
    out = tmp_path_factory.mktemp("alone")
    manifest = run(images, out, flux)
    assert manifest["samples"] == 37 and manifest["bad"] == 3 and len(manifest["shards"]) > 4
    return out


def test_actors_that_are_killed_are_replaced(flux, images, alone, tmp_path, monkeypatch):
    call, seen, killed = Pool.call, {"decode": 0, "encode": 0}, {}

    def counted(pool, method, *args, **options):
        """With the second call of a kind its first actor dies, whatever is waiting there."""
        refs = call(pool, method, *args, **options)
        seen[method] += 1
        if seen[method] == 2:
            pid = ray.get(pool.actors[0].__ray_call__.remote(lambda actor: os.getpid()))
            os.kill(pid, signal.SIGKILL)
            killed[method] = len(pool.actors)
        return refs

    monkeypatch.setattr(Pool, "call", counted)
    ray.init(num_cpus=3, object_store_memory=150 * 2**20, include_dashboard=False)
    try:
        with pytest.raises(UserError, match="2 of 18 entries cannot be used.*--max-bad 1"):
            run(images, tmp_path / "capped", flux, ray="auto", max_bad="1")
        assert killed == {"decode": 2, "encode": 1}  # of so many actors one
        run(images, tmp_path / "out", flux, ray="auto")
    finally:
        ray.shutdown()
    assert contents(tmp_path / "out") == contents(alone)
    assert [b["number"] for b in bad(tmp_path / "out")] == [3, 17, 30]


def test_a_driver_that_is_killed_goes_on(flux, images, alone, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "distill", "prepare", images, out, "--model", flux]
    command += ["--size", "64", "--batch", "3", "--shard-mb", "0.004", "--max-upscale", "2"]
    command += ["--ray", "auto", "--device", "cpu"]
    first = subprocess.Popen(command)
    while len(list(out.glob("shard-*.safetensors"))) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    before = contents(out)
    assert not (out / "shard-00004.safetensors").exists()
    subprocess.run(command, check=True)
    assert contents(out) == contents(alone)
    assert contents(out)["shard-00000.safetensors"] == before["shard-00000.safetensors"]
