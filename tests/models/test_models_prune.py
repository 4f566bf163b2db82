"""The comparators compute what the full model computes without the removed parts."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers.tiny_flux import (
    DIM,
    HIDDEN,
    converted,
    dense_flux,
    flux_inputs,
    mob_flux,
    small_config,
)

from d2m_models import (
    FluxMoETransformer2DModel,
    MoEConfig,
    account,
    convert_flux,
    prune_depth,
    prune_mlp,
    set_top_k,
)
from d2m_models.conversion.flux import ffn_names


def run(model):
    with torch.no_grad():
        return model(**flux_inputs()).sample


def test_pruned_mlp_is_the_shared_expert_alone(tmp_path):
    """Kept neurons = shared neurons: top_k = 0 and Diff-Pruning are then the same function."""
    dense = dense_flux()
    g = torch.Generator().manual_seed(0)
    order = {name: torch.randperm(HIDDEN, generator=g) for name in ffn_names(dense)}
    pruned = prune_mlp(dense, {name: o[:DIM] for name, o in order.items()})
    moe = convert_flux(dense, MoEConfig(), order)
    set_top_k(moe, 0)
    torch.testing.assert_close(run(pruned), run(moe), rtol=1e-5, atol=1e-5)
    assert isinstance(pruned, FluxTransformer2DModel)
    assert pruned.transformer_blocks[0].ff.net[0].proj.weight.shape == (DIM, DIM)
    pruned.save_pretrained(tmp_path)
    again = FluxMoETransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(again), run(pruned))
    held = sum(p.numel() for p in pruned.parameters())
    assert account(pruned).total_params == account(pruned).activated_params == held


def test_mlp_pruning_of_some_ffns_and_twice():
    dense = dense_flux()
    name = "single_transformer_blocks.1"
    first = prune_mlp(dense, {name: torch.arange(0, 200)})
    second = prune_mlp(
        first, {name: torch.arange(100, 200), "transformer_blocks.0.ff": torch.arange(9)}
    )
    direct = prune_mlp(
        dense, {name: torch.arange(100, 200), "transformer_blocks.0.ff": torch.arange(9)}
    )
    assert torch.equal(run(second), run(direct))
    assert second.transformer_blocks[1].ff.net[2].in_features == HIDDEN


def test_mlp_pruning_with_compressed_adaln():
    dense = dense_flux()
    config = small_config(moe=None, adaln_dim=16)
    narrow = convert_flux(dense, config)
    pruned = prune_mlp(narrow, {name: torch.arange(96) for name in ffn_names(dense)})
    assert pruned.config.adaln_dim == 16 and pruned.adaln_down.out_features == 16
    # the activated parameters of 1S12E2A, routers aside
    _, moe = converted(adaln_dim=16)
    routers = 8 * 12 * DIM
    assert account(pruned).activated_params == account(moe).activated_params - routers


def test_depth_pruning_keeps_the_chosen_blocks(tmp_path):
    dense = dense_flux()
    pruned = prune_depth(dense, [1], [3, 0])
    assert type(pruned) is FluxTransformer2DModel
    kept = [dense.transformer_blocks[1], dense.single_transformer_blocks[0]]
    kept.append(dense.single_transformer_blocks[3])
    ours = [*pruned.transformer_blocks, *pruned.single_transformer_blocks]
    for a, b in zip(ours, kept, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    # as the dense model with the other blocks turned into the identity
    for blocks, gone in (
        (dense.transformer_blocks, [0]),
        (dense.single_transformer_blocks, [1, 2]),
    ):
        for i in gone:
            blocks[i].forward = lambda hidden_states, encoder_hidden_states, **_: (
                encoder_hidden_states,
                hidden_states,
            )
    torch.testing.assert_close(run(pruned), run(dense))
    pruned.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(again), run(pruned))


def test_depth_pruning_of_a_moe_model():
    dense, model = converted(dense_double_blocks=(1,), dense_single_blocks=(2,))
    pruned = prune_depth(model, [1], [0, 2, 3])
    assert type(pruned) is FluxMoETransformer2DModel
    assert pruned.d2m_config.dense_double_blocks == (0,)
    assert pruned.d2m_config.dense_single_blocks == (1,)
    set_top_k(pruned, "dense")
    torch.testing.assert_close(
        run(pruned), run(prune_depth(dense, [1], [0, 2, 3])), rtol=1e-5, atol=1e-5
    )
    narrow = prune_mlp(dense, {"single_transformer_blocks.3": torch.arange(40)})
    assert prune_depth(narrow, [0], [3]).config.ff_dims == {"single_transformer_blocks.0": 40}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: prune_mlp(d, {"ff": torch.arange(3)}), "ff"),
        (lambda d: prune_mlp(d, {"single_transformer_blocks.0": torch.tensor([1, 1])}), "0..255"),
        (lambda d: prune_mlp(d, {"single_transformer_blocks.0": torch.tensor([256])}), "0..255"),
        (lambda d: prune_mlp(d, {"single_transformer_blocks.0": torch.rand(3)}), "integer"),
        (lambda d: prune_mlp(convert_flux(d, MoEConfig()), {}), "converted"),
        (lambda d: prune_depth(d, [2], [0]), "double"),
        (lambda d: prune_depth(d, [0], [0, 0]), "twice"),
        (lambda d: prune_depth(mob_flux()[1], [0], [0]), "MoB"),
        (lambda d: prune_depth(torch.nn.Linear(1, 1), [0], [0]), "Linear"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make(dense_flux())
