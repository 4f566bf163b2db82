"""`convert` on other families, built small from their own configurations.

Each: dense recovery exact, a routed forward and backward, parameters accounted.
"""

import pytest
import torch
from helpers.tiny_flux import rel_error
from torch import nn

from d2m_models import MoEConfig, convert, moe_layers, set_top_k
from d2m_models.conversion.any_dit import count_parameters

G = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=G)


def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, caption_projection_dim=64, joint_attention_dim=32,
        pooled_projection_dim=24, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 5, 32),
        "pooled_projections": randn(2, 24), "timestep": torch.tensor([3.0, 700.0]),
    }  # fmt: skip
    # the last block has no text FFN
    return model, lambda m: m(**inputs).sample, MoEConfig(), 5


def z_image():
    from diffusers import ZImageTransformer2DModel

    # int(64 / 3 * 8) = 170 neurons a block: 2 shared + 12 experts of 14
    model = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2,
        n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32, axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )  # fmt: skip
    image, text = [randn(4, 1, 8, 8), randn(4, 1, 8, 8)], [randn(5, 32), randn(7, 32)]
    t = torch.tensor([0.2, 0.7])

    def run(m):
        return torch.stack(m(image, t, text, return_dict=False)[0])

    return model, run, MoEConfig(shared_ratio=2 / 64, expert_ratio=14 / 64, num_experts=12), 4


def lumina2():
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=48, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
        ffn_dim_multiplier=1.0, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=(4, 4, 8),
        axes_lens=(64, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": randn(2, 5, 32),
        "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }  # fmt: skip
    return model, lambda m: m(**inputs).sample, MoEConfig(1.0, 0.25, 12), 4


def flux2():
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    ids = torch.zeros(12, 4)
    ids[:, 1], ids[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    inputs = {
        "hidden_states": randn(2, 12, 4), "encoder_hidden_states": randn(2, 5, 32),
        "timestep": torch.tensor([0.2, 0.7]), "guidance": torch.full((2,), 3.5),
        "img_ids": ids, "txt_ids": torch.zeros(5, 4),
    }  # fmt: skip
    # FLUX.2's expansion is 3: two FFNs in each double block, one in each single block
    return model, lambda m: m(**inputs).sample, MoEConfig(1.0, 0.25, 8), 7


def facebook_dit():
    """facebookresearch/DiT's block: timm's Mlp (or its double) with tanh GELU, adaLN-Zero."""
    try:
        from timm.layers import Mlp
    except Exception:  # not installed, or with a torchvision for another torch
        from test_models_moe import TimmMlp

        def Mlp(dim, hidden_features, act_layer, drop):
            return TimmMlp(dim, act_layer(), drop)

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.attn = nn.MultiheadAttention(dim, 4, batch_first=True)
            act = lambda: nn.GELU(approximate="tanh")  # noqa: E731
            self.mlp = Mlp(dim, hidden_features=4 * dim, act_layer=act, drop=0)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

        def forward(self, x, c):
            a, b, g, d, e, h = (m[:, None] for m in self.adaLN_modulation(c).chunk(6, dim=1))
            y = self.norm1(x) * (1 + b) + a
            x = x + g * self.attn(y, y, y)[0]
            return x + h * self.mlp(self.norm2(x) * (1 + e) + d)

    class DiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.t_embedder = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
            self.blocks = nn.ModuleList(Block(64) for _ in range(2))

        def forward(self, x, t):
            for block in self.blocks:
                x = block(x, self.t_embedder(t))
            return x

    x, t = randn(2, 9, 64), randn(2, 16)
    return DiT(), lambda m: m(x, t), MoEConfig(), 2


@pytest.mark.parametrize("family", [sd3, z_image, lumina2, flux2, facebook_dit])
def test_family(family):
    torch.manual_seed(0)
    model, run, config, count = family()
    model.eval()
    with torch.no_grad():
        expected = run(model)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    orders = {}
    convert(model, config)
    report = model.d2m_report
    assert len(report["converted"]) == count, report
    for name, layer in moe_layers(model).items():
        orders[name] = torch.randperm(layer.neuron_order.numel(), generator=G)
    assert set(orders) == set(report["converted"])

    set_top_k(model, "dense")
    with torch.no_grad():
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    # the same with every FFN's neurons in a random order
    torch.manual_seed(0)
    permuted = family()[0].eval()
    permuted.load_state_dict(dense)
    convert(permuted, config, orders)
    set_top_k(permuted, "dense")
    with torch.no_grad():
        torch.testing.assert_close(run(permuted), expected, rtol=1e-5, atol=1e-5)
    moved = [n for n, t in dense.items() if not torch.equal(t, permuted.state_dict()[n])]
    assert len(moved) >= 2 * count
    total = sum(t.numel() for t in dense.values())
    routers = sum(layer.router.weight.numel() for layer in moe_layers(permuted).values())
    held = sum(p.numel() for p in permuted.parameters())
    assert count_parameters(permuted) == (held, held) and held <= total + routers

    set_top_k(permuted, 2)
    y = run(permuted)
    assert 1e-5 < rel_error(y, expected) < 1
    y.square().sum().backward()
    for name, layer in moe_layers(permuted).items():
        up, down = layer.linears()
        for linear in (layer.router, up, down):
            grad = linear.weight.grad
            assert grad is not None and grad.isfinite().all() and grad.any(), name
    idle = 0
    for layer in moe_layers(permuted).values():
        gated = layer.activation in ("geglu", "swiglu")
        up, down = layer.linears()
        dim = down.out_features
        per_neuron = (2 if gated else 1) * (dim + (up.bias is not None)) + dim
        idle += (layer.num_experts - 2) * layer.expert * per_neuron
    assert count_parameters(permuted) == (held, held - idle)


def test_flux2_routes_by_the_formula():
    """A fused block with all but one expert's neurons zeroed equals that expert alone."""
    model, run, config, _ = flux2()
    convert(model.eval(), config)
    names = [n for n in model.d2m_report["converted"] if n.startswith("single")]
    assert names == [f"single_transformer_blocks.{i}.attn" for i in range(3)]
    layer = moe_layers(model)[names[0]]
    x = randn(1, 6, 64)
    with torch.no_grad():
        layer.top_k = 1
        chosen = layer.choose(x).ids[:, 0].tolist()
        whole = layer(x)
        layer.top_k = "dense"
        kept = layer.to_out.weight.clone()
        for token, expert in enumerate(chosen):
            first = layer.inner_dim + layer.shared
            mask = torch.zeros(kept.shape[1], dtype=torch.bool)
            mask[:first] = True
            mask[first + expert * layer.expert : first + (expert + 1) * layer.expert] = True
            layer.to_out.weight.copy_(kept * mask)
            torch.testing.assert_close(layer(x)[0, token], whole[0, token], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named_in_flux2():
    model = flux2()[0]
    with pytest.raises(ValueError, match=r"single_transformer_blocks.0.attn.*ratio 3"):
        convert(model, MoEConfig())
