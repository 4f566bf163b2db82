"""Configurations: the bundled ones load; every wrong key is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

from distill.configs.checked import bundled, from_dict, load_config, to_dict
from distill.configs.sections import DataConfig, DistillConfig
from distill.configs.training import TrainConfig, first_batch, settings
from distill.errors import ConfigError
from distill.study.config import DemoConfig, EvalConfig

TRAIN = {"steps": 5, "batch_size": 2, "lr": 1e-3}
GOOD = {
    "teacher": {"train": TRAIN},
    "student": {"preset": "flux-moe-l"},
    "stages": [{"stage": "shared", "train": TRAIN}],
}


def _without(data, *path):
    *parents, last = path
    copy = node = {**data}
    for key in parents:
        node[key] = {**node[key]}
        node = node[key]
    del node[last]
    return copy


@pytest.mark.parametrize("name", ["demo.yaml", "demo-quick.yaml"])
def test_bundled_demo(name):
    config = load_config(DemoConfig, bundled(name))
    assert config.moe.train.steps > 0 and from_dict(DemoConfig, to_dict(config)) == config


def test_bundled_digits_by_bare_name():
    config = load_config(DistillConfig, "digits.yaml")
    assert [s.stage for s in config.stages] == ["shared", "moe", "mob"]


def test_defaults_and_round_trip():
    config = from_dict(DistillConfig, GOOD)
    assert config.stages[0].loss.feature == 1.0 and config.stages[0].loss.balance == 0.01
    assert from_dict(DistillConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**GOOD, "data": {"name": "shards"}}, "data.folder is None"),
        ({**GOOD, "data": {"folder": "x"}}, "data.folder is 'x'"),
        ({**GOOD, "data": {"text_encoders": "x"}}, "data.text_encoders is for data.name 'shards'"),
        ({**GOOD, "data": {"caption_dropout": 1.5}}, "data.caption_dropout is 1.5"),
        ({**GOOD, "data": {"name": "shards", "folder": "x"}}, "needs teacher.path"),
        ({**GOOD, "sede": 1}, "unknown key sede"),
        (
            {**GOOD, "stages": [{"stage": "moe", "train": {**TRAIN, "step": 1}}]},
            r"unknown key stages\[0\].train.step",
        ),
        (_without(GOOD, "teacher"), "missing key teacher"),
        (
            {**GOOD, "stages": [{"stage": "moe", "train": _without(TRAIN, "lr")}]},
            r"missing key stages\[0\].train.lr",
        ),
        ({**GOOD, "seed": "one"}, "seed is 'one'; expected int"),
        ({**GOOD, "seed": True}, "seed is True; expected int"),
        ({**GOOD, "stages": 3}, "stages is 3; expected a list"),
        ({**GOOD, "stages": []}, "stages is empty"),
        ({**GOOD, "teacher": [1]}, r"teacher is \[1\]; expected a mapping"),
        ({**GOOD, "student": {}}, "exactly one of the keys 'preset' and 'structure'"),
        ({**GOOD, "data": {"name": "laion"}}, "data.name is 'laion'"),
        ({**GOOD, "stages": [{"stage": "joint", "train": TRAIN}]}, "stages.stage is 'joint'"),
        ({**GOOD, "stages": [GOOD["stages"][0]] * 2}, "in the order"),
        ({**GOOD, "teacher": {"train": TRAIN, "head_dim": 10}}, r"rope is \[8, 8, 8\]"),
        (
            {**GOOD, "teacher": {"train": TRAIN, "path": "x"}},
            "exactly one of the keys 'path' and 'train'",
        ),
        ({**GOOD, "teacher": {"train": {**TRAIN, "steps": 0}}}, "steps is 0; expected at least 1"),
        ([1, 2], "expected a mapping of keys"),
    ],
)
def test_bad_key_is_named(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(DistillConfig, data)


def test_numbers():
    # YAML reads 1e-3 as text; a whole number is a fine float, a float is no fine int
    assert from_dict(TrainConfig, {**TRAIN, "lr": "1e-3"}).lr == 1e-3
    assert from_dict(TrainConfig, {**TRAIN, "lr": 1}).lr == 1.0
    with pytest.raises(ConfigError, match="lr is 'fast'"):
        from_dict(TrainConfig, {**TRAIN, "lr": "fast"})
    with pytest.raises(ConfigError, match="steps is 1.5"):
        from_dict(TrainConfig, {**TRAIN, "steps": 1.5})
    assert from_dict(TrainConfig, {**TRAIN, "ema": None}).ema is None
    with pytest.raises(ConfigError, match="judged is 0"):
        from_dict(EvalConfig, {"prompts": ["cat"], "judged": 0})


def test_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read.*none.yaml"):
        load_config(DistillConfig, tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigError, match="bad.yaml is no valid YAML"):
        load_config(DistillConfig, bad)
    bad.write_text("")
    with pytest.raises(ConfigError, match="bad.yaml: the configuration is None"):
        load_config(DistillConfig, bad)


def test_the_data_section_of_the_docs_is_valid():
    page = (Path(__file__).parents[2] / "docs" / "distill.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    sections = [b["data"] for b in blocks if "data" in b]
    assert "shards" in [from_dict(DataConfig, s).name for s in sections]


def test_the_joint_stage_of_the_docs_is_valid():
    page = (Path(__file__).parents[2] / "docs" / "distill.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    (joint,) = [b for b in blocks if "stages" in b]
    config = from_dict(DistillConfig, {"teacher": {"path": "x"}, **joint})
    assert [s.freeze_shared for s in config.stages] == [False]


def test_what_the_result_does_not_depend_on_may_change():
    """Raising a limit, or reading ahead further, must not refuse a run that was begun."""
    base = load_config(DistillConfig, "digits.yaml")
    for part, key, value in (
        ("data", "max_bad_shards", 5),
        ("data", "prefetch", 0),
        ("data", "verify", True),
        ("student", "importance_rows", 16),
    ):
        changed = replace(base, **{part: replace(getattr(base, part), **{key: value})})
        assert changed != base and settings(changed) == settings(base), key
    changed = replace(base, data=replace(base.data, timesteps="logit-normal"))
    assert settings(changed) != settings(base)


def train_config(steps, batch_size):
    return TrainConfig(steps=steps, batch_size=batch_size, lr=1e-3)


def test_a_stage_goes_on_after_the_samples_of_those_before():
    assert first_batch([], 8) == 0
    assert first_batch([train_config(10, 8), train_config(5, 8)], 8) == 15
    assert first_batch([train_config(10, 8)], 4) == 20
    assert first_batch([train_config(5, 8)], 16) == 3  # 40 samples are 2.5 batches
    assert first_batch([train_config(5, 8), train_config(1, 16)], 8) == 8  # 48 to 64 were second


@pytest.mark.parametrize("sizes", [(64, 32, 16), (16, 32, 64)])
def test_stages_of_other_batch_sizes_see_each_sample_once(sizes):
    pytest.importorskip("sklearn")
    from distill.data.digits import Digits

    digits, stages, seen = Digits("train"), [], []
    for size in sizes:
        first = first_batch(stages, size)
        for step in range(first, first + 6):
            seen += digits.epochs(0, step, size).tolist()
        stages.append(train_config(6, size))
    assert len(seen) == len(set(seen)) == 6 * sum(sizes)
