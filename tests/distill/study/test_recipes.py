"""`d2m ablate --recipes`: arms of equal cost, a run that was stopped, and what is read off it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

for package in ("diffusers", "scipy", "matplotlib", "yaml", "safetensors", "tqdm"):
    pytest.importorskip(package)
if find_spec("qtawesome") is None:
    pytest.skip("needs QtAwesome", allow_module_level=True)

from distill.configs.checked import bundled, from_dict, load_config
from distill.errors import ConfigError
from distill.study import recipes
from distill.study import recipes_page as page
from distill.study.config import Arm, RecipeConfig

BUNDLED = load_config(RecipeConfig, bundled("recipes.yaml"))


def small(**changes) -> RecipeConfig:
    """The bundled arms, the start of which is fitted on few tokens; one step is one step."""

    def short(arm):
        start = {**arm.start, "tokens": 150} if "tokens" in arm.start else arm.start
        return replace(arm, start=start)

    arms = {
        n: short(BUNDLED.arms[n]) for n in ("prune-refitted", "moe-paper", "moe", "mob", "depth")
    }
    train = replace(BUNDLED.train, steps=3, batch_size=2)
    own = {"arms": arms, "train": train, "seeds": [0, 1], "lengths": [1], "rates": [1e-3],
           "held_out": 4, "importance_batches": 1, "importance_samples": 8}  # fmt: skip
    return replace(BUNDLED, **{**own, **changes})


def test_arms_of_one_length_train_equally_long():
    """But for the steps that a fitted start costs; the paper's two stages share them."""
    for name, arm in BUNDLED.arms.items():
        for length in (1, 4):
            stages = recipes.phases(arm, BUNDLED, length, 1e-3)
            fitted = arm.start.get("outputs") == "refitted"
            more = 0 if fitted else BUNDLED.calibration_steps
            assert sum(s.train.steps for s in stages) == length * BUNDLED.train.steps + more, name
            assert {(s.train.batch_size, s.train.lr) for s in stages} == {(16, 1e-3)}
    assert [s.stage for s in recipes.phases(BUNDLED.arms["moe-paper"], BUNDLED, 1, 1e-3)] == [
        "shared", "moe"
    ]  # fmt: skip
    (stage,) = recipes.phases(BUNDLED.arms["moe"], BUNDLED, 1, 1e-3)
    assert stage.stage == "moe" and not stage.freeze_shared


def test_what_a_cached_measurement_depends_on(tmp_path):
    config = small()

    def file(config=config, name="moe", seed=0, length=1, lr=1e-3):
        return recipes.task(config, tmp_path, name, seed, length, lr)["file"]

    others = [
        file(name="mob"),
        file(seed=1),
        file(length=4),
        file(lr=2e-3),
        file(small(held_out=5)),
    ]
    assert len({file(), *others}) == 6
    assert file(small(seeds=[0], lengths=[1, 4], rates=[1.0])) == file()  # no matter who else runs
    with pytest.raises(ConfigError, match="expected different seeds"):
        small(seeds=[0, 0])
    with pytest.raises(ConfigError, match="arms.kind is 'x'"):
        from_dict(Arm, {"kind": "x"})


@pytest.mark.slow
def test_a_stopped_run_continues_and_writes_its_page(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    config, ran, real = small(), [], recipes.run_arm
    monkeypatch.setattr(recipes, "_setting", recipes._setting.__wrapped__)
    setting = recipes.Setting(config)
    monkeypatch.setattr(recipes, "_setting", lambda text: setting)

    def counted(job):
        ran.append((job["name"], job["seed"]))
        if len(ran) == 8:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(recipes, "run_arm", counted)
    run = {"config": config, "workers": 1, "progress": False, "say": lambda text: None}
    with pytest.raises(KeyboardInterrupt):
        recipes.run_recipes(tmp_path, full=True, **run)
    done = len(list((tmp_path / "values").glob("*.json")))
    assert done == 7  # five rates and two arms
    target = recipes.run_recipes(tmp_path, full=True, results=tmp_path / "x/recipes.json", **run)
    assert len(list((tmp_path / "values").glob("*.json"))) == 5 + 2 * 5
    content = json.loads((tmp_path / "x" / "recipes.json").read_text())
    for row in content["runs"].values():
        assert set(row) == {f"{name}@1" for name in config.arms}
        for name, values in row.items():
            assert 0 < values["rel_mse"] < 1 and 0 < values["start_seen"] < 1
            assert (values["dead"] is None) == name.startswith(("prune", "mob", "depth"))
        # a fitted start is far nearer than the paper's
        assert row["moe@1"]["start_rel_mse"] < 0.7 * row["moe-paper@1"]["start_rel_mse"]
    text = target.read_text()
    assert (tmp_path / "x" / "recipes.html").read_text() == text
    assert "<h1>MoE or pruning?</h1>" in text and page.answer(content) in text


def content(moe, refitted) -> dict:
    rows = {str(i): {"moe@1": {"rel_mse": a, "start_rel_mse": 1.0, "dead": 0.0, "busiest": 2.0},
                     "prune-refitted@1": {"rel_mse": b, "start_rel_mse": 2.0, "dead": None,
                                          "busiest": None}}
            for i, (a, b) in enumerate(zip(moe, refitted, strict=True))}  # fmt: skip
    return {"runs": rows, "config": {"arms": {"prune-refitted": {}, "moe": {}, "mob": {}}}}


def test_the_answer_is_the_verdict():
    better = content([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])
    assert page.answer(better).startswith("Convert: after 1 times") and "2.00 times" in page.answer(
        better
    )
    assert page.answer(content([2.0, 2.2, 1.8], [1.0, 1.1, 0.9])).startswith("Prune: ")
    assert page.answer(content([1.0, 2.0, 1.0], [2.0, 1.0, 1.0])).startswith("Undecided: ")
    found = list(page.verdicts(better))
    assert [(words, n, e["verdict"]) for words, n, e in found] == [
        ("MoE against pruning with the same start", 1, "holds")
    ]
    header, rows = page.arms_table(better)
    assert header == ["arm", "untrained", "x1", "experts dead", "busiest"]
    assert rows == [["prune-refitted", "2.00000", "2.00000 ± 0.20000", "", ""],
                    ["moe", "1.00000", "1.00000 ± 0.10000", "0.0%", "2.0x"]]  # fmt: skip
