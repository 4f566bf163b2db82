"""The ComfyUI node: its denoiser against diffusers' pipeline, its loader against a stand-in for
ComfyUI that has the names and calls the node relies on."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from helpers.tiny_flux import CHANNELS, JOINT, POOLED, converted, dense_flux

from d2m_models.checkpoints.single_file import export

NODE = Path(__file__).resolve().parents[2] / "integrations" / "comfyui" / "__init__.py"


@pytest.fixture
def node():
    spec = importlib.util.spec_from_file_location("comfyui_node", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def latents(height=6, width=8):
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, CHANNELS // 4, height, width, generator=g),
        "timestep": torch.tensor([0.3, 0.8]),
        "context": torch.randn(2, 5, JOINT, generator=g),
        "y": torch.randn(2, POOLED + 3, generator=g),
        "guidance": torch.tensor([3.5, 2.0]),
    }


@torch.no_grad()
def test_denoiser_is_the_pipelines_call_of_the_model(node):
    model = dense_flux()
    given = latents()
    height, width = given["x"].shape[-2:]
    packed = FluxPipeline._pack_latents(given["x"], 2, CHANNELS // 4, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32)
    out = model(
        hidden_states=packed, encoder_hidden_states=given["context"],
        pooled_projections=given["y"][:, :POOLED], timestep=given["timestep"],
        guidance=given["guidance"], img_ids=ids, txt_ids=torch.zeros(5, 3),
    ).sample  # fmt: skip
    expected = FluxPipeline._unpack_latents(out, height * 8, width * 8, 8)
    denoiser = node.Denoiser(model)
    torch.testing.assert_close(denoiser(**given, transformer_options={}), expected)
    assert denoiser.dtype == torch.float32


@torch.no_grad()
def test_odd_sizes_controls_and_what_is_refused(node):
    model = dense_flux()
    denoiser, given = node.Denoiser(model), latents(5, 7)
    out = denoiser(**given)
    assert out.shape == given["x"].shape
    residual = torch.ones(2, 12, 64)
    nothing = {"input": [None, 0 * residual], "output": []}
    torch.testing.assert_close(denoiser(**given, control=nothing), out)
    blocks = denoiser(**given, control={"input": [None, residual], "output": [residual]})
    calls = []
    hooks = [
        model.transformer_blocks[1].register_forward_hook(
            lambda _, args, result: (result[0], result[1] + residual)
        ),
        model.single_transformer_blocks[0].register_forward_hook(
            lambda _, args, result: calls.append(1) or (result[0], result[1] + residual)
        ),
    ]
    torch.testing.assert_close(denoiser(**given), blocks)
    assert calls and not torch.allclose(blocks, out)
    for hook in hooks:
        hook.remove()
    replaced = {"patches_replace": {"dit": {("double_block", 0): None}}}
    with pytest.raises(ValueError, match="double_block"):
        denoiser(**given, transformer_options=replaced)
    with pytest.raises(ValueError, match="ref_latents"):
        denoiser(**given, ref_latents=[torch.zeros(1)])


class Config:
    """As comfy.supported_models_base.BASE."""

    def __init__(self, unet_config):
        self.unet_config = dict(unet_config)

    def set_inference_dtype(self, dtype, manual_cast_dtype):
        self.unet_config["dtype"], self.manual_cast_dtype = dtype, manual_cast_dtype

    def get_model(self, state_dict, prefix="", device=None):
        assert self.unet_config["disable_unet_model_creation"]
        base = torch.nn.Module()
        base.model_config = self
        return base


@pytest.fixture
def comfy(monkeypatch):
    parts = {
        "comfy": {},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "unet_offload_device": lambda: torch.device("cpu"),
        },
        "comfy.model_patcher": {
            "ModelPatcher": lambda model, load_device, offload_device: SimpleNamespace(model=model)
        },
        "comfy.supported_models": {
            "Flux": type("Flux", (Config,), {}), "FluxSchnell": type("FluxSchnell", (Config,), {}),
        },
        "folder_paths": {},
    }  # fmt: skip
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["comfy"], name.split(".")[1], module)
    return sys.modules["folder_paths"]


@torch.no_grad()
def test_the_node_loads_an_exported_file(node, comfy, tmp_path):
    _, moe = converted()
    moe.to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "moe.safetensors", "bfl", progress=False)
    comfy.get_filename_list = lambda kind: [p.name for p in tmp_path.glob("*.safetensors")]
    comfy.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)
    loader = node.NODE_CLASS_MAPPINGS["LoadFluxMoE"]
    (names,) = loader.INPUT_TYPES()["required"]["model"]
    (patcher,) = getattr(loader(), loader.FUNCTION)(model=names[0], top_k=0)
    base = patcher.model
    assert type(base.model_config).__name__ == "Flux"
    assert base.model_config.unet_config["dtype"] == torch.bfloat16
    given = {k: v.bfloat16() for k, v in latents().items()}
    shared_only = base.diffusion_model(**given)
    moe.set_top_k(0)
    torch.testing.assert_close(shared_only, node.Denoiser(moe)(**given))
    (patcher,) = loader().load(names[0], -1)
    assert not torch.equal(patcher.model.diffusion_model(**given), shared_only)
