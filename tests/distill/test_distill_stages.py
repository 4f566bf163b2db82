"""Importance (6), and what each stage may and may not move."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from d2m_models import FluxMoEConfig, MoBConfig, MoEConfig, moe_layers, set_top_k
from distill.configs.sections import LossConfig, StageConfig, TeacherConfig
from distill.configs.training import TrainConfig
from distill.data.batch import held_out_batch
from distill.data.digits import Digits
from distill.importance import ffn_linears, flow_matching_loss, taylor_importance
from distill.loop.losses import distill_loss
from distill.stages import (
    Distillation,
    ffn_slices,
    prepare_stage,
    run_stage,
)
from distill.students import group_blocks, make_student, measure_importance
from distill.study.measure import predict, relative_mse
from distill.teacher import build_teacher, modulation_inputs

SMALL = TeacherConfig(
    num_layers=2,
    num_single_layers=4,
    heads=2,
    head_dim=8,
    rope=[2, 2, 4],
    train=TrainConfig(steps=1, batch_size=4, lr=1e-3),
)
STRUCTURE = FluxMoEConfig(
    moe=MoEConfig(shared_ratio=1.0, expert_ratio=0.25, num_experts=12, top_k=2),
    dense_double_blocks=(0,),
    adaln_dim=8,
    num_layers=2,
    num_single_layers=4,
)
MOB = MoBConfig(single_groups=((1, 2),))


@pytest.fixture(scope="module")
def digits():
    return Digits("train")


@pytest.fixture(scope="module")
def teacher():
    return build_teacher(SMALL, 0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def importance(teacher, digits):
    return taylor_importance(teacher, [digits.batch(0, 0, 16, "calibrate")])


@pytest.fixture
def student(teacher, digits, importance):
    temb = modulation_inputs(teacher, digits, 128, 0)
    return make_student(teacher, STRUCTURE, importance, temb, 0)


def _snapshot(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


# --- eq. (6) --------------------------------------------------------------------------------


def test_importance_by_hand(teacher, digits, importance):
    batch = digits.batch(0, 0, 16, "calibrate")
    copy = build_teacher(SMALL, 0)
    flow_matching_loss(copy, batch).backward()
    assert set(importance) == set(ffn_linears(teacher))
    ff = copy.transformer_blocks[1].ff_context.net
    single = copy.single_transformer_blocks[2]
    for name, w1, b1, w2 in (
        ("transformer_blocks.1.ff_context", ff[0].proj.weight, ff[0].proj.bias, ff[2].weight),
        (
            "single_transformer_blocks.2",
            single.proj_mlp.weight,
            single.proj_mlp.bias,
            single.proj_out.weight,
        ),
    ):
        F, D = w1.shape
        attention = w2.shape[1] - F  # proj_out: attention columns come first
        for neuron in (0, 3, F - 1):
            expected = (w1.grad[neuron] * w1[neuron]).abs().sum()
            expected += (b1.grad[neuron] * b1[neuron]).abs()
            column = attention + neuron
            expected += (w2.grad[:, column] * w2[:, column]).abs().sum()
            assert importance[name][neuron].item() == pytest.approx(expected.item(), rel=1e-5)


def test_importance_sums_absolute_values_over_batches(teacher, digits):
    batches = [digits.batch(0, i, 16, "calibrate") for i in range(2)]
    both = taylor_importance(teacher, batches)
    each = [taylor_importance(teacher, [b]) for b in batches]
    for name in both:
        torch.testing.assert_close(both[name], each[0][name] + each[1][name])


def test_importance_of_a_batch_in_parts_is_the_batchs(teacher, digits):
    asked = []

    class Source:
        def batch(self, *arguments):
            asked.append(arguments)
            return digits.batch(*arguments)

    whole = measure_importance(teacher, Source(), 2, 0)
    assert [a[1:3] for a in asked] == [(0, 128), (1, 128)]
    parts = measure_importance(teacher, Source(), 2, 0, rows=50)
    assert [a[4] for a in asked[2:5]] == [slice(0, 50), slice(50, 100), slice(100, 128)]
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-7)


def test_modulation_inputs_are_read_in_parts(teacher, digits):
    class Source:
        def batch(self, seed, step, count, stream, rows):
            assert rows.stop - rows.start <= 64
            return digits.batch(seed, step, count, stream, rows)

    batch = digits.batch(3, 0, 150, "calibrate")
    with torch.no_grad():
        expected = teacher.time_text_embed(batch.t * 1000, batch.pooled)
    assert torch.equal(modulation_inputs(teacher, Source(), 150, 3), expected)


def test_importance_needs_the_diffusion_loss_not_kd(teacher, digits, importance):
    """At the teacher's own weights the distillation loss and its gradient are zero."""
    copy = build_teacher(SMALL, 0)
    batch = digits.batch(0, 0, 16, "calibrate")
    with torch.no_grad():
        target = teacher(**batch.inputs()).sample
    distill_loss(target, copy(**batch.inputs()).sample).backward()
    up, _, _ = ffn_linears(copy)["transformer_blocks.1.ff"]
    assert up.weight.grad.abs().max() < 1e-9
    assert importance["transformer_blocks.1.ff"].max() > 1e-9


