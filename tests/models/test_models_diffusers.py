"""The surfaces a diffusers user relies on: saving, pipelines, offloading, caches, compilation."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from helpers.tiny_flux import JOINT, POOLED, converted, dense_flux, flux_inputs, mob_flux, rel_error

from d2m_models import FluxMoETransformer2DModel, MoEConfig, convert_flux


def run(model, **kwargs):
    with torch.no_grad():
        return model(**flux_inputs(), **kwargs).sample


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": "100KB"},
        {"variant": "fp16"},
        {"max_shard_size": "100KB", "variant": "v"},
    ],
    ids=["whole", "sharded", "variant", "sharded-variant"],
)
def test_save_and_load(tmp_path, options):
    _, model = mob_flux()
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    variant = {"variant": options["variant"]} if "variant" in options else {}
    again = FluxMoETransformer2DModel.from_pretrained(tmp_path, **variant)
    assert again.d2m_config == model.d2m_config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(run(again), run(model))


def test_compressed_adaln_is_saved_too(tmp_path):
    _, model = converted(adaln_dim=16, moe=MoEConfig(0.5, 0.25, 14, 4, routed_scale=2.0))
    model.save_pretrained(tmp_path)
    again = FluxMoETransformer2DModel.from_pretrained(tmp_path)
    assert again.d2m_config.moe == MoEConfig(0.5, 0.25, 14, 4, routed_scale=2.0)
    torch.testing.assert_close(run(again), run(model))


def test_routers_stay_in_fp32_when_loaded_in_bf16(tmp_path):
    _, model = mob_flux()
    model.save_pretrained(tmp_path)
    half = FluxMoETransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, parameter in half.named_parameters():
        expected = torch.float32 if "router" in name else torch.bfloat16
        assert parameter.dtype == expected, name
    assert half.single_transformer_blocks[0].neuron_order.dtype == torch.int32
    with torch.no_grad():
        out = half(**flux_inputs(dtype=torch.bfloat16)).sample
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_config_is_plain_json(tmp_path):
    _, model = mob_flux()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "FluxMoETransformer2DModel"
    assert config["num_layers"] == 3 and config["num_single_layers"] == 4
    assert config["mob"]["double_groups"] == [[1, 2]] and config["moe"]["top_k"] == 2
    twin = FluxMoETransformer2DModel.from_config(model.config)
    assert twin.d2m_config == model.d2m_config


def tiny_pipeline(transformer):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        hidden_size=POOLED, projection_dim=POOLED, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, vocab_size=100,
    )  # fmt: skip
    t5 = T5Config(d_model=JOINT, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=100)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,),
        norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1, scaling_factor=1.5, sample_size=16,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=None,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=None,
        transformer=transformer,
    )


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=torch.randn(1, 5, JOINT, generator=g),
        pooled_prompt_embeds=torch.randn(1, POOLED, generator=g),
        height=16, width=16, num_inference_steps=2, output_type="latent", generator=g,
    ).images  # fmt: skip


def test_flux_pipeline_runs_and_reloads(tmp_path):
    _, model = mob_flux()
    pipe = tiny_pipeline(model)
    images = sample(pipe)
    assert images.isfinite().all()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["d2m_models", "FluxMoETransformer2DModel"]
    again = FluxPipeline.from_pretrained(tmp_path, tokenizer=None, tokenizer_2=None)
    assert type(again.transformer) is FluxMoETransformer2DModel
    torch.testing.assert_close(sample(again), images)


def test_lora_through_the_pipeline():
    dense, model = converted()
    model.set_top_k("dense")
    g = torch.Generator().manual_seed(0)
    state = {}
    for name in ("transformer_blocks.0.ff.net.0.proj", "single_transformer_blocks.1.proj_out"):
        linear = dense.get_submodule(name)
        shapes = {"lora_A": (4, linear.in_features), "lora_B": (linear.out_features, 4)}
        for part, shape in shapes.items():
            state[f"transformer.{name}.{part}.weight"] = 0.2 * torch.randn(shape, generator=g)
    plain, images = sample(tiny_pipeline(dense)), []
    for transformer in (dense, model):
        pipe = tiny_pipeline(transformer)
        pipe.load_lora_weights(dict(state), adapter_name="a")
        images.append(sample(pipe))
    assert rel_error(images[0], plain) > 1e-3
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)


def test_isinstance_and_dense_checkpoint_of_the_dense_class(tmp_path):
    dense, model = converted()
    assert isinstance(model, FluxTransformer2DModel)
    dense.save_pretrained(tmp_path)
    ours = FluxMoETransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(ours), run(dense))


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("top_k", [2, "dense"])
def test_group_offload(level, top_k):
    """On one device the weights do not move, but every hook of the offloading runs."""
    _, model = mob_flux()
    model.set_top_k(top_k)
    expected = run(model)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type=level, **options)
    assert torch.equal(run(model), expected)


class Tracker:
    """Stands for an accelerator: weights are zero unless their Linear's hooks put them in place."""

    def __init__(self, linear):
        self.linear, self.kept = linear, linear.weight.data
        linear.weight.data = torch.zeros_like(self.kept)
        linear.register_forward_pre_hook(self.onload)
        linear.register_forward_hook(self.offload)

    def onload(self, *_):
        self.linear.weight.data = self.kept.clone()

    def offload(self, *_):
        self.linear.weight.data.zero_()  # in place: whoever reads later reads zeros
        self.linear.weight.data = torch.zeros_like(self.kept)


