"""A LoRA fused into the teacher before conversion equals diffusers' own fusing."""

import pytest
import torch
from diffusers import FluxPipeline
from helpers.tiny_flux import dense_flux, small_config
from safetensors.torch import save_file
from test_models_stream import convert, saved_dense, state

from d2m_models.checkpoints.convert import default_lora_scale
from d2m_models.checkpoints.lora_file import fuse_lora, read_lora
from d2m_models.checkpoints.verify import verify_checkpoint

TARGETS = (
    "transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.ff.net.2", "single_transformer_blocks.2.proj_out",
    "single_transformer_blocks.0.norm.linear", "context_embedder",
)  # fmt: skip


def lora_state(dense, form="peft", rank=4):
    g = torch.Generator().manual_seed(3)
    tensors = {}
    names = {"peft": ("lora_A", "lora_B"), "old": ("lora.down", "lora.up")}.get(form, ("", ""))
    for target in TARGETS:
        linear = dense.get_submodule(target)
        for part, shape in zip(
            names, ((rank, linear.in_features), (linear.out_features, rank)), strict=True
        ):
            tensors[f"transformer.{target}.{part}.weight"] = 0.3 * torch.randn(shape, generator=g)
    return tensors


def fused_by_diffusers(dense, folder, name, scale):
    pipe = FluxPipeline(None, None, None, None, None, None, transformer=dense)
    pipe.load_lora_weights(str(folder), weight_name=name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return dense.state_dict()


@pytest.mark.parametrize("kind", ["peft", "old", "alpha", "bias"])
def test_equals_diffusers_fusing(tmp_path, kind):
    dense = dense_flux()
    tensors = lora_state(dense, "old" if kind == "old" else "peft")
    if kind == "alpha":
        tensors.update({f"transformer.{t}.alpha": torch.tensor(2.0) for t in TARGETS})
    if kind == "bias":
        tensors = {
            **tensors,
            **{f"transformer.{t}.lora_B.bias": torch.randn(dense.get_submodule(t).out_features)
               for t in TARGETS},
        }  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    ours = fuse_lora(dense_flux(), read_lora(tmp_path / "lora.safetensors", 0.5)).state_dict()
    theirs = fused_by_diffusers(dense_flux(), tmp_path, "lora.safetensors", 0.5)
    plain = dense_flux().state_dict()
    changed = [name for name in plain if not torch.equal(ours[name], plain[name])]
    assert len(changed) == len(TARGETS) * (2 if kind == "bias" else 1)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_kohya_file(tmp_path):
    """sd-scripts' names and alpha, which diffusers' converter understands."""
    dense = dense_flux()
    linear = dense.transformer_blocks[0].ff.net[0].proj
    a, b = torch.randn(4, linear.in_features), torch.randn(linear.out_features, 4)
    key = "lora_unet_double_blocks_0_img_mlp_0"
    tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
    save_file({**tensors, f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "k.safetensors")
    lora = read_lora(tmp_path / "k.safetensors", 0.5)
    expected = linear.weight + 0.5 * 2.0 / 4 * b @ a
    fuse_lora(dense, lora)
    torch.testing.assert_close(linear.weight.data, expected.detach(), rtol=1e-5, atol=1e-5)


def test_conversion_of_a_fused_teacher(tmp_path):
    dense = saved_dense(tmp_path / "dense")
    save_file(lora_state(dense), tmp_path / "lora.safetensors")
    where = {"lora": tmp_path / "lora.safetensors", "lora_scale": 0.125}
    record = convert(tmp_path / "dense", tmp_path / "moe", small_config(), **where)
    fused = fuse_lora(dense_flux(), read_lora(tmp_path / "lora.safetensors", 0.125))
    found = state(tmp_path / "moe")
    for name, tensor in fused.state_dict().items():
        assert torch.equal(found[name], tensor), name
    verify_checkpoint(tmp_path / "dense", tmp_path / "moe", progress=False, **where)
    with pytest.raises(ValueError, match="another LoRA"):
        verify_checkpoint(tmp_path / "dense", tmp_path / "moe", progress=False)
    other = convert(tmp_path / "dense", tmp_path / "b", small_config(), lora=where["lora"])
    assert record["lora"] != other["lora"] and record["lora"] is not None


def test_scales():
    assert default_lora_scale("hyper-flux-moe-l", None) == 0.125
    assert default_lora_scale("flux-moe-l", None) == 1.0
    assert default_lora_scale("hyper-flux-moe-l", 0.3) == 0.3


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {**s, "transformer.x.lora_magnitude_vector": torch.ones(3)}, "no LoRA of a Lin"),
        (lambda s: dict(list(s.items())[1:]), "A or B is missing"),
        (lambda s: {"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, "changes no transformer"),
        (lambda s: {k.replace("0.attn", "9.attn"): v for k, v in s.items()}, "does not have"),
        (lambda s: {k: v[..., :-1] if "A" in k else v for k, v in s.items()}, "another model"),
    ],
)
def test_refusals(tmp_path, change, words):
    saved_dense(tmp_path / "dense")
    save_file(
        {k: v.contiguous() for k, v in change(lora_state(dense_flux())).items()},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(ValueError, match=words):
        convert(
            tmp_path / "dense", tmp_path / "moe", small_config(),
            lora=tmp_path / "lora.safetensors",
        )  # fmt: skip
    with pytest.raises(ValueError, match="does not exist"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="without a lora"):
        convert(tmp_path / "dense", tmp_path / "moe", small_config(), lora_scale=0.5)
