"""The benchmarks' results files, and compare.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

import compare
from harness import environment as env
from harness import (
    race,
    results,
)

CPU = torch.device("cpu")
GPU_WHEELS = ROOT / "benchmarks" / "gpu-wheels.txt"


# --- results files --------------------------------------------------------------------------


def test_results_are_kept_renewed_and_merged(tmp_path):
    path = tmp_path / "out" / "cpu.json"
    first = results.Results(path, {"date": "1", "commit": "a"})
    first.add("skipped", "route/x", {"why": "deadline"})
    first.add("stages", "permute/x", {"v": 1})
    first.set("models", "flux-moe-l", {"v": 1})
    second = results.Results(path, {"date": "2", "commit": "b"})
    second.add("stages", "permute/x", {"v": 2})
    second.add("stages", "route/x", {"v": 3})
    content = results.load(path)
    assert [(row["id"], row["v"]) for row in content["stages"]] == [
        ("permute/x", 2),
        ("route/x", 3),
    ]
    assert content["skipped"] == []  # measured after all
    assert set(content["runs"]) == {"1 a", "2 b"}  # the model is still of the first run
    second.set("models", "flux-moe-l", {"v": 2})
    assert set(results.load(path)["runs"]) == {"2 b"}
    path.write_text('{"schema": "something/2"}')
    with pytest.raises(ValueError, match="something/2"):
        results.Results(path, {"date": "3", "commit": "c"})


def test_ceilings_belong_to_their_run(tmp_path):
    """A second run's ceilings leave those alone by which the first run's shares were taken."""
    path = tmp_path / "cpu.json"
    first = results.Results(path, {"date": "1", "commit": "a"})
    first.set_ceilings({"tflops": 1.0, "gbps": 10.0})
    first.add("stages", "route/x", {"v": 1})
    second = results.Results(path, {"date": "2", "commit": "b"})
    second.set_ceilings({"tflops": 2.0, "gbps": 20.0})
    second.add("stages", "permute/x", {"v": 1})
    content = results.load(path)
    tops = [content["runs"][row["run"]]["ceilings"]["tflops"] for row in content["stages"]]
    assert tops == [1.0, 2.0]
    assert content["ceilings"] == {"tflops": 2.0, "gbps": 20.0, "run": "2 b"}
    assert "ceilings" not in content["environment"]


def test_environment_and_file_name(monkeypatch):
    monkeypatch.setenv("D2M_COMMIT", "0123")
    record = env.environment(CPU)
    assert record["commit"] == "0123" and record["torch"] == torch.__version__
    names = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 PCIe": "h100",
             "NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA H20": "h20"}  # fmt: skip
    for name, slug in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert env.slug(torch.device("cuda")) == slug
    assert env.slug(CPU) == "cpu"


# --- compare --------------------------------------------------------------------------------


def results_file(path, ours, dense=(1.0, 1.1, 1.0, 1.05, 1.0)):
    content = results.empty()
    rows = {"moe_ffn": race.summary(list(ours)), "dense": race.summary(list(dense))}
    content["layers"].append({"id": "l", "seconds": rows})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


BASE = (0.40, 0.44, 0.40, 0.42, 0.40)  # 0.4 of dense in every round


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.01, "same"), (1.10, "slower"), (0.9, "faster")]
)
def test_compare_tells_changes_from_noise(tmp_path, factor, verdict):
    old = compare.collect(results_file(tmp_path / "a.json", BASE))
    new = compare.collect(results_file(tmp_path / "b.json", [t * factor for t in BASE]))
    lines, slower = compare.compare(old, new, 0.02)
    assert slower == (verdict == "slower")
    assert (verdict == "same") == (len(lines) == 1)
    assert verdict == "same" or lines[0].startswith(verdict)


def test_compare_ignores_a_machine_that_slowed_down(tmp_path):
    """Both contenders took half as long again: the ratio within rounds did not move."""
    old = compare.collect(results_file(tmp_path / "a.json", BASE))
    slow = [t * 1.5 for t in BASE]
    dense = [1.5, 1.65, 1.5, 1.575, 1.5]
    new = compare.collect(results_file(tmp_path / "b.json", slow, dense))
    assert compare.compare(old, new, 0.02)[1] == 0


def test_compare_does_not_judge_two_rounds(tmp_path):
    old = compare.collect(results_file(tmp_path / "a.json", BASE[:2], (1.0, 1.1)))
    new = compare.collect(results_file(tmp_path / "b.json", (0.8, 0.9), (1.0, 1.1)))
    lines, slower = compare.compare(old, new, 0.02)
    assert slower == 0 and "too few rounds" in lines[-1]


def test_compare_joins_the_runs_of_a_folder(tmp_path):
    for i in range(3):
        results_file(tmp_path / "runs" / f"{i}.json", BASE)
    (rounds,) = compare.collect(tmp_path / "runs").values()
    assert len(rounds) == 15
    with pytest.raises(SystemExit, match="no results"):
        compare.collect(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*b.json: No such file"),
        ("{", "b.json is no valid JSON"),
        ('{"schema": "something/2"}', "b.json: schema 'something/2', expected"),
        ("[]", "b.json: schema None, expected"),
        ('{"schema": "dense2moe-benchmarks/1"}', "b.json lacks the sections stages, "),
    ],
)
def test_compare_says_in_a_line_what_is_wrong_with_a_file(
    tmp_path, monkeypatch, capsys, text, message
):
    good, bad = results_file(tmp_path / "a.json", BASE), tmp_path / "b.json"
    if text is not None:
        bad.write_text(text)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(good), str(bad)])
    with pytest.raises(SystemExit, match=message) as stop:
        compare.main()
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code  # exit status 1
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_compare_says_in_a_line_what_git_said(tmp_path):
    """As a program: nothing was measured, no work tree stays behind, no traceback."""
    (tmp_path / "benchmarks/harness").mkdir(parents=True)
    for name in ("compare.py", "harness/race.py", "harness/results.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    def compared():
        return run(sys.executable, "benchmarks/compare.py", "--run", "no-such-branch", ".")

    if shutil.which("git") is None:
        pytest.skip("needs git")
    outside = compared()
    assert outside.returncode == 1 and "not a git repository" in outside.stderr
    run("git", "init", "-q")
    unknown = compared()
    assert unknown.returncode == 1 and unknown.stdout == ""
    assert "cannot check out 'no-such-branch'" in unknown.stderr
    for process in (outside, unknown):
        assert process.stderr.count("\n") == 1, process.stderr
    assert run("git", "worktree", "list").stdout.count("\n") == 1
