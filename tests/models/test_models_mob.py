"""Mixture of Blocks: selection rules, per-sample execution, straight-through gradient."""

import pytest
import torch
from helpers.tiny_flux import DIM, converted, flux_inputs, mob_flux, rel_error
from torch.nn import functional as F

from d2m_models import MixtureOfBlocks, block_features, set_top_k
from d2m_models.mob import pool_tokens, select_blocks


def slice_inputs(inputs, rows):
    return {k: v if k.endswith("ids") else v[rows] for k, v in inputs.items()}


def test_selection_rules():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert select_blocks(logits, 1).tolist() == [[1], [0]]
    assert select_blocks(logits, 2).tolist() == [[1, 3], [0, 1]]
    assert select_blocks(logits, 2, "run").tolist() == [[1, 2], [0, 1]]
    assert select_blocks(logits, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_logits_are_eq_5():
    mob = MixtureOfBlocks(8, 3, alpha=0.25)
    x, c, y = torch.randn(2, 5, 8), torch.randn(2, 4, 8), torch.randn(2, 8)
    pooled = F.layer_norm(torch.cat([x, c], 1).mean(1), (8,))
    logits = 0.25 * mob.token_gate(pooled) + 0.75 * mob.condition_gate(y)
    torch.testing.assert_close(mob.route(x, c, y).probs, logits.softmax(-1))


def run_toy(mob, x, c, y, **kwargs):
    """Blocks that leave a trace: the one at `place` adds 10 ** place to image and text."""
    seen = []

    def run(place, x, c, rows):
        seen.append((place, None if rows is None else rows.tolist()))
        return x + 10.0**place, c + 10.0**place

    return *mob(x, c, y, run, **kwargs), seen


def test_every_sample_runs_its_own_blocks_in_order():
    torch.manual_seed(0)
    mob = MixtureOfBlocks(8, 3, active=2).eval()
    with torch.no_grad():
        mob.condition_gate.weight.zero_()[:, :3] = torch.eye(3)
        mob.token_gate.weight.zero_()
    y = torch.zeros(3, 8)
    y[:, :3] = torch.tensor([[3.0, 2, 1], [1, 2, 3], [3, 1, 2]])
    x, c, routing, seen = run_toy(mob, torch.zeros(3, 5, 8), torch.zeros(3, 2, 8), y)
    assert routing.ids.tolist() == [[0, 1], [1, 2], [0, 2]]
    assert seen == [(0, [0, 2]), (1, [0, 1]), (2, [1, 2])]
    assert x[:, 0, 0].tolist() == c[:, 0, 0].tolist() == [11.0, 110.0, 101.0]


def test_residuals_follow_their_place_whether_the_block_runs_or_not():
    mob = MixtureOfBlocks(8, 3).eval()
    places = []

    def after(place, x):
        places.append(place)
        return x + 1000

    x, *_ = run_toy(mob, torch.zeros(1, 5, 8), torch.zeros(1, 2, 8), torch.ones(1, 8), after=after)
    assert places == [0, 1, 2] and x[0, 0, 0] > 3000


@pytest.mark.parametrize("options", [{}, {"active": 2}, {"active": 2, "select": "run"}])
@pytest.mark.parametrize("train", [False, True])
def test_batch_equals_one_by_one(options, train):
    if options.get("active") == 2:
        options = {**options, "double_groups": (), "single_groups": ((1, 2, 3),)}
    _, model = mob_flux(**options)
    model.train(train)
    inputs = flux_inputs(batch=6)
    with torch.no_grad():
        out = model(**inputs, output_aux=True)
        one_by_one = [model(**slice_inputs(inputs, slice(i, i + 1))).sample for i in range(6)]
    for name, routing in out.aux.mob.items():
        assert len({tuple(ids) for ids in routing.ids.tolist()}) > 1, f"{name}: all chose alike"
    torch.testing.assert_close(out.sample, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_a_group_with_all_blocks_active_is_the_model_without_groups():
    dense, model = mob_flux(active=2, double_groups=((0, 1),), single_groups=((1, 2),))
    set_top_k(model, "dense")
    with torch.no_grad():
        expected = dense(**flux_inputs()).sample
        got = model(**flux_inputs()).sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_straight_through_gradient():
    """Value as without the factor, derivative by p that of the block's contribution."""
    torch.manual_seed(0)
    mob = MixtureOfBlocks(8, 2).train()
    x, c, y = torch.randn(1, 5, 8), torch.randn(1, 2, 8), torch.randn(1, 8)
    g_x, g_c = torch.randn(1, 5, 8), torch.randn(1, 2, 8)
    x_out, c_out, routing, seen = run_toy(mob, x, c, y)
    place = seen[0][0]
    torch.testing.assert_close(x_out, x + 10.0**place)
    ((x_out * g_x).sum() + (c_out * g_c).sum()).backward()
    got = mob.condition_gate.weight.grad.clone()
    mob.zero_grad()
    p = mob.route(x, c, y).probs[0, place]
    (p * 10.0**place * (g_x.sum() + g_c.sum())).backward()
    torch.testing.assert_close(got, mob.condition_gate.weight.grad)
    assert got.abs().sum() > 0 and routing.probs.requires_grad


def test_gradient_reaches_every_router_through_the_model():
    _, model = mob_flux()
    model.train()
    model(**flux_inputs(batch=4)).sample.square().mean().backward()
    for name, parameter in model.mob_routers.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("train", [False, True])
def test_checkpointing_changes_nothing(train):
    _, model = mob_flux()
    model.train(train)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        out = model(**flux_inputs(batch=4), output_aux=True)
        balance = sum(r.probs.square().sum() for r in out.aux.mob.values())
        (out.sample.square().mean() + 0.1 * balance).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], msg=name)


