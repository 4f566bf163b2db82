"""More of what a diffusers user does: adapters swapped and saved, caches, schedules, quantizers."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline
from helpers.tiny_flux import (
    converted,
    dense_flux,
    mob_flux,
    random_orders,
    rel_error,
    small_config,
)
from test_models_diffusers import run, tiny_pipeline

from d2m_models import FluxMoETransformer2DModel, MoBConfig, MoEConfig, TopKSchedule, convert_flux
from d2m_models.weights import effective_weight

TARGETS = (
    "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.1.ff_context.net.2",
    "single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.2.proj_out",
    "transformer_blocks.0.attn.to_q",
)  # fmt: skip


def lora_state(dense, seed, prefix="transformer."):
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name in TARGETS:
        linear = dense.get_submodule(name)
        state[f"{prefix}{name}.lora_A.weight"] = 0.3 * torch.randn(
            4, linear.in_features, generator=g
        )
        state[f"{prefix}{name}.lora_B.weight"] = 0.3 * torch.randn(
            linear.out_features, 4, generator=g
        )
    return state


def pair():
    dense, model = converted()
    model.set_top_k("dense")
    return dense, model


def agree(dense, model):
    torch.testing.assert_close(run(model), run(dense), rtol=1e-4, atol=1e-5)


def test_hot_swap():
    dense, model = pair()
    outputs = []
    for m in (dense, model):
        m.load_lora_adapter(lora_state(dense_flux(), 0), adapter_name="a")
        outputs.append(run(m))
        m.load_lora_adapter(lora_state(dense_flux(), 1), adapter_name="a", hotswap=True)
    assert rel_error(outputs[0], run(dense)) > 0.01
    agree(dense, model)
    fresh = pair()[1]
    fresh.load_lora_adapter(lora_state(dense_flux(), 1), adapter_name="a")
    torch.testing.assert_close(run(model), run(fresh))


def test_pipeline_loras_two_adapters_fused_and_unfused():
    dense, model = pair()
    pipes = [tiny_pipeline(m) for m in (dense, model)]
    plain = run(model)
    for pipe in pipes:
        for name, seed in (("a", 0), ("b", 1)):
            pipe.load_lora_weights(lora_state(dense_flux(), seed), adapter_name=name)
        pipe.set_adapters(["a", "b"], adapter_weights=[0.5, 1.5])
    agree(dense, model)
    for pipe in pipes:
        pipe.fuse_lora(lora_scale=0.7, adapter_names=["a"])
    agree(dense, model)
    for pipe in pipes:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    agree(dense, model)
    torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-5)


def test_a_saved_lora_serves_the_dense_model(tmp_path):
    """The way diffusers' training scripts save: peft's state dict, then the pipeline."""
    from peft import LoraConfig, get_peft_model_state_dict

    dense, model = pair()
    targets = ["ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out", "attn.to_q"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, lora_bias=True))
    g = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(model)
    )
    pipe = tiny_pipeline(dense)
    pipe.load_lora_weights(str(tmp_path))
    agree(dense, model)
    again = pair()[1]
    tiny_pipeline(again).load_lora_weights(str(tmp_path))
    agree(again, model)


def test_state_dict_with_adapters_round_trips():
    model = pair()[1]
    model.load_lora_adapter(lora_state(dense_flux(), 0), adapter_name="a")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    key = "single_transformer_blocks.1.proj_mlp.lora_B.a.weight"
    dense_order = lora_state(dense_flux(), 0)["transformer." + key.replace(".a.", ".")]
    assert torch.equal(state[key], dense_order)
    assert not torch.equal(dict(model.named_parameters())[key], dense_order)
    expected = run(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    model.load_state_dict(state)
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize(
    "groups, words",
    [
        ({"double_groups": ((0, 1),)}, "transformer_blocks.0"),
        ({"single_groups": ((2, 3),)}, "single_transformer_blocks.3"),
    ],
)
def test_first_block_cache_wants_the_ends_to_run(groups, words):
    dense = dense_flux()
    model = convert_flux(dense, small_config(mob=MoBConfig(**groups)), random_orders(dense))
    with pytest.raises(ValueError, match=words):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert not model.is_cache_enabled


def test_top_k_schedule_in_a_pipeline():
    _, model = mob_flux()
    pipe = tiny_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    model.register_forward_pre_hook(
        lambda *_: seen.append((model.transformer_blocks[0].ff.top_k,
                                model.single_transformer_blocks[3].top_k))
    )  # fmt: skip
    schedule = TopKSchedule(model, [(0.0, 1), (0.5, {"transformer_blocks": 4}), (0.75, "dense")])
    g = torch.Generator().manual_seed(0)
    embeds = {
        "prompt_embeds": torch.randn(1, 5, 32, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 24, generator=g),
    }
    for _ in range(2):  # the second image starts with few experts again
        pipe(
            **embeds, height=16, width=16, num_inference_steps=4, output_type="latent",
            callback_on_step_end=schedule,
        )  # fmt: skip
    assert seen == 2 * [(1, 1), (1, 1), (4, 1), ("dense", "dense")]
    for bad in ([], [(0.5, 1)], [(0.0, 1), (0.0, 2)], [(0.0, 99)], [(0.0, 1), (1.0, 2)]):
        with pytest.raises(ValueError):
            TopKSchedule(model, bad)


def quantized_pair(tmp_path, config, dense_first=False):
    """A converted model loaded with a quantization config, and the very same, dequantized."""
    _, model = converted(moe=MoEConfig())
    model.save_pretrained(tmp_path)
    return model, FluxMoETransformer2DModel.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )


@pytest.mark.parametrize("top_k", [2, "dense"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_torchao_weight_only(tmp_path, kind, top_k):
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    how = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    exact, model = quantized_pair(tmp_path, TorchAoConfig(how))
    weight = model.transformer_blocks[0].ff.net[0].proj.weight
    assert type(weight) is not torch.nn.Parameter and hasattr(weight, "dequantize")
    for m in (exact, model):
        m.set_top_k(top_k)
    got = run(model)
    _, by_hand = converted(moe=MoEConfig())
    state = {
        n: t.dequantize() if type(t) not in (torch.Tensor, torch.nn.Parameter) else t
        for n, t in model.state_dict().items()
    }
    by_hand.load_state_dict(state)
    by_hand.set_top_k(top_k)
    torch.testing.assert_close(got, run(by_hand), rtol=1e-3, atol=1e-4)
    assert 1e-5 < rel_error(got, run(exact)) < 0.2


def bnb_linear(linear, bits):
    """A Linear as bitsandbytes quantizes it; diffusers itself wants a GPU for loading one."""
    import bitsandbytes as bnb

    if bits == 8:
        packed = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, has_fp16_weights=False
        )
        packed.load_state_dict(linear.state_dict())
    else:
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
        weight = linear.weight.data
        packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        packed.bias = linear.bias
    return packed.to("cpu")


@pytest.mark.parametrize("top_k", [2, "dense"])
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, top_k):
    """The MoE path uses the weights that the quantized Linear's own forward uses."""
    pytest.importorskip("bitsandbytes")
    _, model = converted()
    exact = converted()[1]
    for m in (model, exact):
        m.set_top_k(top_k)
    block = model.transformer_blocks[0].ff
    eye = torch.eye(64)
    for owner, name in ((block.net[0], "proj"), (block.net, "2")):
        linear = owner.get_submodule(name)
        packed = bnb_linear(linear, bits)
        assert not packed.weight.is_floating_point()
        weight, bias = effective_weight(packed)
        assert weight.shape == linear.weight.shape and bias is not None
        if linear.in_features == 64:
            by_itself = (packed(eye) - linear.bias).T  # its forward on unit vectors
            assert rel_error(weight, by_itself) < 0.02
        assert 1e-4 < rel_error(weight, linear.weight) < 0.15
        setattr(owner, name, packed)
        twin = exact.get_submodule("transformer_blocks.0.ff.net")
        target = twin[0].proj if name == "proj" else twin[2]
        target.weight.data = weight.detach().clone()
    torch.testing.assert_close(run(model), run(exact), rtol=1e-4, atol=1e-5)
    block.net[0].proj.register_forward_pre_hook(lambda m, a: None)
    with pytest.raises(RuntimeError, match="quantized and offloaded"):
        run(model)
