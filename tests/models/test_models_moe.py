"""MoE layers against hand-written formulas, `set_top_k`, and conversion of models by form."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import FeedForward
from helpers.tiny_flux import DIM, converted, moe_by_hand, rel_error
from torch import nn
from torch.nn import functional as F

from d2m_models import MoEConfig, MoEFeedForward, convert, moe_layers, set_top_k

CONFIG = MoEConfig()


def diffusers_ffn(seed=0, **kwargs):
    torch.manual_seed(seed)
    return FeedForward(DIM, DIM, **{"activation_fn": "gelu-approximate", **kwargs})


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 12])
def test_layer_equals_the_formula(top_k):
    ffn = diffusers_ffn()
    layer = MoEFeedForward(ffn, MoEConfig(top_k=top_k, routed_scale=1.5))
    x = torch.randn(2, 7, DIM)
    up, down = ffn.net[0].proj, ffn.net[2]
    expected = moe_by_hand(
        x.flatten(0, 1), layer.router.weight, up.weight, up.bias, down.weight, down.bias,
        top_k, shared=DIM, scale=1.5,
    )  # fmt: skip
    torch.testing.assert_close(layer(x).flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-5)


def test_dense_equals_the_ffn_and_names_are_kept():
    ffn = diffusers_ffn()
    names, x = set(ffn.state_dict()), torch.randn(3, 5, DIM)
    expected = ffn(x)
    layer = MoEFeedForward(ffn, CONFIG)
    layer.top_k = "dense"
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == names | {"router.weight", "neuron_order"}


def test_routing_is_returned_and_can_be_reused():
    layer = MoEFeedForward(diffusers_ffn(), CONFIG)
    x = torch.randn(9, DIM)
    y, routing = layer(x, return_routing=True)
    assert routing.ids.shape == (9, 2) and routing.probs.shape == (9, 12)
    other = torch.randn(9, DIM)
    again, reused = layer(other, routing=routing, return_routing=True)
    assert torch.equal(reused.ids, routing.ids)
    assert not torch.allclose(again, layer(other))
    torch.testing.assert_close(layer(x, routing=routing), y)


def test_masked_tokens_use_the_shared_neurons_only():
    layer = MoEFeedForward(diffusers_ffn(), CONFIG)
    x = torch.randn(2, 6, DIM)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    y = layer(x, token_mask=mask)
    routed = layer(x)
    layer.top_k = 0
    torch.testing.assert_close(y[~mask], layer(x)[~mask])
    torch.testing.assert_close(y[mask], routed[mask])


def test_router_starts_small_and_not_at_zero():
    weight = MoEFeedForward(diffusers_ffn(), CONFIG).router.weight
    assert weight.dtype == torch.float32
    assert 0.017 < weight.std() < 0.023 and weight.mean().abs() < 0.003


def test_set_top_k_by_model_block_and_layer():
    _, model = converted()
    set_top_k(model, 5)
    assert {layer.top_k for layer in moe_layers(model).values()} == {5}
    model.set_top_k({"transformer_blocks.1": 3, "transformer_blocks.0.ff": "dense"})
    got = {name: layer.top_k for name, layer in moe_layers(model).items()}
    assert got["transformer_blocks.1.ff"] == got["transformer_blocks.1.ff_context"] == 3
    assert got["transformer_blocks.0.ff"] == "dense" and got["transformer_blocks.0.ff_context"] == 5
    assert got["single_transformer_blocks.0"] == 5


@pytest.mark.parametrize("bad", [13, -1, 2.0, "all", {"transformer_blocks.9": 1}, {"norm_out": 1}])
def test_bad_top_k_changes_nothing(bad):
    _, model = converted()
    request = bad if isinstance(bad, dict) else {"transformer_blocks.0": 1, "": bad}
    with pytest.raises((ValueError, TypeError), match="top_k"):
        set_top_k(model, {"transformer_blocks.0": 1, **request})
    assert {layer.top_k for layer in moe_layers(model).values()} == {2}


def test_freezing_shared_neurons():
    layer = MoEFeedForward(diffusers_ffn(), CONFIG)
    layer.freeze_shared = True
    layer(torch.randn(20, DIM)).square().sum().backward()
    up, down = layer.linears()
    assert not up.weight.grad[:DIM].any() and not down.weight.grad[:, :DIM].any()
    assert up.weight.grad[DIM:].any() and down.weight.grad[:, DIM:].any()


# ------------------------------------------------------------------------- models known by form


class TimmMlp(nn.Module):
    """timm's layout: fc1, act, drop1, norm, fc2, drop2."""

    def __init__(self, dim, act, drop=0.0, twist=False):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = act
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop2 = nn.Dropout(drop)
        self.twist = twist

    def forward(self, x):
        y = self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        return y + x if self.twist else y


