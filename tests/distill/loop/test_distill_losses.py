"""Eqs. (7-10) against calculations by hand, and one test for each way to get them wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from d2m_kernels import Routing, route
from distill.configs.sections import LossConfig
from distill.errors import ConfigError
from distill.loop.losses import (
    balance_loss,
    distill_loss,
    feature_terms,
    feature_weights,
    mob_terms,
    moe_terms,
    reduce_features,
    total_loss,
)


def feature_loss(teacher, student, distill, reduction="sum"):
    """Eqs. (8-9) of a whole batch, and what went into them, one entry a feature."""
    names, errors_L, norms_L = feature_terms(teacher, student)
    weights_L = feature_weights(distill, errors_L, norms_L)
    loss = reduce_features(weights_L, errors_L, reduction)
    return SimpleNamespace(loss=loss, names=names, errors=errors_L.detach(), weights=weights_L)


def moe_balance(routing, variant="auto"):
    """Of one MoE layer, over its own tokens."""
    terms = moe_terms(routing, variant)
    return terms.loss(terms.load, terms.tokens)


def mob_balance(mob, variant="auto"):
    """Of one MoB group over the batch's samples; probs [B, m], ids [B, kappa]."""
    terms = mob_terms(mob, variant)
    return terms.loss(terms.load, terms.tokens)


def _feature(values):
    return torch.tensor(values, dtype=torch.float32)


# --- eq. (7) --------------------------------------------------------------------------------


def test_distill_loss_by_hand():
    teacher, student = _feature([1.0, 2.0]), _feature([0.0, 4.0])
    assert distill_loss(teacher, student).item() == pytest.approx((1 + 4) / 2)


