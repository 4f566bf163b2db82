"""`effective_weight`: each way of hanging things on a Linear equals the same on the dense model."""

import pytest
import torch
from helpers.tiny_flux import DIM, converted, flux_inputs, rel_error
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from d2m_models import MoEFeedForward, effective_weight
from d2m_models.config import MoEConfig

TARGETS = ["net.0.proj", "net.2", "proj_mlp", "proj_out", "to_q"]


def run(model, **kwargs):
    with torch.no_grad():
        return model(**flux_inputs(), **kwargs).sample


def dense_pair():
    dense, model = converted()
    model.set_top_k("dense")
    return dense, model


def lora_state(dense, seed, rank=4):
    """A LoRA in dense-FLUX format over FFNs and attention."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and any(name.endswith(t) for t in TARGETS) and "." in name:
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            for part, shape in shapes.items():
                state[f"transformer.{name}.{part}.weight"] = 0.1 * torch.randn(shape, generator=g)
    assert any("ff.net.0.proj" in k for k in state) and any("proj_mlp" in k for k in state)
    return state


def load_lora(model, state, name):
    model.load_lora_adapter({k: v.clone() for k, v in state.items()}, adapter_name=name)


def test_plain_linear_is_read_directly():
    linear = nn.Linear(4, 6)
    weight, bias = effective_weight(linear)
    assert weight is linear.weight and bias is linear.bias


@pytest.mark.parametrize("hook", ["pre", "post", "forward"])
def test_hooks_run_around_the_use(hook):
    linear, log = nn.Linear(4, 6), []
    if hook == "pre":
        linear.register_forward_pre_hook(lambda m, args: log.append("hook"))
    elif hook == "post":
        linear.register_forward_hook(lambda m, args, out: log.append("hook"))
    else:
        inner = linear.forward
        linear.forward = lambda x: (log.append("hook"), inner(x))[1]
    weight, bias = effective_weight(linear, lambda w, b: (log.append("use"), (w, b))[1])
    assert log == (["use", "hook"] if hook == "post" else ["hook", "use"])
    assert torch.equal(weight, linear.weight) and torch.equal(bias, linear.bias)
    weight.sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones(6, 4))


def test_lora_of_the_dense_model_gives_the_dense_model_plus_lora():
    dense, model = dense_pair()
    state, plain = lora_state(dense, 0), run(dense)
    load_lora(dense, state, "a")
    load_lora(model, state, "a")
    expected = run(dense)
    assert rel_error(expected, plain) > 0.05
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_two_adapters_scales_disabling_and_fusing():
    dense, model = dense_pair()
    states = {"a": lora_state(dense, 0), "b": lora_state(dense, 1)}
    for name, state in states.items():
        load_lora(dense, state, name)
        load_lora(model, state, name)
    outputs = []
    steps = (
        lambda m: m.set_adapters(["a", "b"], weights=[0.5, 1.5]),
        lambda m: m.set_adapters(["b"]),
        lambda m: m.disable_lora(),
        lambda m: m.enable_lora(),
        lambda m: m.fuse_lora(lora_scale=0.7),
        lambda m: m.unfuse_lora(),
    )
    for step in steps:
        step(dense)
        step(model)
        outputs.append(run(dense))
        torch.testing.assert_close(run(model), outputs[-1], rtol=1e-4, atol=1e-5)
    changes = [rel_error(a, b) for a, b in zip(outputs, outputs[1:], strict=False)]
    assert min(changes[:-1]) > 0.01  # unfusing leaves diffusers' scaled adapters: no change
    scaled = {"joint_attention_kwargs": {"scale": 0.3}}
    torch.testing.assert_close(run(model, **scaled), run(dense, **scaled), rtol=1e-4, atol=1e-5)


def test_lora_acts_on_the_routed_path_too():
    dense, model = converted()
    before = run(model)
    layer = model.transformer_blocks[0].ff
    x = torch.randn(5, DIM)
    load_lora(model, lora_state(dense, 0), "a")
    got = layer(x)
    w1, b1 = effective_weight(layer.net[0].proj)
    w2, b2 = effective_weight(layer.net[2])
    merged = MoEFeedForward(plain_ffn(w1, b1, w2, b2), MoEConfig())
    merged.router = layer.router
    torch.testing.assert_close(got, merged(x))
    assert rel_error(run(model), before) > 0.02


def plain_ffn(w1, b1, w2, b2):
    from diffusers.models.attention import FeedForward

    ffn = FeedForward(DIM, DIM, activation_fn="gelu-approximate")
    tensors = {"net.0.proj.weight": w1, "net.0.proj.bias": b1, "net.2.weight": w2, "net.2.bias": b2}
    ffn.load_state_dict(tensors)
    return ffn


def test_lora_files_hold_the_dense_order(tmp_path):
    dense, model = dense_pair()
    state = lora_state(dense, 0)
    load_lora(model, state, "a")
    before = run(model)
    model.save_lora_adapter(tmp_path, "a")
    assert torch.equal(run(model), before)
    file = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(file) == {k.removeprefix("transformer.") for k in state}
    assert all(torch.equal(file[k.removeprefix("transformer.")], v) for k, v in state.items())
    dense.load_lora_adapter(file, prefix=None, adapter_name="a")
    torch.testing.assert_close(run(dense), before, rtol=1e-4, atol=1e-5)


def test_lora_gradients_equal_the_dense_models():
    dense, model = dense_pair()
    state = lora_state(dense, 0)
    grads = []
    for m in (dense, model):
        load_lora(m, state, "a")
        m.train()
        m(**flux_inputs()).sample.square().mean().backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if "lora_" in n})
    order = model.single_transformer_blocks[0].neuron_order.long()
    for name, expected in grads[0].items():
        got = grads[1][name]
        if name == "single_transformer_blocks.0.proj_mlp.lora_B.a.weight":
            expected = expected[order]
        elif "ff" in name or "proj_" in name:
            continue  # other FFN LoRAs lie in other orders
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "options, words", [({"use_dora": True}, "DoRA"), ({"lora_dropout": 0.1}, "lora_dropout")]
)
def test_adapters_that_are_no_weight_delta_are_refused(options, words):
    _, model = converted()
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_mlp"], **options))
    model.train()
    with pytest.raises(RuntimeError, match=words):
        model(**flux_inputs())


def test_lora_on_compressed_adaln_is_refused_by_name():
    _, model = converted(adaln_dim=16)
    state = {"transformer.norm_out.linear.lora_A.weight": torch.zeros(2, DIM)}
    with pytest.raises(ValueError, match="norm_out"):
        model.load_lora_adapter(state, adapter_name="a")


@pytest.mark.parametrize("top_k", ["dense", 2])
def test_fp8_layerwise_casting(top_k):
    """fp8 storage equals rounding the same weights to fp8 and back by hand."""
    dense, model = converted()
    model.set_top_k(top_k)
    exact = run(model)
    rounded = {}
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    layer = model.transformer_blocks[0].ff
    assert layer.net[2].weight.dtype == torch.float8_e4m3fn
    assert layer.router.weight.dtype == torch.float32
    got = run(model)
    assert layer.net[2].weight.dtype == torch.float8_e4m3fn
    for name, tensor in model.state_dict().items():
        rounded[name] = tensor if tensor.dtype == torch.int32 else tensor.float()
    _, by_hand = converted()
    by_hand.load_state_dict(rounded)
    by_hand.set_top_k(top_k)
    torch.testing.assert_close(got, run(by_hand), rtol=1e-5, atol=1e-5)
    assert rel_error(got, exact) > 1e-4


def test_packed_weights_are_refused_with_advice():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(8, 2, dtype=torch.uint8), requires_grad=False)
    layer.register_forward_pre_hook(lambda m, args: None)
    with pytest.raises(RuntimeError, match="modules_to_not_convert"):
        effective_weight(layer)


class Int8Weight(torch.Tensor):
    """A wrapper subclass as torchao makes them: int8 data and a scale, and `dequantize`."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data, scale):
        self.data8, self.scale = data, scale

    @classmethod
    def quantize(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self):
        return self.data8.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"{func} on a packed weight")


def test_quantized_tensors_are_dequantized():
    _, model = converted()
    layer = model.transformer_blocks[0].ff
    weight = layer.net[2].weight.detach()
    packed = Int8Weight.quantize(weight)
    layer.net[2].weight = nn.Parameter(packed, requires_grad=False)
    x = torch.randn(3, DIM)
    got = layer(x)
    layer.net[2].weight = nn.Parameter(packed.dequantize())
    torch.testing.assert_close(got, layer(x))
    assert not torch.equal(packed.dequantize(), weight)