def test_weights_are_used_while_they_are_in_place():
    _, model = converted()
    expected = run(model)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for linear in linears:
        Tracker(linear)
    assert torch.equal(run(model), expected)


def test_model_cpu_offload_hooks():
    from accelerate import cpu_offload

    _, model = converted()
    expected = run(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer_blocks[0].ff.net[2].weight.device.type == "meta"
    torch.testing.assert_close(run(model), expected)


def test_first_block_cache():
    dense, model = converted()
    model.set_top_k("dense")
    outputs = []
    for m in (dense, model):
        m.enable_cache(FirstBlockCacheConfig(threshold=100.0))
        with m.cache_context("cond"):
            first = run(m)
            second = run(m, controlnet_block_samples=[torch.full((2, 12, 64), 0.1)])
        outputs.append((first, second))
    torch.testing.assert_close(outputs[1][0], outputs[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[1][1], outputs[0][1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="disable_cache"):
        model(**flux_inputs(), output_aux=True)
    model.disable_cache()
    model(**flux_inputs(), output_aux=True)


@pytest.mark.parametrize("config", [MagCacheConfig(calibrate=True), TaylorSeerCacheConfig()])
def test_call_counting_caches_are_refused_under_mob(config):
    _, model = mob_flux(single_groups=((1, 2),))  # the last block always runs
    with pytest.raises(ValueError, match="FirstBlockCacheConfig"):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        assert run(model).isfinite().all()


def test_tensor_parallel_is_refused():
    from diffusers import TensorParallelConfig

    _, model = converted()
    with pytest.raises(ValueError, match="FluxMoETransformer2DModel"):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))


def test_attention_backend_and_processors():
    _, model = converted()
    expected = run(model)
    model.set_attention_backend("native")
    torch.testing.assert_close(run(model), expected)
    assert len(model.attn_processors) == 6
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)


def test_ip_adapter_arguments():
    dense, model = converted()
    model.set_top_k("dense")
    g = torch.Generator().manual_seed(0)
    state = ip_adapter_state(dense, g)
    embeds = [torch.randn(2, 1, POOLED, generator=g)]
    outputs = []
    for m in (dense, model):
        m._load_ip_adapter_weights(state)
        outputs.append(run(m, joint_attention_kwargs={"ip_adapter_image_embeds": embeds}))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def ip_adapter_state(dense, g):
    dim, cross = dense.inner_dim, JOINT
    tensors = {}
    for i in range(len(dense.transformer_blocks)):
        for part in ("k", "v"):
            tensors[f"{i}.to_{part}_ip.weight"] = torch.randn(dim, cross, generator=g) / 8
            tensors[f"{i}.to_{part}_ip.bias"] = torch.randn(dim, generator=g) / 8
    projection = {
        "proj.weight": torch.randn(4 * cross, POOLED, generator=g) / 5,
        "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    return [{"ip_adapter": tensors, "image_proj": projection}]


def test_autocast():
    dense, model = converted()
    model.set_top_k("dense")
    exact = run(dense)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(model), run(dense)
    assert rel_error(ours.float(), exact) <= 2 * rel_error(theirs.float(), exact) + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [2, "dense"])
def test_regional_compilation(top_k):
    dense = dense_flux()
    model = convert_flux(dense, MoEConfig())
    model.set_top_k(top_k)
    expected = run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "model"])
def test_checkpointing_and_compilation(whole):
    """Both passes of a compiled block save the same tensors, though the first one routes."""
    _, model = converted()
    model.train()

    def gradients(function):
        model.zero_grad()
        function(**flux_inputs()).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(model)
    model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    if whole:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        compiled = model
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for name, grad in gradients(compiled).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