def test_distill_loss_in_fp32_and_without_teacher_gradient():
    teacher = torch.full((4096,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    student = torch.full((4096,), 1.0625, dtype=torch.bfloat16, requires_grad=True)
    loss = distill_loss(teacher, student)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.0625**2)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


# --- eqs. (8-9) -----------------------------------------------------------------------------


def test_feature_loss_by_hand():
    # layer a: teacher norm 5, error mean((1, 1)^2) = 1; layer b: norm 10, error mean((2, 0)^2) = 2
    teacher = {"a": (_feature([3.0, 4.0]),), "b": (_feature([6.0, 8.0]),)}
    student = {"a": (_feature([2.0, 3.0]),), "b": (_feature([4.0, 8.0]),)}
    distill = torch.tensor(0.5)
    result = feature_loss(teacher, student, distill)
    w_a = 0.5 / 1 * (5 + 10) / (2 * 5)
    w_b = 0.5 / 2 * (5 + 10) / (2 * 10)
    torch.testing.assert_close(result.weights, _feature([w_a, w_b]))
    torch.testing.assert_close(result.errors, _feature([1.0, 2.0]))
    assert result.loss.item() == pytest.approx(w_a * 1 + w_b * 2)
    mean = feature_loss(teacher, student, distill, "mean")
    assert mean.loss.item() == pytest.approx((w_a * 1 + w_b * 2) / 2)


def test_weights_are_detached_so_features_get_gradient():
    """Undetached, w_l ||f_tea - f_stu||^2 is constant in f_stu and its gradient vanishes."""
    teacher = {"a": (torch.randn(2, 3, 4),), "b": (torch.randn(2, 3, 4),)}
    student = {k: (v[0] + torch.randn(2, 3, 4),) for k, v in teacher.items()}
    for (feature,) in student.values():
        feature.requires_grad_(True)
    distill = torch.tensor(0.7, requires_grad=True)
    result = feature_loss(teacher, student, distill)
    result.loss.backward()
    assert distill.grad is None  # not a second path to the output loss either
    for i, (name, (feature,)) in enumerate(student.items()):
        expected = result.weights[i] * 2 * (feature - teacher[name][0]).detach() / feature.numel()
        torch.testing.assert_close(feature.grad, expected)
        assert feature.grad.abs().max() > 0


def test_equal_layers_leave_both_sums():
    """A dense block in front equals the teacher's: its error is 0 and w_l would be infinite."""
    teacher = {"dense": (torch.randn(2, 5),), "a": (torch.randn(2, 5),), "b": (torch.randn(2, 5),)}
    student = {
        "dense": (teacher["dense"][0].clone().requires_grad_(True),),
        "a": ((teacher["a"][0] + 0.3).requires_grad_(True),),
        "b": ((teacher["b"][0] - 0.1).requires_grad_(True),),
    }
    distill = torch.tensor(0.2)
    for reduction in ("sum", "mean"):
        with_dense = feature_loss(teacher, student, distill, reduction)
        without = feature_loss(teacher, {k: student[k] for k in ("a", "b")}, distill, reduction)
        torch.testing.assert_close(with_dense.loss, without.loss)  # L counts live layers only
    assert with_dense.weights[0] == 0
    with_dense.loss.backward()
    for (feature,) in student.values():
        assert feature.grad is None or torch.isfinite(feature.grad).all()
    torch.testing.assert_close(with_dense.weights[1:], without.weights)


def test_all_layers_equal_gives_zero_not_nan():
    teacher = {"a": (torch.randn(3),)}
    result = feature_loss(teacher, {"a": (teacher["a"][0].clone(),)}, torch.tensor(0.0), "mean")
    assert result.loss.item() == 0


def test_double_block_features_are_normalised_separately():
    """Image and text feature of one block are layers of their own, each with its own norm."""
    image, text = torch.full((4,), 100.0), torch.full((4,), 0.1)
    teacher = {"transformer_blocks.0": (image, text)}
    student = {"transformer_blocks.0": (image + 1.0, text + 0.001)}
    distill = torch.tensor(1.0)
    result = feature_loss(teacher, student, distill)
    assert result.names == ("transformer_blocks.0/0", "transformer_blocks.0/1")
    norms = torch.stack([image.norm(), text.norm()])
    shares = result.weights * result.errors
    torch.testing.assert_close(shares, norms.sum() / (2 * norms), rtol=1e-3, atol=0)
    # concatenated, the large image feature would set the text's weight too
    assert shares[1] > 100 * shares[0]


def test_feature_loss_bad_input():
    with pytest.raises(ConfigError, match="'average'"):
        LossConfig(feature_reduction="average")
    with pytest.raises(ValueError, match="no feature named.*x"):
        feature_loss({}, {"x": (torch.zeros(1),)}, torch.tensor(0.0))
    with pytest.raises(ValueError, match="block a has 2 features"):
        pair = (torch.zeros(1), torch.zeros(1))
        feature_loss({"a": pair[:1]}, {"a": pair}, torch.tensor(0.0))


# --- load balancing -------------------------------------------------------------------------


def _routing(logits_TE: torch.Tensor, top_k: int, mask=None) -> Routing:
    """route() with x = one-hot rows, so that the router's columns are the logits."""
    T, E = logits_TE.shape
    return route(torch.eye(T), logits_TE.t().contiguous(), top_k=top_k, token_mask=mask)


def test_moe_balance_by_hand():
    # two tokens, three experts, top-2: token 0 -> {0, 1}, token 1 -> {0, 2}
    logits = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0]])
    g0 = torch.softmax(torch.tensor([2.0, 1.0]), 0)
    g1 = torch.softmax(torch.tensor([3.0, 1.0]), 0)
    g = torch.tensor([[g0[0], g0[1], 0.0], [g1[0], 0.0, g1[1]]])
    n, T, k = 3, 2, 2
    chosen = torch.tensor([2.0, 1.0, 1.0])
    expected = sum((n / (T * k) * chosen[i]) * (g[:, i].sum() / T) for i in range(n))
    assert moe_balance(_routing(logits, 2)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_even_load_gives_one_and_collapse_gives_more():
    E = 4
    even = balance_loss(torch.ones(E), torch.full((8, E), 1 / E))
    assert even.item() == pytest.approx(1.0)
    gate = torch.zeros(8, E)
    gate[:, 0] = 1
    assert balance_loss(torch.tensor([8, 0, 0, 0]), gate).item() == pytest.approx(E)


def test_top1_uses_the_full_softmax():
    """With one choice the paper's g is always 1: its gradient is exactly zero."""
    logits = torch.randn(16, 4, requires_grad=True)
    grad = {}
    for variant in ("weights", "softmax", "auto"):
        (grad[variant],) = torch.autograd.grad(moe_balance(_routing(logits, 1), variant), logits)
    assert grad["weights"].abs().max() == 0
    assert grad["softmax"].abs().max() > 1e-4
    torch.testing.assert_close(grad["auto"], grad["softmax"])


def test_top2_uses_the_papers_weights():
    logits = torch.randn(16, 4, requires_grad=True)
    routing = _routing(logits, 2)
    assert moe_balance(routing) == moe_balance(routing, "weights")
    (grad,) = torch.autograd.grad(moe_balance(routing), logits)
    assert grad.abs().max() > 1e-4


def test_mob_with_one_active_block_has_a_gradient():
    logits = torch.randn(8, 3, requires_grad=True)
    probs = logits.softmax(-1)
    mob = SimpleNamespace(probs=probs, ids=probs.argmax(-1, keepdim=True))
    (grad,) = torch.autograd.grad(mob_balance(mob), logits, retain_graph=True)
    assert grad.abs().max() > 1e-4
    (zero,) = torch.autograd.grad(mob_balance(mob, "weights"), logits, allow_unused=True)
    assert zero is None or zero.abs().max() < 1e-7


def test_mob_balance_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]])
    mob = SimpleNamespace(probs=probs, ids=torch.tensor([[0], [0]]))
    assert mob_balance(mob).item() == pytest.approx(3 * 1.0 * 0.6)
    two = SimpleNamespace(probs=probs, ids=torch.tensor([[0, 1], [0, 2]]))
    g = torch.tensor([[0.7 / 0.9, 0.2 / 0.9, 0], [0.5 / 0.9, 0, 0.4 / 0.9]]).mean(0)
    expected = 3 * (0.5 * g[0] + 0.25 * g[1] + 0.25 * g[2])
    assert mob_balance(two).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("top_k", [1, 2])
