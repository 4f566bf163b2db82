"""`d2m ablate`: the verdict rule by hand-made numbers, measures, resuming, and the results."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import ablate_jobs
import pytest
import torch

for package in ("diffusers", "skimage", "scipy", "matplotlib", "yaml", "safetensors", "tqdm"):
    pytest.importorskip(package)

from distill import ablate, claims  # noqa: E402
from distill.ablate_config import AblateConfig, HyperConfig  # noqa: E402
from distill.ablate_measure import (  # noqa: E402
    Bench,
    block_changes,
    concentration,
    explained,
    factorial,
    frequencies,
    specialisation,
)
from distill.ablate_results import CLAIMS, separation  # noqa: E402
from distill.ablate_teachers import build, leap  # noqa: E402
from distill.ablate_workers import Workers  # noqa: E402
from distill.config import TeacherConfig, TrainConfig, bundled, from_dict, load_config  # noqa: E402
from distill.errors import CheckpointError, ConfigError, UserError  # noqa: E402
from distill.photos import Photos  # noqa: E402

ONE = {"steps": 1, "batch_size": 4, "lr": 2e-3, "log_every": 5}
SMALL = {
    "teacher": {
        "num_layers": 2,
        "num_single_layers": 4,
        "heads": 2,
        "head_dim": 8,
        "rope": [4, 2, 2],
        "train": {**ONE, "steps": 2},
    },
    "structure": {"moe": {"top_k": 2}, "dense_double_blocks": []},
    "other": {
        "moe": {"shared_ratio": 0.5, "num_experts": 14, "top_k": 4},
        "dense_double_blocks": [],
    },
    "groups": {
        "shallow": {"double_groups": [[0, 1]]},
        "deep": {"double_groups": [[0, 1]], "single_groups": [[0, 1]]},
        "4x3": {"single_groups": [[0, 1], [2, 3]]},
        "2x6": {"single_groups": [[0, 1, 2, 3]], "active": 2},
        "1x12": {"single_groups": [[0, 1, 2, 3]], "active": 2},
    },
    "shared": {"stage": "shared", "train": ONE},
    "moe": {"stage": "moe", "train": ONE},
    "mob": {"stage": "mob", "train": ONE},
    "hyper": {"grid": [1.0, 0.5], "substeps": 2, "train": ONE},
    "search": {"rates": [2e-3]},
    "seeds": [0, 1],
    "evaluate": {"held_out": 16, "per_prompt": 2, "sample_steps": 2, "reference_steps": 3},
    "importance_batches": 1,
    "importance_samples": 4,
}


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
    # the seeds differ by far more than the arms, which only a paired test sees through
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
        arms = {a: {"rel_mse": pruned, "flow_loss": 1 + pruned} for a in
                ("prune-mlp-2", "prune-mlp-1.5", "bk-shallow", "bk-deep")}  # fmt: skip
        return {**arms, "teacher": {"rel_mse": 0.0, "flow_loss": 1.0}}

    found = separation({"0": rows(4.0), "1": rows(5.0), "2": rows(6.0)})["bk-deep"]
    assert found["rel_mse"]["gap_over_spread"] == pytest.approx(5.0)
    assert found["flow_loss"]["gap_over_spread"] == pytest.approx(5.0)
    assert separation({"0": rows(4.0)})["bk-deep"]["rel_mse"]["gap_over_spread"] is None


def test_claims_name_measured_values():
    arms = ablate.arm_names(load_config(AblateConfig, bundled("ablate.yaml")))
    for claim in CLAIMS:
        assert {claim.low.partition(":")[0], claim.high.partition(":")[0]} <= set(arms), claim
    assert set(ablate.SEARCHED.values()) <= set(arms)


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
    return build(TeacherConfig(**fields, path="unused"), 0).eval()


@torch.no_grad()
def test_block_changes_measure_output_minus_input(teacher):
    batch = Photos("test").batch(0, 0, 3)
    changes = block_changes(teacher, batch)
    assert [len(changes[k]) for k in ("double", "single")] == [2, 4]
    seen = {}
    block = teacher.single_transformer_blocks[2]
    handle = block.register_forward_hook(
        lambda _m, a, k, o: seen.update(k=k, o=o), with_kwargs=True
    )
    teacher(**batch.inputs())
    handle.remove()
    text, image = seen["o"]
    moved = torch.cat(
        [image - seen["k"]["hidden_states"], text - seen["k"]["encoder_hidden_states"]], 1
    )
    assert torch.allclose(changes["single"][2], moved.square().mean((1, 2)))


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


# --- workers --------------------------------------------------------------------------------


def test_workers_keep_order_and_pass_errors_on():
    start = time.monotonic()
    with Workers(2, ablate_jobs.double) as pool:
        jobs = [{"value": 1, "wait": 0.3}, {"value": 2}, {"value": 3}]
        assert [r["value"] for r in pool.run(jobs, "test", False)] == [2, 4, 6]
    with pytest.raises(KeyError, match="value"), Workers(2, ablate_jobs.double) as pool:
        pool.run([{"value": 1, "wait": 300}, {}], "test", False)
    assert time.monotonic() - start < 120  # the waiting worker was ended


# --- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that broke off at an arm and was started again; (folder, arms that ran, results)."""
    out = tmp_path_factory.mktemp("ablate")
    config = from_dict(AblateConfig, SMALL)
    ran, real = [], ablate.run_arm

    def counted(arm, context, folder):
        ran.append((arm, context.seed))
        if len(ran) == 5:
            raise KeyboardInterrupt
        return real(arm, context, folder)

    ablate.run_arm = counted
    try:
        with pytest.raises(KeyboardInterrupt):
            ablate.run_ablate(out, config=config, workers=1, progress=False)
        before = len(ran)
        with pytest.raises(UserError, match="no page yet: arm 'teacher'"):
            ablate.run_ablate(
                out, config=config, so_far=True, progress=False, say=lambda line: None
            )  # fmt: skip
        partial = claims.read(out / "claims.json")
        page = ablate.run_ablate(
            out, config=config, workers=1, progress=False, results=out / "x" / "claims.json",
            say=lambda line: None,
        )  # fmt: skip
    finally:
        ablate.run_arm = real
    assert page == out / "ablate.html"
    return out, ran, before, config, partial


