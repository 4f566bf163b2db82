"""`d2m sample MODEL PROMPT`, through the pipeline of a tiny FLUX."""

import numpy as np
import pytest
from helpers.flux_folder import flux_folder
from PIL import Image

from distill.cli import main
from distill.prompts import image_size

TINY = ("--steps", "1", "--size", "32x48", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    flux_folder(path / "base", guidance=True)
    (path / "tiny.yaml").write_text(
        "dense_double_blocks: []\nnum_layers: 1\nnum_single_layers: 4\n"
    )
    structure = ["--structure", str(path / "tiny.yaml"), "--quiet"]
    assert main(["convert", str(path / "base"), str(path / "moe"), *structure]) == 0
    return path


def sample(folder, model, out, *options):
    return main(["sample", str(folder / model), "a cat", "-o", str(out), *TINY, *options])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_all_experts_draw_what_the_dense_model_draws(folder, tmp_path, capsys):
    assert sample(folder, "base", tmp_path / "dense.png") == 0
    assert sample(folder, "moe", tmp_path / "all.png", "--top-k", "dense") == 0
    assert f"wrote {tmp_path / 'all.png'}" in capsys.readouterr().out
    assert pixels(tmp_path / "all.png").shape == (32, 48, 3)
    assert abs(pixels(tmp_path / "all.png") - pixels(tmp_path / "dense.png")).max() <= 1


def test_an_image_does_not_depend_on_its_batch(folder, tmp_path):
    assert sample(folder, "moe", tmp_path / "two.png", "--batch", "2", "--seed", "4") == 0
    assert sample(folder, "moe", tmp_path / "one.png", "--seed", "5") == 0
    first, second = (pixels(tmp_path / f"two-{i}.png") for i in (0, 1))
    assert (first != second).any()
    assert abs(second - pixels(tmp_path / "one.png")).max() <= 1


def test_what_the_pipeline_is_told(folder, tmp_path, monkeypatch):
    seen = {}

    def call(self, prompt, **options):
        seen.update(options, prompt=prompt, dtype=self.transformer.dtype)
        return type("Out", (), {"images": [Image.new("RGB", (8, 8))]})

    from diffusers import FluxPipeline

    real = FluxPipeline.__call__
    call.__wrapped__ = real
    monkeypatch.setattr(FluxPipeline, "__call__", call)
    options = ("--guidance", "2.5", "--dtype", "bfloat16", "--base", str(folder / "base"))
    assert sample(folder, "moe", tmp_path / "x.png", *options) == 0
    assert (seen["prompt"], seen["guidance_scale"], seen["num_inference_steps"]) == (
        "a cat",
        2.5,
        1,
    )
    assert (seen["height"], seen["width"], str(seen["dtype"])) == (32, 48, "torch.bfloat16")
    assert seen["generator"][0].initial_seed() == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "big"], "--size is 'big'; expected a number of pixels"),
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--offload", "model"], "offload is 'model' on the device cpu"),
        (["--top-k", "99"], "top_k must be in 0..12"),
        (["--base", "nowhere/at/all"], "nowhere/at/all does not exist"),
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, options, says):
    assert sample(folder, "moe", tmp_path / "x.png", *options) == 2
    assert says in capsys.readouterr().err


def test_without_a_prompt(folder, tmp_path, capsys):
    out = ["-o", str(tmp_path / "x.png")]
    assert main(["sample", str(folder / "moe"), *out]) == 2
    assert "wants a PROMPT: d2m sample MODEL PROMPT" in capsys.readouterr().err


def test_sizes():
    assert image_size(None) == {}
    assert image_size("64") == {"height": 64, "width": 64}
    assert image_size("32X48") == {"height": 32, "width": 48}