def test_masked_tokens_do_not_count(top_k):
    logits = torch.randn(10, 4)
    mask = torch.tensor([True] * 6 + [False] * 4)
    masked = moe_balance(_routing(logits, top_k, mask))
    # the same six tokens alone; the identity input needs as many rows as tokens
    alone = moe_balance(_routing(logits[:6], top_k))
    torch.testing.assert_close(masked, alone)


def test_balance_is_per_layer_not_pooled():
    """Layers that collapse onto different experts look even when they are pooled."""
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    from helpers.ranks import models

    from d2m_models import moe_layers
    from distill.loop.objective import Distillation
    from distill.stages import prepare_stage

    teacher, student, digits = models("moe")
    prepare_stage(student, "moe")
    g = torch.Generator().manual_seed(0)
    for i, layer in enumerate(moe_layers(student).values()):
        way_D = torch.randn(layer.router.weight.shape[1], generator=g)
        with torch.no_grad():  # four of twelve experts have all tokens, two on each side of way_D
            layer.router.weight.zero_()
            for k, sign in enumerate((10, 10, -10, -10)):
                layer.router.weight[(4 * i + k) % 12] = sign * way_D
    objective = Distillation(teacher, student, digits, LossConfig(), 16, 0)
    routing = student(**objective.batch(0).inputs(), output_aux=True).aux.routing
    loads, gates = [], []
    for layer in routing.values():
        ids_TK = layer.ids.long()
        gates.append(torch.zeros(len(ids_TK), 12).scatter(1, ids_TK, layer.weights.detach()))
        loads.append(ids_TK.flatten().bincount(minlength=12))

    def balance(load_E, gate_TE):
        return 12 * (load_E / load_E.sum() * gate_TE.mean(0)).sum().item()

    mean = sum(map(balance, loads, gates)) / len(loads)
    pooled = balance(sum(loads), torch.cat(gates))
    assert len(loads) == 6 and mean > 2.5 and pooled < 1.5
    assert objective(0)["balance"].item() == pytest.approx(mean, rel=1e-4)


def test_bad_variant():
    with pytest.raises(ValueError, match="'gshard'"):
        LossConfig(balance_variant="gshard")


# --- eq. (10) -------------------------------------------------------------------------------


def test_total_loss_by_hand():
    parts = [torch.tensor(v) for v in (0.5, 2.0, 3.0)]
    assert total_loss(*parts, 1.0, 0.01).item() == pytest.approx(0.5 + 2.0 + 0.03)


def test_dead_experts_get_gradient_from_the_softmax_variant_only():
    """An expert nobody chose has g = 0 everywhere: the paper's g cannot bring it back."""
    logits = torch.randn(16, 4)
    logits[:, 3] -= 10
    logits.requires_grad_(True)
    routing = _routing(logits, 2)
    assert not (routing.ids == 3).any()
    (paper,) = torch.autograd.grad(moe_balance(routing), logits, retain_graph=True)
    (softmax,) = torch.autograd.grad(moe_balance(routing, "softmax"), logits)
    assert paper[:, 3].abs().max() == 0
    assert softmax[:, 3].max() < 0  # descent raises its logits
