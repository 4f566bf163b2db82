"""The command from end to end on a tiny FLUX: resumes, shards, compares, and says what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for package in ("diffusers", "transformers", "PIL", "skimage", "tqdm"):
    pytest.importorskip(package)

from helpers import tiny_judges as tiny
from helpers.flux_folder import flux_folder

from distill.cli import main
from distill.errors import UserError
from distill.evaluate.generate import Settings, describe, generate, image_path, noise
from distill.evaluate.prompts import Prompt
from distill.loop.parallel import World

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = [Prompt(text) for text in ("a red cat", "a blue dog", "a green house")]
OPTIONS = ("--size", "32", "--steps", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """The teacher with noise on its weights."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("student") / "student"
    shutil.copytree(teacher, folder)
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{p.text}\n" for p in PROMPTS), encoding="utf-8")
    return path


def settings(model, **changed):
    return replace(Settings(str(model), images=2, steps=4, size=32), **changed)


def pictures(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "images").glob("*.png"))}


def test_an_image_depends_on_its_own_noise_alone(teacher, tmp_path):
    """Not on the batch, not on who makes it: batches of 1 and 4, one process and two."""
    for name, batch in (("a", 1), ("b", 4)):
        generate(tmp_path / name, PROMPTS, settings(teacher), World(), batch, progress=False)
    whole = pictures(tmp_path / "a")
    assert len(whole) == 6 and len(set(whole.values())) == 6
    from PIL import Image, ImageChops

    for name in whole:  # a batch rounds otherwise, by a grey level or two
        a, b = (Image.open(tmp_path / f / "images" / name) for f in "ab")
        assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 2
    assert not torch.equal(*(torch.randn(4, generator=noise(0, k)) for k in ("00000-0", "00001-0")))


def test_only_what_is_missing_is_made(teacher, tmp_path):
    generate(tmp_path, PROMPTS, settings(teacher), World(), progress=False)
    before = pictures(tmp_path)
    path = image_path(tmp_path, "00001-0")
    path.unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir()}
    (tmp_path / "images" / ".00001-0.png.1.tmp").write_bytes(b"half")
    generate(tmp_path, PROMPTS, settings(teacher), World(), progress=False)
    assert pictures(tmp_path) == before
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert {p.name for p in (tmp_path / "images").iterdir()} == set(before)


def test_other_settings_are_refused(teacher, tmp_path):
    generate(tmp_path, PROMPTS[:1], settings(teacher, images=1), World(), progress=False)
    with pytest.raises(UserError, match=r"other settings \(seed: 0 -> 1\)"):
        generate(tmp_path, PROMPTS[:1], settings(teacher, images=1, seed=1), World())
    with pytest.raises(UserError, match="prompts: 1 -> 2"):
        generate(tmp_path, PROMPTS[:2], settings(teacher, images=1), World())


@pytest.mark.parametrize(
    "layers, preset", [((19, 38), "flux-dense"), ((8, 38), "flux-lite"), ((3, 3), None)]
)
def test_a_structure_is_known_by_the_papers_name(layers, preset):
    from diffusers import FluxTransformer2DModel

    class Pipe:
        def __call__(self, prompt, num_inference_steps=28):
            raise NotImplementedError

    pipe = Pipe()
    with torch.device("meta"):
        pipe.transformer = FluxTransformer2DModel(
            num_layers=layers[0], num_single_layers=layers[1], guidance_embeds=True
        )
    facts = describe(pipe, Settings("m"))
    assert (facts["preset"], facts["steps"]) == (preset, 28)
    if preset == "flux-dense":
        assert facts["activated_params"] / 1e9 == pytest.approx(11.901, abs=1e-3)