def test_verdicts_so_far(run):
    partial = run[4]
    assert not partial["complete"] and claims.read(run[0] / "claims.json")["complete"]
    measured = [c["mean"] is not None for c in partial["claims"]]
    assert measured[0] and not all(measured)  # MoE and Diff-Pruning at 1.5 were done
    assert {c["verdict"] for c in partial["claims"] if c["mean"] is None} == {"undecided"}


def test_a_stopped_run_continues(run):
    out, ran, before, config, _ = run
    assert before == 5
    wanted = [(arm, seed) for arm in ablate.arm_names(config) for seed in (0, 1)]
    # the first four were done; the fifth broke off and is done again
    assert ran[before:] == wanted[4:]


def test_a_finished_run_trains_nothing(run, monkeypatch):
    out, _, _, config, _ = run
    first = json.loads((out / "claims.json").read_text())

    def forbidden(*args):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(ablate, "run_arm", forbidden)
    ablate.run_ablate(out, config=config, workers=1, progress=False, say=lambda line: None)
    again = json.loads((out / "claims.json").read_text())
    for content in (first, again):
        content["environment"].pop("date")
    assert first == again


def test_claims_schema(run):
    out = run[0]
    content = claims.read(out / "claims.json")
    copy = claims.read(out / "x" / "claims.json")
    assert (out / "x" / "claims.html").read_text().startswith("<!doctype html>")
    assert {**content, "environment": 0} == {**copy, "environment": 0}  # its date may be another
    assert len(content["claims"]) == len(CLAIMS)
    for entry in content["claims"]:
        assert {"claim", "source", "verdict", "mean", "spread"} <= set(entry)
        assert entry["verdict"] in claims.VERDICTS
        assert all(len(values) == 2 for values in entry["arms"].values())
    assert content["seeds"] == [0, 1] and content["environment"]["torch"] == torch.__version__
    for row in content["runs"].values():
        assert row["teacher"]["rel_mse"] == 0
        assert row["moe"]["top2"] == pytest.approx(row["moe"]["rel_mse"], rel=1e-6)


def test_another_setting_is_not_mistaken_for_this_one(run):
    out, _, _, config, _ = run
    base = ablate.task(config, out, "moe", 0, {"moe": 1e-3}, 1.0)["file"]
    changed = from_dict(AblateConfig, {**SMALL, "importance_samples": 5})
    for other in (
        ablate.task(changed, out, "moe", 0, {"moe": 1e-3}, 1.0),
        ablate.task(config, out, "moe", 1, {"moe": 1e-3}, 1.0),
        ablate.task(config, out, "moe", 0, {"moe": 2e-3}, 1.0),
        ablate.task(config, out, "moe", 0, {"moe": 1e-3}, 0.5),
    ):
        assert other["file"] != base
    fewer = from_dict(AblateConfig, {**SMALL, "seeds": [0]})
    assert ablate.task(fewer, out, "moe", 0, {"moe": 1e-3}, 1.0)["file"] == base


def test_the_readmes_table_is_made_from_the_file(run, tmp_path):
    from distill.bench_report import update_readme

    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- begin:claims -->\nold\n<!-- end:claims -->\nz\n")
    assert update_readme(readme, run[0])
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["a", "<!-- begin:claims -->"] and "old" not in lines
    content = claims.read(run[0] / "claims.json")
    for line, entry in zip(lines[4:-2], content["claims"], strict=True):
        assert line.startswith(f"| {entry['claim']} | {entry['source']} | ")
        assert line.endswith(f" | {entry['verdict']} |")
    assert not update_readme(readme, run[0], check=True)


