"""Intervals, differences, and the table beside the paper's."""

import json

import pytest

from distill.errors import CheckpointError
from distill.evaluate.paper import QUALITY, TABLE1, row_of
from distill.evaluate.scores import SCHEMA, differences, read_scores, table
from distill.evaluate.statistics import key_of, paired, summarise


def test_means_are_of_groups_of_prompts():
    """Tasks of 1 and 3 prompts weigh the same; two images of a prompt are one draw."""
    values = {"00000-0": 1, "00000-1": 0, "00001-0": 1, "00002-0": 1, "00003-0": 0}
    groups = {0: "a", 1: "b", 2: "b", 3: "b"}
    found = summarise(values, groups)
    assert found["groups"] == {"a": 0.5, "b": pytest.approx(2 / 3)}
    assert found["mean"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert (found["images"], found["prompts"]) == (5, 4)
    assert summarise(values)["mean"] == pytest.approx(2.5 / 4)


def test_the_interval_covers_as_often_as_it_says():
    """Of 100 samples of 40 normal numbers, the interval of the mean misses 0 about 5%."""
    import numpy as np

    rng = np.random.default_rng(0)
    missed = 0
    for sample in rng.normal(size=(100, 40)):
        low, high = summarise({key_of(i, 0): v for i, v in enumerate(sample)})["interval"]
        missed += not low <= 0 <= high
    assert 1 <= missed <= 13  # 5, and what the bootstrap of 40 is too narrow


def test_images_of_one_prompt_are_no_independent_draws():
    """Four equal images a prompt make no interval narrower."""
    once = {key_of(p, 0): p % 2 for p in range(20)}
    often = {key_of(p, i): p % 2 for p in range(20) for i in range(4)}
    assert summarise(once)["interval"] == summarise(often)["interval"]


def test_paired_differences_see_what_intervals_hide():
    ours = {key_of(p, 0): p + 0.1 for p in range(20)}
    theirs = {key_of(p, 0): float(p) for p in range(25)}
    found = paired(ours, theirs)
    assert found["mean"] == pytest.approx(0.1) and found["images"] == 20
    assert found["interval"] == pytest.approx([0.1, 0.1])
    assert paired(ours, {}) is None


def scores(name, preset="flux-moe-l", steps=28, shift=0.0, hash_="x"):
    values = {key_of(p, 0): p / 10 + shift for p in range(5)}
    column = {**summarise(values), "values": values, "metric": "clip", "judges": {}}
    settings = {"prompts_hash": hash_, "seed": 0, "size": None}
    return {"schema": SCHEMA, "model": {"model": f"/m/{name}", "preset": preset, "steps": steps,
            "flops": 50.9e12}, "settings": settings, "columns": {"clip": column},
            "groups": [None] * 5, "failed": {}, "texts": ["a"] * 5}  # fmt: skip


def test_the_papers_row_stands_under_each_preset():
    header, rows = table([scores("ours"), scores("dense", "flux-dense", 8), scores("odd", None)])
    assert [row[0] for row in rows] == ["ours", "paper: FLUX.1-MoE-L (H20)", "dense",
                                        "paper: HyperFLUX (H20)", "odd"]  # fmt: skip
    assert header[6:14] == list(QUALITY.values())
    assert rows[0][6].startswith("0.2 [") and rows[1][6] == "31.39" and rows[1][13] == "78.28"
    assert rows[0][3] == "50.9" and rows[1][3] == "43.42"


def test_the_papers_quality():
    """Table 1 as published; every row has a number a column."""
    assert all(len(row.quality) == len(QUALITY) for row in TABLE1)
    row = row_of("flux-moe-xs", 8)
    assert dict(zip(QUALITY, row.quality, strict=True))["geneval"] == 0.4117
    assert row_of("flux-moe-l", 50) is None and row_of(None, 28) is None


def test_differences_are_of_the_same_prompts():
    rows = differences([scores("a"), scores("b", shift=0.5), scores("c", hash_="y")])[1]
    assert rows == [["CLIP", "b", "0.5 [0.5, 0.5]", "5"]]


def test_what_is_no_scores_file(tmp_path):
    with pytest.raises(CheckpointError, match="expected a `d2m evaluate`'s"):
        read_scores(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps({"schema": "other"}))
    with pytest.raises(CheckpointError, match="schema"):
        read_scores(tmp_path)