def test_features_of_groups_match_the_teachers_last_block():
    dense, model = mob_flux()
    with block_features(dense, model.d2m_config) as teacher, torch.no_grad():
        dense(**flux_inputs())
        out = model(**flux_inputs(), output_aux=True)
    assert set(out.aux.features) == {
        "transformer_blocks.0", "mob.double.0", "single_transformer_blocks.0", "mob.single.0",
    }  # fmt: skip
    assert set(out.aux.features) <= set(teacher)
    assert teacher["mob.double.0"][0] is teacher["transformer_blocks.2"][0]
    assert teacher["mob.single.0"][1] is teacher["single_transformer_blocks.3"][1]
    assert set(out.aux.mob) == {"mob.double.0", "mob.single.0"}


def test_routing_follows_the_samples_that_ran():
    _, model = mob_flux()
    out = model(**flux_inputs(batch=6), output_aux=True)
    ids = out.aux.mob["mob.single.0"].ids[:, 0].tolist()
    for place in set(ids):
        routing = out.aux.routing[f"single_transformer_blocks.{1 + place}"]
        assert routing.ids.shape[0] == 17 * ids.count(place)


def test_controlnet_under_mob_is_sample_by_sample_too():
    _, model = mob_flux()
    residual = [torch.randn(6, 12, DIM) for _ in range(3)]
    inputs = flux_inputs(batch=6)
    with torch.no_grad():
        got = model(**inputs, controlnet_block_samples=residual).sample
        plain = model(**inputs).sample
        for i in range(6):
            one = slice_inputs(inputs, slice(i, i + 1))
            part = [r[i : i + 1] for r in residual]
            expected = model(**one, controlnet_block_samples=part).sample
            torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-4, atol=1e-5)
    assert rel_error(got, plain) > 0.1


def test_pooling_is_over_image_and_text_tokens():
    x, c = torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    both = torch.cat([x, c], 1).mean(1)
    torch.testing.assert_close(pool_tokens(x, c), F.layer_norm(both, (8,)))


def test_without_groups_there_are_no_mob_routers():
    _, model = converted()
    assert not any("mob" in name for name in model.state_dict())
