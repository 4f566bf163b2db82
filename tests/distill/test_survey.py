"""The survey's closed forms on layers whose best configuration is known."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from d2m_models.config import MoEConfig
from d2m_models.conversion.formation import FFNRecord
from d2m_models.conversion.least_squares import least_squares, token_clusters, unexplained
from d2m_models.conversion.start import FORMATIONS
from d2m_models.partition import cluster_neuron_order
from distill.errors import UserError
from distill.survey.ffn import Sample, survey_ffn
from distill.survey.groups import Tokens, gated_least_squares, survey_group
from distill.survey.run import suggest

D, E, H = 16, 4, 16  # 4 kinds of tokens, each with 16 neurons of its own: F = 64 = 4 D


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def samples(n, mixture, seed):
    """Tokens and activations: neurons of kind c fire for tokens of kind c alone (a true mixture),
    or all neurons are linear in x (a layer that needs no neurons)."""
    kind = torch.arange(n) % E
    x = randn(n, D, seed=seed) + 6 * torch.eye(E, D)[kind]
    h = torch.relu(x @ randn(D, E * H, seed=7) / D**0.5) if mixture else x @ randn(D, E * H, seed=7)
    if mixture:
        h = h * torch.eye(E)[kind].repeat_interleave(H, dim=1)
        h = h[:, torch.randperm(E * H, generator=torch.Generator().manual_seed(3))]
    return Sample.of(FFNRecord(x, h), randn(D, E * H, seed=9))


MOE = MoEConfig(shared_ratio=0.0, expert_ratio=1.0, num_experts=E, top_k=1)


def survey(mixture):
    fit, judge = samples(2000, mixture, 1), samples(1000, mixture, 2)
    w2 = randn(D, E * H, seed=9)
    return survey_ffn(fit, judge, w2, [0.5, 1.0, 4.0], [MOE], torch.Generator().manual_seed(0))


def test_a_true_mixture_is_found_and_wins():
    found = survey(mixture=True)
    best = {m["formation"]: m["error"] for m in found["mixtures"]}
    assert set(best) == set(FORMATIONS)
    assert best["clusters"] < 1e-3 and best["copies"] < 1e-3  # exact but for the ridge
    assert best["coactivation"] < 0.1 and best["taylor"] > 0.1
    assert found["pruned"][1.0] > 0.1
    assert found["pruned"][4.0] < 1e-3  # all neurons: nothing is lost
    assert found["linear"] > 0.2
    assert all(m["pruned"] == found["pruned"][1.0] for m in found["mixtures"])


def test_where_a_linear_map_does_pruning_ties():
    found = survey(mixture=False)
    assert found["linear"] < 1e-3
    # D neurons span all that 4 D linear ones do
    assert found["pruned"][1.0] < 1e-2 and found["pruned"][0.5] > 0.1
    assert min(m["error"] for m in found["mixtures"]) > 0.5 * found["pruned"][1.0]


def test_least_squares_is_numpys():
    x, y = randn(200, 12, seed=1), randn(200, 5, seed=2)
    ours = least_squares(x, y, ridge=0.0)
    with_ones = np.concatenate([x.double().numpy(), np.ones((200, 1))], axis=1)
    want, *_ = np.linalg.lstsq(with_ones, y.double().numpy(), rcond=None)
    np.testing.assert_allclose(ours.weight.numpy(), want[:-1], atol=1e-10)
    np.testing.assert_allclose(ours.bias.numpy(), want[-1], atol=1e-10)
    # the ridge: of the centred problem, r times the mean variance of x
    xc, yc = (t.double().numpy() - t.double().numpy().mean(0) for t in (x, y))
    r = 0.1 * xc.var(0).mean()
    want = np.linalg.solve(xc.T @ xc / 200 + r * np.eye(12), xc.T @ yc / 200)
    np.testing.assert_allclose(least_squares(x, y, ridge=0.1).weight.numpy(), want, atol=1e-10)


def test_least_squares_at_the_edges():
    x = randn(50, 4)
    dead = torch.cat([x, torch.zeros(50, 2)], 1)
    fitted = least_squares(dead, x @ randn(4, 3, seed=5), ridge=1e-9)
    assert fitted.weight[4:].abs().max() == 0 and fitted.weight.isfinite().all()
    constant = least_squares(torch.ones(5, 2), torch.full((5, 1), 3.0))
    assert constant(torch.ones(1, 2)).item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="expected as many rows"):
        least_squares(x, x[:3])
    with pytest.raises(ValueError, match="at least one"):
        least_squares(x[:0], x[:0])
    assert unexplained(x, x) == 0 and unexplained(x.mean(0).expand(50, 4), x) == pytest.approx(1)
    assert unexplained(torch.ones(3, 1), torch.ones(3, 1)) == 0
    with pytest.raises(ValueError, match="3 tokens cannot form 4 clusters"):
        token_clusters(x[:3], 4, torch.Generator())


def test_clusters_get_the_neurons_that_serve_them():
    score_CF = torch.tensor([[9, 0, 1, 0, 5, 0], [0, 8, 0, 2, 5, 7]]).float()
    order = cluster_neuron_order(score_CF.sum(0), score_CF, shared=2, num_experts=2)
    # 4 and 0 are shared; 1, 5 and 3 serve the second cluster, which has room for two
    assert order.tolist() == [4, 0, 3, 2, 1, 5]
    four = cluster_neuron_order(score_CF.sum(0), score_CF, shared=2, num_experts=4)
    assert four.tolist() == [4, 0, 3, 2, 1, 5]  # two experts a cluster, dealt in turn
    with pytest.raises(ValueError, match="C clusters that divide 4 experts"):
        cluster_neuron_order(score_CF.sum(0), torch.ones(3, 6), shared=2, num_experts=4)


# --- groups of blocks -----------------------------------------------------------------------


def group_tokens(n, weights, seed):
    """Tokens whose group's change is gate * (f W_p) with W_p the weights of their part of t."""
    f, gate = randn(n, 20, seed=seed), randn(n, D, seed=seed + 1)
    t = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    part = (t * len(weights)).long()
    change = gate * torch.einsum("ni,nio->no", f, torch.stack(weights)[part])
    return Tokens(f, gate, change, t)