def test_importance_leaves_the_teacher_as_it_was(teacher, digits):
    before = _snapshot(teacher)
    taylor_importance(teacher, [digits.batch(0, 0, 4)])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with pytest.raises(ValueError, match="no batches"):
        taylor_importance(teacher, [])


# --- students -------------------------------------------------------------------------------


def test_shared_neurons_are_the_most_important(student, importance):
    for name, layer in moe_layers(student).items():
        shared = layer.neuron_order[: layer.shared].long()
        rest = layer.neuron_order[layer.shared :].long()
        assert importance[name][shared].min() >= importance[name][rest].max()


def test_student_without_routing_is_the_teacher(teacher, digits, importance):
    model = make_student(teacher, replace(STRUCTURE, adaln_dim=None), importance, None, 0)
    set_top_k(model, "dense")
    batch = held_out_batch(digits, 64, 0)
    assert relative_mse(predict(teacher, batch), predict(model, batch)) < 1e-10


def test_routers_depend_on_the_seed_alone(teacher, digits, importance):
    temb = modulation_inputs(teacher, digits, 128, 0)
    a, b, c = (make_student(teacher, STRUCTURE, importance, temb, s) for s in (0, 0, 1))
    name = next(k for k in a.state_dict() if k.endswith("router.weight"))
    torch.manual_seed(123)
    assert torch.equal(a.state_dict()[name], b.state_dict()[name])
    assert not torch.equal(a.state_dict()[name], c.state_dict()[name])
    one, two = group_blocks(a, MOB, 0), group_blocks(a, MOB, 0)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


def test_grouping_changes_no_weight(student):
    grouped = group_blocks(student, MOB, 0)
    state = grouped.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    routers = [v for k, v in state.items() if k.startswith("mob_routers.")]
    assert routers and all(v.abs().max() > 0 for v in routers)


# --- stages ---------------------------------------------------------------------------------


def _config(stage, steps=6, weight_decay=0.5, ema=None):
    train = TrainConfig(
        steps=steps,
        batch_size=8,
        lr=1e-3,
        warmup=0,
        schedule="constant",
        weight_decay=weight_decay,
        ema=ema,
        log_every=max(3, steps // 4),
    )
    return StageConfig(stage, train, LossConfig())


def _run(model, teacher, digits, folder, stage, **kwargs):
    run_stage(
        model,
        teacher,
        digits,
        _config(stage, **kwargs),
        folder / stage,
        seed=0,
        first=0,
        parent="test",
        label=stage,
        progress=False,
    )


def _parts(model, state, part):
    """The shared or expert part of every FFN tensor, by name."""
    return {
        f.name: state[f.name].narrow(f.dim, f.start, f.stop - f.start)
        for f in ffn_slices(model, part)
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "frozen", "trained"), [("shared", "experts", "shared"), ("moe", "shared", "experts")]
)
def test_frozen_neurons_stay_bitwise(student, teacher, digits, tmp_path, stage, frozen, trained):
    """Zero gradient is not enough: weight decay (here strong) would move a frozen slice."""
    before = _snapshot(student)
    _run(student, teacher, digits, tmp_path, stage, steps=100, ema=0.9)
    after = student.state_dict()
    old, new = _parts(student, before, frozen), _parts(student, after, frozen)
    assert old and all(torch.equal(old[k], new[k]) for k in old)
    old, new = _parts(student, before, trained), _parts(student, after, trained)
    assert all(not torch.equal(old[k], new[k]) for k in old)
    routers = [k for k in before if k.endswith("router.weight")]
    moved = [not torch.equal(before[k], after[k]) for k in routers]
    assert all(moved) if stage == "moe" else not any(moved)


