"""Black Forest Labs' single files: the table against diffusers' reading of it, there and back."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from helpers.tiny_flux import converted, dense_flux, flux_inputs, mob_flux, small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2m_models import convert_flux, inspect
from d2m_models.checkpoints.bfl import read_bfl
from d2m_models.checkpoints.convert import convert_checkpoint
from d2m_models.checkpoints.pipelines import load_transformer
from d2m_models.checkpoints.restore import checkpoint_to_dense
from d2m_models.checkpoints.single_file import export
from distill.cli import main

D = 3072  # the width that diffusers' reader assumes; it cuts rows only, so columns can be few


def theirs(width=D, double=2, single=1, head=128, columns=2, guidance=True):
    """A file as Black Forest Labs name and shape it, written down apart from the library's table;
    only with `columns` = `width` can it be a model's."""
    wide = {
        "img_in": width, "txt_in": width, "time_in.in_layer": width, "time_in.out_layer": width,
        "vector_in.in_layer": width, "vector_in.out_layer": width, "final_layer.linear": 8,
        "final_layer.adaLN_modulation.1": 2 * width,
    }  # fmt: skip
    if guidance:
        wide |= {"guidance_in.in_layer": width, "guidance_in.out_layer": width}
    norms = []
    for i in range(double):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}_"
            wide |= {
                f"{at}mod.lin": 6 * width, f"{at}attn.qkv": 3 * width, f"{at}attn.proj": width,
                f"{at}mlp.0": 4 * width, f"{at}mlp.2": width,
            }  # fmt: skip
            norms += [f"{at}attn.norm.query_norm.scale", f"{at}attn.norm.key_norm.scale"]
    for i in range(single):
        at = f"single_blocks.{i}."
        wide |= {
            f"{at}modulation.lin": 3 * width, f"{at}linear1": 7 * width, f"{at}linear2": width,
        }  # fmt: skip
        norms += [f"{at}norm.query_norm.scale", f"{at}norm.key_norm.scale"]
    g = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(n, columns, generator=g) for name, n in wide.items()}
    tensors |= {f"{name}.bias": torch.randn(n, generator=g) for name, n in wide.items()}
    return tensors | {name: torch.randn(head, generator=g) for name in norms}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("guidance", [True, False])
def test_tensors_are_those_that_diffusers_reads(tmp_path, guidance, prefix):
    file = tmp_path / "flux.safetensors"
    tensors = theirs(guidance=guidance)
    beside = {"vae.decoder.conv_in.weight": torch.zeros(2)} if prefix else {}
    save_file({prefix + name: t for name, t in tensors.items()} | beside, file)
    config, found = read_bfl(file)
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), expected[name]) for name in expected)
    assert (config["num_layers"], config["num_single_layers"]) == (2, 1)
    assert config["guidance_embeds"] is guidance
    assert (config["num_attention_heads"], config["out_channels"]) == (24, 8)


def models():
    dense, moe = converted(adaln_dim=16)
    yield "dense", dense
    yield "schnell", dense_flux(guidance=False)
    yield "adaln", moe
    yield "mob", mob_flux()[1]
    half = converted()[1].to(torch.bfloat16)
    half.config["origin"] = {"state": "distilled"}
    yield "bf16", half


def plain(config):
    """As JSON, without what diffusers notes of the place that it was read from."""
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "auto_map"}
    return json.loads(json.dumps(kept))


@pytest.mark.parametrize("name, model", list(models()))
def test_there_and_back(tmp_path, name, model):
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    export(tmp_path / "model", tmp_path / "one.safetensors", "bfl", progress=False)
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        fused = file.get_slice("double_blocks.1.txt_attn.qkv.weight").get_shape()
        assert json.loads(file.metadata()["d2m_config"])["num_layers"] == model.config.num_layers
    assert fused == [3 * 64, 64]
    assert not list(tmp_path.glob(".*"))

    loaded = load_transformer(tmp_path / "one.safetensors")
    saved = load_transformer(tmp_path / "model")
    inputs = flux_inputs(guidance=name != "schnell", dtype=model.dtype)
    with torch.no_grad():  # alike to the last bit or two: the weights lie elsewhere in memory
        torch.testing.assert_close(loaded(**inputs).sample, saved(**inputs).sample)
    assert plain(loaded.config) == plain(model.config)
    assert inspect(tmp_path / "one.safetensors").counts == inspect(tmp_path / "model").counts

    assert main(["export", str(tmp_path / "one.safetensors"), str(tmp_path / "again"),
                 "--format", "diffusers", "--quiet"]) == 0  # fmt: skip
    again, state = load_transformer(tmp_path / "again").state_dict(), saved.state_dict()
    one = loaded.state_dict()
    assert again.keys() == one.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor) and torch.equal(one[key], tensor), key


def test_convert_takes_a_single_file(tmp_path):
    dense = dense_flux()
    dense.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "flux.safetensors", "bfl", progress=False)
    convert_checkpoint(tmp_path / "flux.safetensors", tmp_path / "moe", small_config(), seed=3,
                       progress=False)  # fmt: skip
    g = torch.Generator().manual_seed(3)
    expected = convert_flux(dense, small_config(), generator=g).state_dict()
    found = load_file(tmp_path / "moe" / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(found[name], expected[name]) for name in expected if "router" not in name
    )

    export(tmp_path / "moe", tmp_path / "moe.safetensors", "bfl", progress=False)
    with pytest.raises(ValueError, match="export .* --format diffusers"):
        checkpoint_to_dense(tmp_path / "moe.safetensors", tmp_path / "back", progress=False)
    export(tmp_path / "moe.safetensors", tmp_path / "folder", "diffusers", progress=False)
    checkpoint_to_dense(tmp_path / "folder", tmp_path / "back", progress=False)
    back = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in dense.state_dict().items())


def test_refusals(tmp_path, capsys):
    dense_flux().save_pretrained(tmp_path / "dense")
    one = tmp_path / "one.safetensors"
    tensors = theirs(64, head=16, columns=64)
    save_file(tensors, one)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    lacking = tmp_path / "lacking.safetensors"
    full = theirs(256, head=128, columns=256)
    save_file({n: t for n, t in full.items() if n != "double_blocks.0.img_mlp.2.bias"}, lacking)
    for source, target, words in (
        (one, "a.safetensors", "heads have 16 channels"),
        (other, "a.safetensors", "no single file of FLUX"),
        (lacking, "a.safetensors", "lacks transformer_blocks.0.ff.net.2.bias"),
        (tmp_path / "dense", "folder", "expected NAME.safetensors"),
        (tmp_path / "dense", "other.safetensors", "already exists"),
    ):
        command = ["export", str(source), str(tmp_path / target), "--format", "bfl", "--quiet"]
        assert main(command) == 2
        assert words in capsys.readouterr().err
