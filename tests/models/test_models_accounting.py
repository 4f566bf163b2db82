"""Counts against the published ones, against real modules, and against torch's FLOP counter."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers.tiny_flux import converted, dense_flux, flux_inputs, mob_flux, small_config
from torch.utils.flop_counter import FlopCounterMode

from d2m_models import (
    PRESETS,
    FluxMoEConfig,
    FluxMoETransformer2DModel,
    MoEConfig,
    account,
    convert_flux,
    prune_mlp,
    set_top_k,
)
from d2m_models.conversion.flux import ffn_names

DENSE = FluxMoEConfig(moe=None)
# arXiv 2510.09094: Table 1 column "activated", and an independent count of the same models
FAMILIES = {"dense": 11.901, "flux-lite": 8.163, "flux-mini": 3.179}
STRICT = {"flux-moe-l": 5.625, "flux-moe-m": 4.207, "flux-moe-s": 3.386, "flux-moe-xs": 2.838}
PAPER = {"flux-moe-l": 5.15, "flux-moe-m": 4.01, "flux-moe-s": 3.19, "flux-moe-xs": 2.64}
FLOPS_FULL = {"dense": 74.36, "flux-moe-l": 50.88, "flux-moe-m": 42.18, "flux-moe-s": 31.75}
FLOPS_HALF = {"dense": 66.93, "flux-moe-l": 43.44, "flux-moe-m": 36.05, "flux-moe-xs": 21.26}


def preset(name):
    return DENSE if name == "dense" else PRESETS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_families(name):
    assert round(account(preset(name)).total_params / 1e9, 3) == FAMILIES[name]


@pytest.mark.parametrize("name", STRICT)
def test_moe_family_strict_and_by_the_papers_convention(name):
    a = account(name)
    assert a.activated_params / 1e9 == pytest.approx(STRICT[name], rel=5e-4)
    assert a.activated_params_paper / 1e9 == pytest.approx(PAPER[name], rel=5e-3)
    assert a.total_params / 1e9 == pytest.approx(8.928, rel=5e-4)


def test_flops_full_and_half_attention():
    for name, tera in FLOPS_FULL.items():
        assert account(preset(name)).flops / 1e12 == pytest.approx(tera, rel=2e-3), name
    for name, tera in FLOPS_HALF.items():
        got = account(preset(name)).flops_half_attention / 1e12
        assert got == pytest.approx(tera, rel=2e-3), name


def test_full_size_model_on_meta_has_the_counted_parameters():
    with torch.device("meta"):
        dense = FluxTransformer2DModel(guidance_embeds=True)
        xs = FluxMoETransformer2DModel(guidance_embeds=True, **PRESETS["flux-moe-xs"].to_dict())
    for model, config in ((dense, DENSE), (xs, PRESETS["flux-moe-xs"])):
        held = sum(p.numel() for p in model.parameters())
        assert account(model).total_params == held == account(config).total_params


@pytest.mark.parametrize("guidance", [True, False])
def test_small_models_have_the_counted_parameters(guidance):
    dense = dense_flux(guidance=guidance)
    _, moe = converted(adaln_dim=16)
    _, mob = mob_flux()
    for model in (dense, moe, mob):
        assert account(model).total_params == sum(p.numel() for p in model.parameters())


def counted_flops(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def test_dense_flops_agree_with_torchs_counter_on_meta():
    with torch.device("meta"):
        model = dense_flux()
        inputs = {k: v.to("meta") for k, v in flux_inputs(1, image=64, text=16).items()}
    a = account(model, image_tokens=64, text_tokens=16)
    assert counted_flops(model, inputs) == pytest.approx(a.flops, rel=1e-3)


def test_full_size_flops_agree_with_torchs_counter_on_meta():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }
    assert counted_flops(model, inputs) == pytest.approx(account(DENSE).flops, rel=1e-3)


def test_pruned_flops_agree_with_torchs_counter_on_meta():
    """The closed form for other FFN widths (as a shared expert has) and for narrow AdaLN."""
    narrow = convert_flux(dense_flux(), small_config(moe=None, adaln_dim=16))
    keep = {name: torch.arange(64) for name in ffn_names(narrow)}
    model = prune_mlp(narrow, keep).to("meta")
    inputs = {k: v.to("meta") for k, v in flux_inputs(1, image=64, text=16).items()}
    a = account(model, image_tokens=64, text_tokens=16)
    assert counted_flops(model, inputs) == pytest.approx(a.flops, rel=1e-3)


def test_routed_flops():
    """k experts of F_e neurons cost 4 D k F_e a token more than none, and nothing else."""
    _, model = converted()
    at = {"image_tokens": 64, "text_tokens": 16}
    set_top_k(model, 0)
    none = account(model, **at)
    set_top_k(model, 3)
    tokens = 2 * 80 + 4 * 80  # two streams of 64 and 16, and four single blocks
    assert account(model, **at).flops - none.flops == 4 * 64 * 3 * 16 * tokens


@pytest.mark.parametrize("top_k", [0, 2, 5])
def test_routed_params_follow_top_k(top_k):
    _, model = converted()
    set_top_k(model, top_k)
    neurons = 64 + top_k * 16
    ffns = 2 * 2 + 4
    gone = ffns * (256 - neurons) * (2 * 64 + 1)
    assert account(model).activated_params == account(model).total_params - gone
    set_top_k(model, "dense")
    assert account(model).activated_params == account(model).total_params


def test_mob_runs_kappa_of_m():
    one, two = mob_flux(active=1)[1], mob_flux(active=2)[1]
    saved = account(two).flops - account(one).flops
    whole = account(two)
    # one more double block of 2, one more single block of 3
    assert 0.2 * whole.flops < saved < 0.5 * whole.flops
    assert account(two).total_params == account(one).total_params


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: account("flux-moe-l", height=1000), "multiples of 16"),
        (lambda: account("flux-moe-l", text_tokens=-1), "text_tokens"),
        (lambda: account("flux-moe-l", image_tokens=0), "image_tokens"),
        (lambda: account("flux"), "preset"),
        (lambda: account(torch.nn.Linear(2, 2)), "Linear"),
        (lambda: account(MoEConfig(num_experts=3)), "12288"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