def test_shared_experts_can_be_trained_along(student):
    assert prepare_stage(student, "moe")
    assert prepare_stage(student, "moe", freeze_shared=False) == []
    assert not any(layer.freeze_shared for layer in moe_layers(student).values())


def test_trained_slices_are_decayed(student, teacher, digits, tmp_path):
    """The part that trains does get weight decay: with it the experts' weights end up smaller."""
    other = deepcopy(student)
    _run(student, teacher, digits, tmp_path / "strong", "moe", weight_decay=20.0)
    _run(other, teacher, digits, tmp_path / "none", "moe", weight_decay=0.0)
    strong, none = (_parts(m, m.state_dict(), "experts") for m in (student, other))
    for name in strong:
        if strong[name].ndim == 2:
            assert strong[name].norm() < 0.95 * none[name].norm(), name


def test_optimizer_starts_fresh_at_each_stage(student, teacher, digits, tmp_path):
    """With stage (a)'s momentum, stage (b) would move shared neurons despite zero gradients."""
    _run(student, teacher, digits, tmp_path, "shared")
    before = _snapshot(student)
    _run(student, teacher, digits, tmp_path, "moe")
    old, new = (_parts(student, s, "shared") for s in (before, student.state_dict()))
    assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.long
def test_mob_stage_freezes_isolated_blocks(student, teacher, digits, tmp_path):
    model = group_blocks(student, MOB, 0)
    before = _snapshot(model)
    _run(model, teacher, digits, tmp_path, "mob", steps=100, ema=0.9)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    isolated = (
        "transformer_blocks.",
        "single_transformer_blocks.0.",
        "single_transformer_blocks.3.",
    )
    assert not [k for k in changed if k.startswith(isolated)]
    for trained in ("single_transformer_blocks.1.", "single_transformer_blocks.2.", "x_embedder."):
        assert any(k.startswith(trained) for k in changed), trained
    assert any(k.startswith("mob_routers.single_groups.0.token_gate") for k in changed)
    prepare_stage(model, "mob", train_isolated=True)
    assert all(p.requires_grad for p in model.parameters())


def test_mob_objective_compares_groups_with_their_last_block(student, teacher, digits):
    from d2m_models import block_features

    model = group_blocks(student, MOB, 0)
    prepare_stage(model, "mob")
    batch = digits.batch(0, 0, 8)
    with torch.no_grad(), block_features(teacher, model.d2m_config) as known:
        teacher(**batch.inputs())
    torch.testing.assert_close(known["mob.single.0"], known["single_transformer_blocks.2"])
    objective = Distillation(teacher, model, digits, LossConfig(), 8, 0, features=["mob.single.0"])
    parts = objective(0)
    assert parts["balance"] >= 0.99 and torch.isfinite(parts["loss"])
    total = parts["distill"] + parts["feature"] + 0.01 * parts["balance"]
    torch.testing.assert_close(parts["loss"], total)


def test_dense_block_in_front_does_not_break_the_loss(teacher, digits, importance):
    """Without AdaLN compression the first block equals the teacher's exactly."""
    model = make_student(teacher, replace(STRUCTURE, adaln_dim=None), importance, None, 0)
    prepare_stage(model, "moe")
    parts = Distillation(teacher, model, digits, LossConfig(), 8, 0)(0)
    assert all(torch.isfinite(v) for v in parts.values())
    parts["loss"].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)


def test_stage_a_runs_shared_experts_alone(student, teacher, digits):
    prepare_stage(student, "shared")
    batch = digits.batch(0, 0, 8)
    ours = student(**batch.inputs()).sample
    set_top_k(student, 0)
    torch.testing.assert_close(ours, student(**batch.inputs()).sample)
    assert Distillation(teacher, student, digits, LossConfig(), 8, 0)(0)["balance"] == 0


def test_distillation_brings_the_student_closer(student, teacher, digits, tmp_path):
    batch = held_out_batch(Digits("test"), 128, 0)
    target = predict(teacher, batch)
    set_top_k(student, 0)
    before = relative_mse(target, predict(student, batch))
    _run(student, teacher, digits, tmp_path, "shared", steps=30, weight_decay=0.0)
    set_top_k(student, 0)
    assert relative_mse(target, predict(student, batch)) < 0.5 * before
