"""What was saved is found again by a process that has imported nothing yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    UNet2DModel,
)
from helpers.flux_folder import flux_folder

from d2m_models import FluxMoETransformer2DModel, MoEConfig, convert_flux, load_pipeline
from d2m_models import flux as flux_module

ROOT = Path(__file__).parents[2]
SAMPLE = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base: a dense pipeline; moe: its converted transformer."""
    path = tmp_path_factory.mktemp("reload")
    flux_folder(path / "base")
    dense = FluxTransformer2DModel.from_pretrained(path / "base", subfolder="transformer")
    model = convert_flux(dense, MoEConfig(), generator=torch.Generator().manual_seed(0))
    model.register_to_config(origin={"state": "converted", "base": str(path / "base")})
    model.save_pretrained(path / "moe")
    return path


def fresh(code, *arguments, **environment):
    """Runs code in a process of its own; what it has printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_transformer_in_its_pipeline(folder):
    assert type(load_pipeline(folder / "base" / "transformer")).__name__ == "FluxPipeline"


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cat", generator=torch.Generator().manual_seed(0), **SAMPLE).images


def test_the_origin_says_which_pipeline(folder):
    pipe = load_pipeline(folder / "moe")
    assert type(pipe).__name__ == "FluxPipeline"
    assert type(pipe.transformer) is FluxMoETransformer2DModel
    dense = load_pipeline(folder / "base")
    pipe.transformer.set_top_k("dense")
    torch.testing.assert_close(draw(pipe), draw(dense), rtol=1e-4, atol=1e-4)


def test_another_transformer_of_a_whole_pipeline(folder, tmp_path):
    load_pipeline(folder / "moe", folder / "base").save_pretrained(tmp_path / "pipe")
    pipe = load_pipeline(tmp_path / "pipe")
    assert type(pipe.transformer) is FluxMoETransformer2DModel
    dense = load_pipeline(folder / "base" / "transformer", tmp_path / "pipe", dtype=torch.bfloat16)
    assert type(dense.transformer) is FluxTransformer2DModel
    parts = (dense.transformer, dense.vae, dense.text_encoder)
    assert {part.dtype for part in parts} == {torch.bfloat16}


@pytest.mark.parametrize("part", ["transformer", "unet"])
def test_pipelines_of_other_families(tmp_path, part):
    """The class comes from the base's model_index.json, the part's from its own configuration."""
    if part == "transformer":
        model = DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4,
            num_embeds_ada_norm=3, norm_num_groups=4,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
        whole = DiTPipeline(model, vae, DDIMScheduler())
    else:
        model = UNet2DModel(
            sample_size=8, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        whole = DDIMPipeline(model, DDIMScheduler())
    whole.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "alone")
    for pipe in (
        load_pipeline(tmp_path / "whole"),
        load_pipeline(tmp_path / "alone", tmp_path / "whole"),
    ):
        assert type(pipe) is type(whole)
        assert type(getattr(pipe, part)) is type(model)


def test_the_model_says_in_which_dtype(folder, tmp_path):
    model = FluxMoETransformer2DModel.from_pretrained(folder / "moe", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    pipe = load_pipeline(tmp_path / "half", folder / "base")
    assert pipe.vae.dtype == torch.bfloat16
    assert pipe.transformer.single_transformer_blocks[0].router.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("nothing", {}, "nothing does not exist"),
        ("base/transformer/config.json", {}, "is a file"),
        ("base/tokenizer", {}, "has no config.json"),
        ("base/text_encoder", {}, "has neither diffusion_pytorch_model"),
        ("base/transformer", {"base": "moe"}, "base is .*moe, which has no model_index.json"),
        ("moe", {"base": "there/is/none"}, "does not exist"),
        ("moe", {"offload": "model"}, "offload is 'model' on the device cpu"),
    ],
)
def test_what_is_refused(folder, model, options, says):
    options = {k: str(folder / v) if k == "base" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=says):
        load_pipeline(folder / model, **options)


RELOAD = """
import sys, d2m_models
from diffusers import AutoModel, DiffusionPipeline
assert "d2m_models.flux" not in sys.modules
print(type(DiffusionPipeline.from_pretrained(sys.argv[1]).transformer).__name__)
print(type(AutoModel.from_pretrained(sys.argv[1], subfolder="transformer")).__name__)
"""
AUTO = """
import sys
from diffusers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""


@pytest.mark.long
def test_import_d2m_models_suffices(folder, tmp_path):
    load_pipeline(folder / "moe").save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["d2m_models", "FluxMoETransformer2DModel"]
    assert fresh(RELOAD, tmp_path / "pipe").split() == ["FluxMoETransformer2DModel"] * 2


@pytest.mark.slow
def test_automodel_where_nothing_is_imported(folder, tmp_path):
    found = fresh(AUTO, folder / "moe", HF_MODULES_CACHE=str(tmp_path))
    assert found.split() == ["FluxMoETransformer2DModel"]


def test_pipelines_of_before_are_read(folder, tmp_path):
    """They name d2m_models.flux."""
    load_pipeline(folder / "moe").save_pretrained(tmp_path / "pipe")
    path = tmp_path / "pipe" / "model_index.json"
    path.write_text(path.read_text().replace('"d2m_models"', '"d2m_models.flux"'))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe.transformer) is FluxMoETransformer2DModel


def test_what_is_loaded_says_what_it_is(folder, caplog):
    flux_module._warn_once.cache_clear()
    for _ in range(2):
        FluxMoETransformer2DModel.from_pretrained(folder / "base", subfolder="transformer")
        FluxMoETransformer2DModel.from_pretrained(folder / "moe")
    ours = [r.getMessage() for r in caplog.records if r.name == "d2m_models.flux"]
    assert len(ours) == 2  # once each
    assert "holds a dense FLUX" in ours[0] and "convert_flux" in ours[0]
    assert "not distilled" in ours[1] and "d2m distill" in ours[1]


def test_a_trained_or_unknown_origin_says_nothing(folder, tmp_path, caplog):
    model = FluxMoETransformer2DModel.from_pretrained(folder / "moe")
    flux_module._warn_once.cache_clear()
    for origin in (None, {"state": "distilled"}):
        model.register_to_config(origin=origin)
        model.save_pretrained(tmp_path / "model")
        again = FluxMoETransformer2DModel.from_pretrained(tmp_path / "model")
        assert again.config.origin == origin
    assert not [r for r in caplog.records if r.name == "d2m_models.flux"]
