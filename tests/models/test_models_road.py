"""The commands around a conversion as a user meets them: what they say, record and refuse."""

import json
import os

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers.flux_folder import flux_folder

from d2m_models.checkpoints.origin import base_pipeline, read_origin
from d2m_models.inspection.card import card
from distill.cli import main

STRUCTURE = "dense_double_blocks: []\nnum_layers: 1\nnum_single_layers: 4\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("road")
    flux_folder(path / "base")
    (path / "tiny.yaml").write_text(STRUCTURE)
    assert main(convert(path, "moe")) == 0
    return path


def convert(path, target, *more):
    structure = ["--structure", str(path / "tiny.yaml"), "--quiet"]
    return ["convert", str(path / "base"), str(path / target), *structure, *more]


def error(capsys, *command):
    assert main(list(map(str, command))) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_conversion_says_that_it_is_untrained_and_what_comes_next(folder, capsys):
    assert main(convert(folder, "again")) == 0
    out = capsys.readouterr().out
    assert "converted, not distilled" in out
    base = folder / "base"
    assert f"d2m prepare photos/ latents/ --model {base}" in out
    assert "d2m distill CONFIG.yaml --plan" in out
    assert f'd2m sample {folder / "again"} "a cat" --base {base}' in out
    origin = read_origin(folder / "again")
    assert origin == {"state": "converted", "base": str(base)}
    readme = (folder / "again" / "README.md").read_text()
    assert "**Converted, not distilled**" in readme and str(folder) not in readme


def test_the_card_of_a_hub_model(folder):
    origin = {
        "state": "distilled", "base": "black-forest-labs/FLUX.1-dev", "preset": "flux-moe-l",
        "stages": [{"stage": "moe", "steps": 7, "lr": 1e-4}], "data": "shards: latents",
    }  # fmt: skip
    text = card(folder / "moe", origin, "owner/flux-moe-l")
    front = text.split("---")[1]
    assert "base_model: black-forest-labs/FLUX.1-dev" in front
    assert "license: other\nlicense_name: flux-1-dev-non-commercial-license" in front
    assert 'load_pipeline("owner/flux-moe-l", base="black-forest-labs/FLUX.1-dev")' in text
    assert "| stage moe | steps 7, lr 0.0001 |" in text and "| data | shards: latents |" in text
    assert "feed-forward" in text and "Distilled" in text


def test_the_base_of_a_source(folder, tmp_path):
    base = folder / "base"
    assert base_pipeline(base) == base_pipeline(base / "transformer") == str(base)
    assert base_pipeline(base, "transformer") == str(base)
    assert base_pipeline(tmp_path) == str(tmp_path.resolve())
    assert base_pipeline("owner/name") == "owner/name"


def test_a_finished_conversion_is_already_there(folder, capsys):
    before = {f: f.stat().st_mtime_ns for f in (folder / "moe").glob("*.safetensors")}
    assert before and main(convert(folder, "moe")) == 0
    assert "already there: " in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in before} == before
    said = error(capsys, *convert(folder, "moe", "--seed", "1"))
    assert "holds another conversion (different: seed)" in said


def test_what_cannot_be_written(folder, capsys, tmp_path):
    path = folder / "tiny.yaml"
    assert "is a file; expected a folder" in error(capsys, *convert(folder, "tiny.yaml"))
    for target in (path / "moe", "/proc/none/moe"):
        said = error(capsys, *convert(folder, target))
        assert f"cannot write {target}: " in said and "stays in" not in said
    if os.geteuid():  # root may write anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "Permission denied" in error(capsys, *convert(folder, closed / "moe"))
    to_dense = ("convert", folder / "moe", folder / "dense", "--to-dense", "--quiet")
    assert main(list(map(str, to_dense))) == 0
    assert "holds a complete model already" in error(capsys, *to_dense)


def test_a_preset_for_another_depth_names_the_option(folder, capsys, tmp_path):
    said = error(capsys, "convert", folder / "base", tmp_path / "x", "--preset", "flux-moe-l")
    assert "the preset flux-moe-l is for 19 double and 38 single blocks" in said
    assert "--structure FILE) with num_layers: 1 and num_single_layers: 4" in said


def test_diff_takes_pipelines_and_tells_its_arguments_apart(folder, capsys, tmp_path):
    small = ("--batch", 1, "--image-tokens", 4, "--text-tokens", 2)
    command = ["diff", folder / "base", folder / "moe", *small]
    assert main(list(map(str, command))) == 0
    assert "transformer_blocks.0" in capsys.readouterr().out
    assert "expected the dense teacher first" in error(
        capsys, "diff", folder / "moe", folder / "base", *small
    )
    assert "expected a dense teacher" in error(
        capsys, "diff", folder / "moe", folder / "moe", *small
    )
    other = FluxTransformer2DModel.load_config(folder / "base" / "transformer")
    torch.manual_seed(0)
    FluxTransformer2DModel.from_config({**other, "joint_attention_dim": 8}).save_pretrained(
        tmp_path / "other"
    )
    said = error(capsys, "diff", tmp_path / "other", folder / "moe", *small)
    assert "joint_attention_dim is 8, the student's 16" in said


def test_the_config_names_the_class_for_automodel(folder):
    config = json.loads((folder / "moe" / "config.json").read_text())
    module, name = config["auto_map"]["AutoModel"].split(".")
    assert f"import {name}" in (folder / "moe" / f"{module}.py").read_text()
