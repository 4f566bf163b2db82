"""End to end: images -> `d2m prepare` -> `d2m distill` from the shards -> a student that loads."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")
yaml = pytest.importorskip("yaml")

from helpers.flux_folder import LENGTH, flux_folder, image_folder
from helpers.ranks import environment, torchrun

from d2m_models.checkpoints.load import load_model
from distill.cli import main
from distill.configs.sections import DataConfig
from distill.data.sources import open_source
from distill.errors import UserError
from distill.loop.progress import read_log

TRAIN = {"batch_size": 4, "micro_batch": 1, "lr": 1e-3, "warmup": 1, "log_every": 1}


def _config(tmp_path, flux, **data):
    config = {
        "out": str(tmp_path / "run"),
        "teacher": {"path": str(flux)},
        "data": {
            "name": "shards",
            "folder": str(tmp_path / "latents"),
            "timesteps": "flux-shift",
            "max_sequence_length": LENGTH,
            "max_bad_shards": 0,
            **data,
        },
        "student": {
            "structure": {
                "moe": {"shared_ratio": 1.0, "expert_ratio": 0.5, "num_experts": 6, "top_k": 2},
                "dense_double_blocks": [],
                "adaln_dim": 8,
                "mob": {"double_groups": [], "single_groups": [[1, 2]]},
            },
            "importance_batches": 1,
            "calibration": 16,
        },
        "stages": [
            {"stage": "shared", "train": {"steps": 2, **TRAIN}},
            {"stage": "moe", "train": {"steps": 2, **TRAIN}},
            {"stage": "mob", "train": {"steps": 4, "preview_every": 4, **TRAIN}},
        ],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.long
@pytest.mark.parametrize("guidance", [False, True])
def test_from_images_to_a_student(tmp_path, guidance, capsys):
    flux = flux_folder(tmp_path / "flux", guidance=guidance)
    images = image_folder(tmp_path / "images")
    prepare = ["prepare", str(images), str(tmp_path / "latents"), "--model", str(flux)]
    prepare += ["--size", "64", "--shard-mb", "0.01", "--device", "cpu"]
    if guidance:  # once with cached embeddings, once with the encoders running
        prepare += ["--text-embeddings", "--max-sequence-length", str(LENGTH)]
    assert main(prepare) == 0
    text = {} if guidance else {"text_encoders": str(flux), "caption_dropout": 0.2}
    config = _config(tmp_path, flux, **text)
    assert main(["distill", str(config), "--device", "cpu"]) == 0, capsys.readouterr().err
    student = load_model(tmp_path / "run" / "model")
    source = open_source(DataConfig(**yaml.safe_load(config.read_text())["data"]), student, "cpu")
    batch = source.batch(0, 0, 2)
    assert (batch.guidance is not None) == guidance
    with torch.no_grad():
        out = student(**batch.inputs()).sample
    assert out.shape == batch.x0.shape and out.isfinite().all()
    # every stage has moved the weights that it may move
    for stage, steps in (("shared", 2), ("moe", 2), ("mob", 4)):
        log = (tmp_path / "run" / stage / "log.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["step"] == steps
    # a preview: pictures where the VAE is at hand, else latents
    name = "step-0000004." + ("safetensors" if guidance else "png")
    preview = tmp_path / "run" / "mob" / "previews" / name
    assert preview.exists()
    if not guidance:
        from PIL import Image

        with Image.open(preview) as picture:
            sizes = {(10 * w, h) for h, w in ((64, 64), (48, 80), (96, 48))}
            assert picture.size in sizes
            assert len(np.unique(np.asarray(picture))) > 8
    # other data under the same name is noticed
    (tmp_path / "latents").rename(tmp_path / "before")
    assert main([*prepare, "--seed", "1", "--latents", "sample"]) == 0
    capsys.readouterr()
    assert main(["distill", str(config), "--device", "cpu"]) == 2
    assert '\'"data": ' in capsys.readouterr().err


def _flip_bits(shard):
    """Every sample of the file is damaged; its size and header are not."""
    data = bytearray(shard.read_bytes())
    for at in range(int.from_bytes(data[:8], "little") + 8, len(data), 16):
        data[at] ^= 1
    shard.write_bytes(data)


@pytest.mark.slow
def test_two_ranks_learn_the_same(tmp_path):
    flux = flux_folder(tmp_path / "flux")
    images = image_folder(tmp_path / "images")
    prepare = ["prepare", str(images), str(tmp_path / "latents"), "--model", str(flux)]
    assert main([*prepare, "--size", "64", "--shard-mb", "0.01", "--device", "cpu"]) == 0
    _flip_bits(tmp_path / "latents" / "shard-00001.safetensors")
    config = _config(tmp_path, flux, text_encoders=str(flux), caption_dropout=0.2, max_bad_shards=1)
    command = ["distill", str(config), "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    run = subprocess.Popen(
        torchrun(2, "-m", "distill", *command, str(tmp_path / "two")),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = run.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, 9)
        raise AssertionError(f"hung: {run.communicate()[0][-3000:]}") from None
    assert run.returncode == 0, output[-3000:]
    logs = {
        name: [
            entry
            for stage in ("shared", "moe", "mob")
            for entry in read_log(tmp_path / name / stage / "log.jsonl")
        ]
        for name in ("one", "two")
    }
    for entries in logs.values():  # found by the rank that read it, told by the one that logs
        assert entries[-1]["bad_shards"] == 1
    losses = {
        name: [[entry[key] for key in ("loss", "feature", "balance")] for entry in entries]
        for name, entries in logs.items()
    }
    assert len(losses["one"]) == 2 + 2 + 4
    torch.testing.assert_close(
        torch.tensor(losses["two"]), torch.tensor(losses["one"]), rtol=1e-4, atol=1e-6
    )


def test_a_model_of_other_sizes_is_refused(tmp_path):
    from diffusers import FluxTransformer2DModel

    flux = flux_folder(tmp_path / "flux")
    images = image_folder(tmp_path / "images", 3)
    command = ["prepare", str(images), str(tmp_path / "latents"), "--model", str(flux)]
    assert main([*command, "--size", "64", "--device", "cpu"]) == 0
    other = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    data = DataConfig(name="shards", folder=str(tmp_path / "latents"), text_encoders=str(flux))
    with pytest.raises(UserError, match=r"\(16, 24, 12\), shards are \(16, 16, 12\)"):
        open_source(data, other)