class LlamaMlp(nn.Module):
    """A gate of its own, as in Z-Image and Lumina 2."""

    def __init__(self, dim, act=F.silu):
        super().__init__()
        self.act = act
        self.w1, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(dim, 4 * dim)
        self.w2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM)
        self.proj, self.mlp = nn.Linear(DIM, DIM), mlp

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(self.norm(x))


class SmallDiT(nn.Module):
    def __init__(self, *mlps):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.blocks = nn.ModuleList(Block(m) for m in mlps)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


MLPS = {
    "timm-gelu-tanh": lambda: TimmMlp(DIM, nn.GELU(approximate="tanh")),
    "timm-gelu": lambda: TimmMlp(DIM, nn.GELU()),
    "timm-silu": lambda: TimmMlp(DIM, nn.SiLU()),
    "sequential-relu": lambda: nn.Sequential(
        nn.Linear(DIM, 4 * DIM), nn.ReLU(), nn.Linear(4 * DIM, DIM)
    ),
    "diffusers-geglu": lambda: diffusers_ffn(activation_fn="geglu"),
    "two-linear-swiglu": lambda: LlamaMlp(DIM),
    "two-linear-geglu": lambda: LlamaMlp(DIM, F.gelu),
    "two-linear-geglu-tanh": lambda: LlamaMlp(DIM, nn.GELU(approximate="tanh")),
    "diffusers-swiglu": lambda: diffusers_ffn(activation_fn="swiglu"),
}


@pytest.mark.parametrize("kind", MLPS)
def test_convert_finds_ffns_and_dense_is_exact(kind):
    torch.manual_seed(0)
    model = SmallDiT(MLPS[kind](), MLPS[kind]()).eval()
    names, x = set(model.state_dict()), torch.randn(2, 6, 8)
    expected = model(x)
    order = {"blocks.1.mlp": torch.randperm(4 * DIM)}
    assert convert(model, CONFIG, order) is model
    assert model.d2m_report == {"converted": ["blocks.0.mlp", "blocks.1.mlp"], "skipped": {}}
    added = {f"blocks.{i}.mlp.{n}" for i in (0, 1) for n in ("router.weight", "neuron_order")}
    assert set(model.state_dict()) == names | added
    set_top_k(model, "dense")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    set_top_k(model, 2)
    y = model(x)
    assert 1e-4 < rel_error(y, expected) < 1
    y.square().sum().backward()
    assert model.blocks[0].mlp.router.weight.grad.abs().sum() > 0


def test_convert_a_diffusers_dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    args = (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2]))
    with torch.no_grad():
        expected = model(args[0], timestep=args[1], class_labels=args[2]).sample
        convert(model, CONFIG)
        assert len(model.d2m_report["converted"]) == 2
        set_top_k(model, "dense")
        got = model(args[0], timestep=args[1], class_labels=args[2]).sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_converted_is_named_and_untouched():
    torch.manual_seed(0)
    gelu = nn.GELU(approximate="tanh")
    model = SmallDiT(
        TimmMlp(DIM, gelu), TimmMlp(DIM, gelu, twist=True), TimmMlp(DIM, gelu, drop=0.1),
        TimmMlp(DIM, nn.Tanh()), LlamaMlp(DIM, torch.tanh),
    ).eval()  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    convert(model, CONFIG)
    skipped = model.d2m_report["skipped"]
    assert model.d2m_report["converted"] == ["blocks.0.mlp"]
    assert set(skipped) == {f"blocks.{i}.mlp" for i in (1, 2, 3, 4)}
    assert "does not compute" in skipped["blocks.1.mlp"] and "dropout" in skipped["blocks.2.mlp"]
    assert (
        "act in" in skipped["blocks.3.mlp"]
        and "'geglu', 'geglu_tanh', 'swiglu'" in skipped["blocks.4.mlp"]
    )
    assert [type(b.mlp) for b in model.blocks[1:4]] == [TimmMlp] * 3
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_convert_refuses_what_it_should():
    dense, model = converted()
    mlp = SmallDiT(TimmMlp(DIM, nn.GELU()))
    with pytest.raises(TypeError, match="convert_flux"):
        convert(dense, CONFIG)
    with pytest.raises(TypeError, match="MoEConfig"):
        convert(mlp, 12)
    with pytest.raises(ValueError, match="no FFN"):
        convert(nn.Sequential(nn.Linear(3, 3)), CONFIG)
    with pytest.raises(ValueError, match="240"):  # 64 + 11 x 16 neurons do not make 256
        convert(mlp, MoEConfig(num_experts=11))
    with pytest.raises(ValueError, match="nowhere"):
        convert(mlp, CONFIG, {"nowhere": torch.arange(256)})
    with pytest.raises(ValueError, match="already"):
        convert(convert(mlp, CONFIG), CONFIG)
    with pytest.raises(ValueError, match="no MoE layers"):
        set_top_k(dense, 1)