def test_report_renders_it_again(run, capsys):
    from distill.cli import main

    out = run[0]
    before = (out / "ablate.html").read_text()
    (out / "ablate.html").unlink()
    assert main(["report", str(out)]) == 0
    assert str(out / "ablate.html") in capsys.readouterr().out
    date = r"<dt>date</dt><dd>[^<]*"
    again = (out / "ablate.html").read_text()
    assert re.sub(date, "", again) == re.sub(date, "", before)


def test_a_published_page_is_rewritten_with_its_pictures(run, tmp_path):
    """claims.html from claims.json and its own pictures is the page that the run wrote."""
    from distill.ablate_page import rewrite

    for name in ("claims.json", "claims.html"):
        (tmp_path / name).write_bytes((run[0] / "x" / name).read_bytes())
    page = tmp_path / "claims.html"
    whole = page.read_text(encoding="utf-8")
    page.write_text(whole.replace("<h1>The paper", "<h1>An old"), encoding="utf-8")
    assert rewrite(page).read_text(encoding="utf-8") == whole
    page.write_text(whole.replace("base64,", "", 1), encoding="utf-8")
    with pytest.raises(CheckpointError, match="3 pictures, expected 4"):
        rewrite(page)


def test_the_committed_page_is_current(tmp_path):
    from distill.ablate_page import rewrite

    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    for name in ("claims.json", "claims.html"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    rewrite(tmp_path / "claims.html")
    fresh = (tmp_path / "claims.html").read_bytes()
    assert fresh == (folder / "claims.html").read_bytes(), "run `d2m report`"


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [v for k, v in attributes if k in ("src", "href", "srcset")]


def test_the_page_is_self_contained(run):
    text = (run[0] / "ablate.html").read_text(encoding="utf-8")
    page = _Links()
    page.feed(text)
    assert page.tags.count("img") == 4
    assert all(link.startswith("data:image/png;base64,") for link in page.found)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"url\(|@import|https?://", text)
    for claim in CLAIMS:
        assert claim.source in text


def test_the_search_gives_every_kind_the_same_candidates():
    config = from_dict(AblateConfig, {**SMALL, "search": {"rates": [1e-3, 2e-3, 4e-3]}})
    seen = []

    class Fake:
        def run(self, jobs, label, progress):
            seen.extend(jobs)
            return [{"rel_mse": abs(next(iter(j["rates"].values())) - 2e-3)} for j in jobs]

    best, tried = ablate.search(config, Path("unused"), Fake(), False)
    assert best == dict.fromkeys(ablate.SEARCHED, 2e-3)
    assert {j["seed"] for j in seen} == {config.search.seed}
    assert config.search.seed not in config.seeds
    for kind, arm in ablate.SEARCHED.items():
        own = [j for j in seen if j["arm"] == arm]
        assert [j["rates"] for j in own] == [{kind: r} for r in (1e-3, 2e-3, 4e-3)]
        assert set(tried[kind]) == {"0.001", "0.002", "0.004"}


@pytest.mark.parametrize("name", ["ablate.yaml", "ablate-quick.yaml"])
def test_bundled_settings_are_the_papers_structures(name):
    config = load_config(AblateConfig, bundled(name))
    from d2m_models import MoBConfig, MoEConfig

    moe, other = MoEConfig(**config.structure["moe"]), MoEConfig(**config.other["moe"])
    assert moe.activated_ratio == other.activated_ratio == 1.5
    assert moe.expansion_ratio == other.expansion_ratio == 4
    for name, groups in (("4x3", 4), ("2x6", 2), ("1x12", 1)):
        mob = MoBConfig.from_dict(config.groups[name])
        assert len(mob.single_groups) == groups and groups * mob.active == 4
        assert sum(map(len, mob.single_groups)) == 12


def test_the_published_setting_separates_the_methods():
    """Each pruned model lies three standard deviations or more from the dense one, in both errors;
    and verdicts, means and spreads follow from the published values."""
    content = claims.read(Path(__file__).parents[1] / "benchmarks" / "results" / "claims.json")
    assert content["complete"] and len(content["seeds"]) == 3
    for arm, gaps in separation(content["runs"]).items():
        for value, gap in gaps.items():
            assert gap["gap_over_spread"] >= 3, (arm, value)
            assert gap == pytest.approx(content["separation"][arm][value])
    for entry in content["claims"]:
        claim = claims.Claim(*(entry[k] for k in ("claim", "source", "low", "high", "scale")))
        again = claims.judge(claim, content["runs"])
        assert again["verdict"] == entry["verdict"]
        assert again["mean"] == pytest.approx(entry["mean"])
        assert again["spread"] == pytest.approx(entry["spread"])


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "claims.json"
    path.write_text('{"schema": "other"}')
    with pytest.raises(CheckpointError, match="schema"):
        claims.read(path)
    path.write_text(
        json.dumps(
            {
                "schema": claims.SCHEMA,
                "seeds": [],
                "environment": {},
                "complete": True,
                "rule": "",
                "claims": [{"claim": "x", "verdict": "maybe"}],
            }
        )
    )
    with pytest.raises(CheckpointError, match="'x' lacks"):
        claims.read(path)