def block_of(weight, bias=None):
    linear = torch.nn.Linear(20, D)
    with torch.no_grad():
        linear.weight.copy_(weight.t())
        linear.bias.zero_() if bias is None else linear.bias.copy_(bias)
    return SimpleNamespace(proj_out=linear)


def test_one_block_that_can_do_the_groups_work():
    weights = [randn(20, D, seed=4)]
    fit, judge = (group_tokens(3000, weights, seed) for seed in (10, 20))
    found = survey_group(block_of(randn(20, D, seed=5)), 3, fit, judge)
    assert found["kept"] > 1 and found["pruned"] < 1e-4 and found["mob"] < 1e-4
    exact = survey_group(block_of(weights[0]), 3, fit, judge)
    assert max(exact.values()) < 1e-10


def test_noise_levels_that_need_blocks_of_their_own():
    weights = [randn(20, D, seed=s) for s in (4, 5, 6)]
    fit, judge = (group_tokens(3000, weights, seed) for seed in (10, 20))
    found = survey_group(block_of(weights[0]), 3, fit, judge)
    assert found["mob"] < 1e-4 and found["pruned"] > 0.5


def test_gated_least_squares_is_the_equations_solution():
    tokens = group_tokens(300, [randn(20, D, seed=4)], 1)
    tokens = tokens._replace(change=tokens.change + randn(300, D, seed=8))
    start = (randn(20, D, seed=5), randn(D, seed=6))
    w, b = gated_least_squares(tokens, start, ridge=0.05, steps=400)
    f = torch.cat([tokens.f, torch.ones(300, 1)], 1).double()
    penalty = 0.05 * f.square().mean() * tokens.gate.double().square().mean()
    first = torch.cat([start[0], start[1][None]]).double()
    for c in range(D):  # an equation a column
        a = f * tokens.gate[:, c : c + 1].double()
        right = a.t() @ tokens.change[:, c].double() / 300 + penalty * first[:, c]
        want = torch.linalg.solve(a.t() @ a / 300 + penalty * torch.eye(21), right)
        torch.testing.assert_close(torch.cat([w[:, c], b[c : c + 1]]).double(), want, atol=1e-4,
                                   rtol=1e-4)  # fmt: skip


