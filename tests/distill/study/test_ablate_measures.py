"""The verdict rule of `d2m ablate` by hand-made numbers, and its measures."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.ablate_jobs import ONE, SMALL

for package in ("diffusers", "skimage", "scipy", "matplotlib", "yaml", "safetensors", "tqdm"):
    pytest.importorskip(package)

from distill.configs.checked import bundled, from_dict, load_config
from distill.configs.sections import TeacherConfig
from distill.configs.training import TrainConfig
from distill.data.photos import Photos
from distill.errors import ConfigError
from distill.study import ablate, claims
from distill.study.claim_list import CLAIMS, separation
from distill.study.config import AblateConfig, HyperConfig
from distill.study.measure import Bench
from distill.study.patterns import (
    concentration,
    explained,
    factorial,
    frequencies,
    specialisation,
)
from distill.study.teachers import leap
from distill.teacher import build_teacher

# --- the rule -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.0, 1.1, 0.9], "holds"),
        ([-1.0, -1.1, -0.9], "does not hold"),
        ([1.0, -1.0, 0.5], "undecided"),
        # mean 1, sd sqrt(3): three standard errors would be 3, so t = 2.92 just does not decide ...
        ([1 - math.sqrt(3), 1.0, 1 + math.sqrt(3)], "undecided"),
        # ... and on either side of mean = 2.92 se, where se = d / sqrt(3) for (1 - d, 1, 1 + d)
        ([1 - 0.59, 1.0, 1.59], "holds"),
        ([1 - 0.60, 1.0, 1.60], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),
        ([0.2, 0.2, 0.2], "holds"),
        ([-0.2, -0.2, -0.2], "does not hold"),
        ([5.0], "undecided"),
        ([], "undecided"),
        ([1.0, math.nan, 1.0], "undecided"),
        ([1.0, math.inf, 1.0], "undecided"),
    ],
)
def test_verdict(values, expected):
    assert claims.verdict(values) == expected


def test_critical_value_is_students_t():
    # tables: one-sided 5%, 2 and 1 degrees of freedom
    assert claims.critical(3) == pytest.approx(2.920, abs=5e-4)
    assert claims.critical(2) == pytest.approx(6.314, abs=5e-4)


def test_effects():
    assert claims.effects([1.0, 2.0], [math.e, 2.0], "log") == pytest.approx([1.0, 0.0])
    assert claims.effects([1.0, 5.0], [3.0, 4.0], "linear") == [2.0, -1.0]
    assert math.isnan(claims.effects([0.0], [1.0], "log")[0])
    with pytest.raises(ValueError, match="cannot be paired"):
        claims.effects([1.0], [1.0, 2.0], "log")
    with pytest.raises(ValueError, match="scale is 'ratio'"):
        claims.effects([1.0], [1.0], "ratio")


def test_judge_pairs_seeds():
    # the seeds differ by far more than the models, which only a paired test sees through
    rows = {
        s: {"a": {"rel_mse": level}, "b": {"rel_mse": level * ratio, "other": 1.0}}
        for s, level, ratio in (("0", 1.0, 1.5), ("1", 10.0, 1.6), ("2", 100.0, 1.4))
    }
    entry = claims.judge(claims.Claim("a below b", "Table 0", "a", "b"), rows)
    assert entry["verdict"] == "holds"
    assert entry["mean"] == pytest.approx(math.log(1.5 * 1.6 * 1.4) / 3)
    assert entry["arms"]["b"] == [1.5, 16.0, 140.0]
    back = claims.judge(claims.Claim("b below a", "Table 0", "b", "a"), rows)
    assert back["verdict"] == "does not hold" and back["mean"] == pytest.approx(-entry["mean"])
    absent = claims.judge(claims.Claim("x", "y", "a:gone", "b:other"), rows)
    assert absent["verdict"] == "undecided" and absent["mean"] is None
    json.dumps(absent, allow_nan=False)


def test_separation_counts_standard_deviations():
    def rows(pruned):
        models = {a: {"rel_mse": pruned, "flow_loss": 1 + pruned} for a in
                ("prune-mlp-2", "prune-mlp-1.5", "bk-shallow", "bk-deep")}  # fmt: skip
        return {**models, "teacher": {"rel_mse": 0.0, "flow_loss": 1.0}}

    found = separation({"0": rows(4.0), "1": rows(5.0), "2": rows(6.0)})["bk-deep"]
    assert found["rel_mse"]["gap_over_spread"] == pytest.approx(5.0)
    assert found["flow_loss"]["gap_over_spread"] == pytest.approx(5.0)
    assert separation({"0": rows(4.0)})["bk-deep"]["rel_mse"]["gap_over_spread"] is None


def test_claims_name_measured_values():
    names = ablate.comparator_names(load_config(AblateConfig, bundled("ablate.yaml")))
    for claim in CLAIMS:
        assert {claim.low.partition(":")[0], claim.high.partition(":")[0]} <= set(names), claim
    assert set(ablate.SEARCHED.values()) <= set(names)


# --- measures -------------------------------------------------------------------------------


def test_explained_variance():
    values = torch.tensor([0.0, 2.0, 10.0, 12.0])
    # means 1 and 11 about 6: 4 x 25 of 4 x 26
    assert explained(values, torch.tensor([0, 0, 1, 1])) == pytest.approx(100 / 104)
    assert explained(values, torch.tensor([0, 1, 1, 0])) == pytest.approx(0.0)
    assert explained(torch.ones(3), torch.tensor([0, 1, 1])) == 0.0


def test_specialisation():
    ids = torch.tensor([[[[0, 1], [2, 3]]]])  # one step, one sample, two tokens, top-2
    table = frequencies(ids, torch.tensor([[[0, 1]]]), 4)
    assert table.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert specialisation(table) == pytest.approx(0.5)  # two disjoint groups about their mean
    assert specialisation(table[:1].expand(3, 4)) == 0.0
    assert concentration(table).tolist() == pytest.approx([math.log(2)] * 2)


def test_factorial_is_balanced():
    batch, prompt, step = factorial(0, times=4, repeats=2)
    cells = (prompt * 4 + step).bincount()
    assert cells.tolist() == [2] * (Photos.num_classes * 4)
    assert batch.t[step == 0].unique().tolist() == [0.125]


@pytest.fixture(scope="module")
def teacher():
    fields = {k: v for k, v in SMALL["teacher"].items() if k != "train"}
    return build_teacher(TeacherConfig(**fields, path="unused"), 0, Photos).eval()


@torch.no_grad()
def test_leap_lands_where_the_teachers_steps_do(teacher):
    batch = Photos("train", "grid", [1.0, 0.5]).batch(0, 0, 4)
    stop = torch.where(batch.t == 1, 0.5, 0.0)
    v = leap(teacher, batch.inputs(), stop, 2)
    x, inputs = batch.x_t, batch.inputs()
    for i in range(2):
        t = batch.t - i * 0.25
        x = x - 0.25 * teacher(**{**inputs, "hidden_states": x, "timestep": t}).sample
    assert torch.allclose(batch.x_t - 0.5 * v, x, atol=1e-5)


def test_bench_of_the_teacher_itself_is_zero(teacher):
    config = from_dict(AblateConfig, SMALL).evaluate
    values = Bench(teacher, config).measure(teacher)
    assert values["rel_mse"] == 0 and values["sample_mse"] == 0 and values["flow_loss"] > 0


@pytest.mark.parametrize("grid", [[], [0.9, 0.5], [1.0, 0.5, 0.5], [1.0, 0.0]])
def test_bad_grids_are_refused(grid):
    with pytest.raises(ConfigError, match="hyper.grid"):
        HyperConfig(grid, 2, TrainConfig(**ONE))


def test_one_sample_a_prompt_is_refused():
    # prompts in random order would then be the same groups again, and chance as good as the rest
    with pytest.raises(ConfigError, match="evaluate.per_prompt is 1"):
        from_dict(AblateConfig, {**SMALL, "evaluate": {"per_prompt": 1}})
