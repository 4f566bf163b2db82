"""FFNs among a block's own Linears, and the sizes that fit any FFN."""

import copy
import io

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from helpers.small_dits import build, tensors
from torch import nn
from torch.nn import functional as F

from d2m_models import MoEConfig, MoEShare, convert, moe_layers, set_top_k
from d2m_models.blocks import FluxMoESingleTransformerBlock


class Blocks(nn.Module):
    """A model of nothing but a list of blocks."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *args, **kwargs):
        return [block(*args, **kwargs) for block in self.blocks]


class Inline(nn.Module):
    """Gate, up and down are the block's own; `shared`, `activation` are names of ours."""

    def __init__(self, kind="plain", dim=32, hidden=128):
        super().__init__()
        self.kind, self.shared = kind, 0.5
        self.attn = nn.Linear(dim, dim)
        self.activation, self.drop = nn.SiLU(), nn.Dropout(0.3 if kind == "dropout" else 0)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x, scale=None):
        a = self.attn(x)
        if scale is not None:
            a = a * scale
        if self.kind == "untraceable":
            a = a * len(x)
        h = self.drop(self.activation(self.up(a)))
        if self.kind == "other":
            h = h.roll(1, -1)
        return self.shared * x + self._end(h)

    def _end(self, h):
        return self.down(h)


def test_one_mechanism_gives_flux_blocks_bit_for_bit():
    torch.manual_seed(0)
    dense = FluxSingleTransformerBlock(64, 4, 16).eval()
    flux = FluxMoESingleTransformerBlock(64, 4, 16, moe=MoEConfig()).eval()
    flux.load_state_dict(dense.state_dict(), strict=False)
    model = convert(Blocks(dense), MoEConfig())
    assert model.d2m_report == {"converted": ["blocks.0"], "skipped": {}}
    dense.router.load_state_dict(flux.router.state_dict())
    angles = torch.rand(17, 16)
    inputs = dict(
        hidden_states=torch.randn(2, 12, 64),
        encoder_hidden_states=torch.randn(2, 5, 64),
        temb=torch.randn(2, 64),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )
    with torch.no_grad():
        for top_k in (2, 0, "dense"):
            set_top_k(model, top_k)
            set_top_k(flux, top_k)
            for ours, theirs in zip(dense(**inputs), flux(**inputs), strict=True):
                assert torch.equal(ours, theirs)


def test_a_block_keeps_its_own_forward_names_and_class():
    torch.manual_seed(0)
    model, x = Blocks(Inline(), Inline()).eval(), torch.randn(2, 6, 32)
    names, expected = set(model.state_dict()), model(x, scale=2.0)
    order = torch.randperm(128)
    convert(model, MoEShare(), {"blocks.1": order})
    added = {f"blocks.{i}.{n}" for i in (0, 1) for n in ("router.weight", "neuron_order")}
    assert set(model.state_dict()) == names | added
    block = model.blocks[1]
    assert isinstance(block, Inline) and type(block).__name__ == "Inline"
    assert block.neuron_order.tolist() == order.tolist()
    assert (block.shared, block.expert) == (32, 8)
    set_top_k(model, "dense")
    torch.testing.assert_close(model(x, scale=2.0), expected)
    set_top_k(model, 2)
    routed = model(x, scale=2.0)
    layer = model.blocks[0]
    a = layer.attn(x) * 2
    with torch.no_grad():  # the formula: down(h of the shared and the chosen, weighed)
        logits = (a @ layer.router.weight.t()).topk(2)
        weights = torch.zeros(2, 6, 12).scatter(-1, logits.indices, logits.values.softmax(-1))
        h = F.silu(layer.up(a))
        h = torch.cat([h[..., :32], h[..., 32:] * weights.repeat_interleave(8, -1)], -1)
        torch.testing.assert_close(routed[0], 0.5 * x + layer.down(h))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for again in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(again(x, scale=2.0), routed, strict=True))


@pytest.mark.parametrize(
    "kind, reason",
    [("other", "does not compute"), ("untraceable", "cannot be traced"), ("dropout", "dropout")],
)
def test_a_block_that_is_no_ffn_is_named(kind, reason):
    model = convert(Blocks(Inline(), Inline(kind)), MoEShare())
    assert model.d2m_report["converted"] == ["blocks.0"]
    assert list(model.d2m_report["skipped"]) == ["blocks.1"]
    assert reason in model.d2m_report["skipped"]["blocks.1"]
    assert type(model.blocks[1]) is Inline


def test_gated_beside_attention_with_neurons_in_any_order():
    """OvisImage splits its up Linear by a width of its own, and stacks [up; gate]."""
    model, inputs = build("OvisImageTransformer2DModel")
    with torch.no_grad():
        (expected,) = tensors(model(**inputs))
        name = "single_transformer_blocks.1"
        convert(model, MoEShare(), {name: torch.randperm(256)})
        layer = moe_layers(model)[name]
        assert (layer.activation, layer.gate_first, layer.expert) == ("swiglu", False, 16)
        set_top_k(model, "dense")
        torch.testing.assert_close(tensors(model(**inputs))[0], expected, rtol=1e-5, atol=1e-5)


def test_embedders_are_no_candidates_and_convolutions_are_named():
    model = Blocks(Inline())
    model.time_embed = nn.Sequential(nn.Linear(32, 128), nn.SiLU(), nn.Linear(128, 32))
    assert convert(model, MoEShare()).d2m_report == {"converted": ["blocks.0"], "skipped": {}}
    assert type(model.time_embed) is nn.Sequential
    sana, _ = build("SanaTransformer2DModel")
    with pytest.raises(ValueError, match=r"transformer_blocks.0.ff.*3 convolutions.*mix tokens"):
        convert(sana, MoEShare())


@pytest.mark.parametrize(
    "dim, hidden, sizes",
    [
        (3072, 12288, (3072, 768)),  # the paper's 1S12E2A
        (3072, 8192, (2048, 512)),  # gated, 8/3
        (4096, 11008, (2752, 688)),
        (3840, 10240, (2560, 640)),
        (2048, 6144, (1536, 384)),
        (1024, 6144, (1536, 384)),
        (64, 170, (38, 11)),
    ],
)
def test_a_share_splits_ffns_of_any_ratio(dim, hidden, sizes):
    share = MoEShare()
    shared, expert = share.sizes(dim, hidden)
    assert (shared, expert) == sizes and shared + 12 * expert == hidden
    assert share.of(dim, hidden).sizes(dim, hidden) == sizes
    assert abs((shared + 2 * expert) / hidden - 0.375) < 0.03


def test_what_a_share_refuses():
    for bad in ({"activated": 0}, {"activated": 1.5}, {"top_k": 12}, {"num_experts": 1}):
        with pytest.raises(ValueError, match="MoEShare"):
            MoEShare(**bad)
    with pytest.raises(ValueError, match="8 neurons do not make 12 experts"):
        MoEShare().sizes(4, 8)