# --- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny dense FLUX for digits, saved; wide enough for every candidate."""
    pytest.importorskip("sklearn")
    from distill.configs.sections import TeacherConfig
    from distill.teacher import build_teacher

    sizes = TeacherConfig(path="-", num_layers=1, num_single_layers=5, heads=2, head_dim=8,
                          rope=[4, 2, 2])  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    build_teacher(sizes, 0).save_pretrained(folder)
    return folder


def run(tiny, out, *more):
    from distill.cli import main

    return main(["survey", str(tiny), "--calibrate", "digits", "--samples", "64", "--tokens", "600",
                 "--out", str(out), *more])  # fmt: skip


def test_survey_of_a_model(tiny, tmp_path, capsys, monkeypatch):
    from distill.survey import run as running

    assert run(tiny, tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(("Convert: ", "Either: ", "Prune: ")) and "suggested for" in printed
    page = (tmp_path / "survey.html").read_text()
    assert "Is this model worth converting?" in page and "data:image/png" in page
    content = json.loads((tmp_path / "survey.json").read_text())
    names = [f"transformer_blocks.0.{part}" for part in ("ff", "ff_context")]
    names += [f"single_transformer_blocks.{i}" for i in range(5)]
    assert list(content["layers"]) == names and list(content["groups"]) == ["1, 2, 3"]
    for layer in content["layers"].values():
        pruned = {float(r): e for r, e in layer["pruned"].items()}
        assert pruned[3.0] < pruned[1.0] < pruned[0.5] <= 1
        assert 0 < layer["linear"] < 1 and len(layer["mixtures"]) == 4 * len(running.CANDIDATES)
    # again: nothing is measured; the same numbers from another order of work
    monkeypatch.setattr(running, "survey_ffn", None)
    monkeypatch.setattr(running, "survey_group", None)
    assert run(tiny, tmp_path, "--budget", "4") == 0
    monkeypatch.undo()
    monkeypatch.setattr(running, "survey", partial(running.survey, memory_gib=1e-9))
    assert run(tiny, tmp_path / "one-by-one") == 0
    again = json.loads((tmp_path / "one-by-one" / "survey.json").read_text())
    assert again["layers"] == content["layers"] and again["groups"] == content["groups"]


def test_the_suggestion_keeps_to_the_budget():
    def layer(scale):
        moes = [MoEConfig(0.5, 0.25, 14, 2), MoEConfig(1.0, 0.5, 6, 2)]
        return {"linear": 0.2, "mixtures": [
            {"moe": m.to_dict(), "ratio": m.activated_ratio, "formation": "clusters",
             "error": scale * e, "pruned": scale * 2 * e}
            for m, e in zip(moes, (0.1, 0.04), strict=True)
        ]}  # fmt: skip

    names = [f"single_transformer_blocks.{i}" for i in range(4)]
    content = {"layers": {n: layer(s) for n, s in zip(names, (1, 9, 2, 1), strict=True)}}
    tight = suggest(content, 1.0)
    assert tight["activated"] == 1.0 and not tight["dense"] and tight["gain"] == pytest.approx(2)
    # one block of four may stay dense: the one that loses most, (4 + 3 * 1) / 4
    one = suggest(content, 1.75)
    assert one["dense"] == [names[1]] and one["activated"] == pytest.approx(1.75)
    assert one["error"] == pytest.approx(0.1 * 4 / 4)
    assert suggest(content, 2.0)["moe"]["expert_ratio"] == 0.5 or suggest(content, 2.0)["dense"]
    with pytest.raises(UserError, match="budget is 0.5; expected an activated ratio of 1.0"):
        suggest(content, 0.5)


def test_what_cannot_be_surveyed_is_said(tiny, tmp_path, capsys):
    assert run(tmp_path / "nothing", tmp_path) == 2
    (tmp_path / "survey.json").write_text("{}")
    assert run(tiny, tmp_path) == 2
    assert "is no survey; choose another --out" in capsys.readouterr().err
