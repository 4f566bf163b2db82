"""`d2m ablate`: workers, resuming, and the results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers import ablate_jobs
from helpers.ablate_jobs import SMALL

for package in ("diffusers", "skimage", "scipy", "matplotlib", "yaml", "safetensors", "tqdm"):
    pytest.importorskip(package)

from distill.configs.checked import bundled, from_dict, load_config
from distill.errors import CheckpointError, UserError
from distill.study import ablate, claims
from distill.study.claim_list import CLAIMS, separation
from distill.study.config import AblateConfig
from distill.study.workers import Workers, beside

# --- workers --------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_keep_order_and_pass_errors_on():
    start = time.monotonic()
    with Workers(2, ablate_jobs.double) as pool:
        jobs = [{"value": 1, "wait": 0.3}, {"value": 2}, {"value": 3}]
        assert [r["value"] for r in pool.run(jobs, "test", False)] == [2, 4, 6]
    with pytest.raises(KeyError, match="value"), Workers(2, ablate_jobs.double) as pool:
        pool.run([{"value": 1, "wait": 300}, {}], "test", False)
    assert time.monotonic() - start < 120  # the waiting worker was ended


@pytest.mark.slow
def test_a_worker_that_is_ended_leaves_its_task_in_order(tmp_path):
    tasks = [{"value": 1, "wait": 300, "marks": str(tmp_path)}, {"marks": str(tmp_path)}]
    with pytest.raises(KeyError, match="value"), Workers(2, ablate_jobs.fail) as pool:
        pool.run(tasks, "test", False)
    assert (tmp_path / "left").exists()


@pytest.mark.slow
def test_a_task_beside_is_waited_for_and_may_fail(tmp_path):
    with beside(ablate_jobs.double, {"value": 1, "wait": 0.3, "marks": str(tmp_path)}):
        pass
    assert (tmp_path / "left").exists()
    with beside(ablate_jobs.double, {}):
        pass


def test_workers_end_with_a_main_process_that_is_killed(tmp_path):
    code = f"""
from helpers.ablate_jobs import double
from distill.study.workers import Workers
if __name__ == "__main__":
    with Workers(1, double) as pool:
        pool.run([{{"value": 1, "wait": 300, "marks": {str(tmp_path)!r}}}], "test", False)
"""
    (tmp_path / "main.py").write_text(code)
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(map(str, (root, root / "tests")))
    main = subprocess.Popen([sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    while not (tmp_path / "begun").exists():
        assert main.poll() is None
        time.sleep(0.05)
    main.kill()
    assert main.stdout.read() == b""  # comes to an end when nobody holds the pipe any more


# --- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that broke off and was started again; (folder, comparators that ran, results)."""
    out = tmp_path_factory.mktemp("ablate")
    config = from_dict(AblateConfig, SMALL)
    ran, real = [], ablate.run_comparator

    def counted(name, context, given):
        ran.append((name, context.seed))
        if len(ran) == 5:
            raise KeyboardInterrupt
        return real(name, context, given)

    ablate.run_comparator = counted
    try:
        with pytest.raises(KeyboardInterrupt):
            ablate.run_ablate(out, config=config, workers=1, progress=False)
        before = len(ran)
        with pytest.raises(UserError, match="no page yet: 'teacher'"):
            ablate.run_ablate(
                out, config=config, so_far=True, progress=False, say=lambda line: None
            )  # fmt: skip
        partial = claims.read(out / "claims.json")
        page = ablate.run_ablate(
            out, config=config, workers=1, progress=False, results=out / "x" / "claims.json",
            say=lambda line: None,
        )  # fmt: skip
    finally:
        ablate.run_comparator = real
    assert page == out / "ablate.html"
    return out, ran, before, config, partial


@pytest.mark.slow
def test_verdicts_so_far(run):
    partial = run[4]
    assert not partial["complete"] and claims.read(run[0] / "claims.json")["complete"]
    measured = [c["mean"] is not None for c in partial["claims"]]
    assert measured[0] and not all(measured)  # MoE and Diff-Pruning at 1.5 were done
    assert {c["verdict"] for c in partial["claims"] if c["mean"] is None} == {"undecided"}


@pytest.mark.slow
def test_a_stopped_run_continues(run):
    out, ran, before, config, _ = run
    assert before == 5
    wanted = [(name, seed) for name in ablate.comparator_names(config) for seed in (0, 1)]
    # the first four were done; the fifth broke off and is done again
    assert ran[before:] == wanted[4:]


@pytest.mark.slow
def test_a_finished_run_trains_nothing(run, monkeypatch):
    out, _, _, config, _ = run
    first = json.loads((out / "claims.json").read_text())

    def forbidden(*args):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(ablate, "run_comparator", forbidden)
    ablate.run_ablate(out, config=config, workers=1, progress=False, say=lambda line: None)
    again = json.loads((out / "claims.json").read_text())
    for content in (first, again):
        content["environment"].pop("date")
    assert first == again


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_readmes_table_is_made_from_the_file(run, tmp_path):
    from report.page import update_page

    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- begin:claims -->\nold\n<!-- end:claims -->\nz\n")
    assert update_page(readme, run[0])
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["a", "<!-- begin:claims -->"] and "old" not in lines
    content = claims.read(run[0] / "claims.json")
    for line, entry in zip(lines[4:-2], content["claims"], strict=True):
        assert line.startswith(f"| {entry['verdict']} | {entry['claim']} | {entry['source']} | ")
    assert not update_page(readme, run[0], check=True)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_published_page_is_rewritten_with_its_pictures(run, tmp_path):
    """claims.html from claims.json and its own pictures is the page that the run wrote."""
    from distill.study.ablate_page import rewrite

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
    from distill.study.ablate_page import rewrite

    folder = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
    for name in ("claims.json", "claims.html"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    rewrite(tmp_path / "claims.html")
    fresh = (tmp_path / "claims.html").read_bytes()
    assert fresh == (folder / "claims.html").read_bytes(), "run `python benchmarks/draw.py`"


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [v for k, v in attributes if k in ("src", "href", "srcset")]


@pytest.mark.slow
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
    for kind, name in ablate.SEARCHED.items():
        own = [j for j in seen if j["name"] == name]
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
    content = claims.read(Path(__file__).parents[3] / "benchmarks" / "results" / "claims.json")
    assert content["complete"] and len(content["seeds"]) == 3
    for name, gaps in separation(content["runs"]).items():
        for value, gap in gaps.items():
            assert gap["gap_over_spread"] >= 3, (name, value)
            assert gap == pytest.approx(content["separation"][name][value])
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