@pytest.mark.long
def test_fidelity_and_a_page(teacher, student, prompts, tmp_path, capsys):
    out, metrics = tmp_path / "out", "fidelity,clip,geneval,mps"
    clip = tiny.clip(tmp_path / "clip")
    assert main(["evaluate", str(student), "--against", str(teacher), "--prompts", str(prompts),
                 "--out", str(out), "--metrics", metrics, "--batch", "2", "--judge",
                 f"clip={clip}", "--judge", f"fidelity.features={clip}", "--judge",
                 f"mps.clip={clip}", "--judge", f"mps.model={tmp_path}/none.safetensors",
                 *OPTIONS]) == 0  # fmt: skip
    scores = json.loads((out / "scores.json").read_text())
    columns = scores["columns"]
    assert set(columns) == {"psnr", "ssim", "latent_mse", "latent_mse_end", "cosine", "cmmd",
                            "fid", "clip"}  # fmt: skip
    for name in ("psnr", "clip"):
        low, high = columns[name]["interval"]
        assert low <= columns[name]["mean"] <= high and len(columns[name]["values"]) == 3
    assert 0 < columns["latent_mse"]["mean"] < columns["latent_mse_end"]["mean"]
    assert columns["fid"]["interval"] is None
    assert columns["clip"]["judges"]["model"]["judge"] == str(clip)
    assert "geneval" in scores["failed"]["geneval"] and "none.sa" in scores["failed"]["mps"]
    page = (out / "report.html").read_text()
    assert "PSNR" in page and "Not computed" in page and "data:image/png" in page
    assert "not computed: geneval: no prompt" in capsys.readouterr().out

    # a teacher against itself is at the top, from the images that are there
    same = ["evaluate", str(teacher), "--against", str(out / "against"), "--prompts", str(prompts),
            "--out", str(tmp_path / "same"), *OPTIONS]  # fmt: skip
    assert main(same) == 0
    again = json.loads((tmp_path / "same" / "scores.json").read_text())["columns"]
    assert again["psnr"]["mean"] == 100 and again["latent_mse"]["mean"] == 0

    # an image that cannot be read is named, and the others are judged
    path = image_path(tmp_path / "same", "00001-0")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert main(same) == 0
    again = json.loads((tmp_path / "same" / "scores.json").read_text())
    assert again["columns"]["psnr"]["images"] == 2
    assert "1 images that cannot be read are left out" in again["failed"]["images"]
    assert str(path) in again["failed"]["images"]
    path.unlink()

    # a second metric joins the first in scores.json
    assert main([*same, "--metrics", "clip", "--judge", f"clip={clip}"]) == 0
    again = json.loads((tmp_path / "same" / "scores.json").read_text())["columns"]
    assert {"psnr", "clip"} <= set(again) and path.read_bytes() == whole

    capsys.readouterr()
    assert main(["evaluate", "--compare", str(out), str(tmp_path / "same"), "--out",
                 str(tmp_path / "both")]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "student" in text and "less student" in text
    assert "Paired differences" in (tmp_path / "both" / "compare.html").read_text()


def test_no_metric_at_all_is_an_error(teacher, prompts, tmp_path, capsys):
    command = ["evaluate", str(teacher), "--prompts", str(prompts), "--out", str(tmp_path / "o")]
    assert main([*command, *OPTIONS]) == 2
    assert "give it with --against" in capsys.readouterr().err
    assert main([*command, "--metrics", "beauty", *OPTIONS]) == 2
    assert "expected some of fidelity, clip" in capsys.readouterr().err
    assert main([*command, "--judge", "clip.eye=x", *OPTIONS]) == 2
    assert "expected ROLE=NAME" in capsys.readouterr().err


def run(*command, wait=True):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out
    return process


@pytest.mark.slow
def test_kill_9_loses_the_batch_under_way_at_most(teacher, prompts, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "distill", "evaluate", teacher, "--against", teacher, "--prompts", prompts,
               "--out", out, "--images", "6", *OPTIONS]  # fmt: skip
    process = run(*command, wait=False)
    while len(pictures(out)) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    made = {p: p.stat().st_mtime_ns for p in (out / "images").glob("*.png")}
    assert 3 <= len(made) < 18
    run(*command)
    assert made == {p: p.stat().st_mtime_ns for p in made} and len(pictures(out)) == 18
    assert json.loads((out / "scores.json").read_text())["columns"]["psnr"]["mean"] == 100


@pytest.mark.slow
def test_two_processes_make_what_one_makes(teacher, student, prompts, tmp_path):
    clip = tiny.clip(tmp_path / "clip")
    tail = ["--against", teacher, "--prompts", prompts, "--metrics", "fidelity,clip", "--judge",
            f"clip={clip}", "--judge", f"fidelity.features={clip}", *OPTIONS]  # fmt: skip
    run("-m", "distill", "evaluate", student, "--out", tmp_path / "one", *tail)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distill",
        "evaluate", student, "--out", tmp_path / "two", *tail)  # fmt: skip
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "scores.json").read_text()) for n in ("one", "two"))
    assert set(one["columns"]) == set(two["columns"])
    for name, column in one["columns"].items():  # judged in other batches
        assert two["columns"][name]["mean"] == pytest.approx(column["mean"], rel=1e-5)
        assert list(two["columns"][name].get("values", ())) == list(column.get("values", ()))
