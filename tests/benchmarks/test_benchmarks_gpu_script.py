"""benchmarks/gpu.sh, rehearsed without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

from harness import results

CPU = torch.device("cpu")
GPU_WHEELS = ROOT / "benchmarks" / "gpu-wheels.txt"


@pytest.mark.slow
def test_gpu_script_rehearsal(tmp_path):
    """The script of the GPU machine runs here from end to end, with tiny sizes."""
    pytest.importorskip("pytest_benchmark")
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--rehearse", "--only", "host",
               "stages"]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert run.returncode == 0, run.stdout + log[-3000:]
    content = results.load(tmp_path / "out" / "cpu.json")
    stages = {row["stage"] for row in content["stages"]}
    assert stages == {"route", "permute", "combine", "grouped_gemm_up", "grouped_gemm_down"}
    kinds = {row["id"].rsplit("/", 1)[-1] for row in content["host"]}
    assert {"forward", "forward_backward"} <= kinds and content["environment"]["size"] == "tiny"
    assert "build" not in run.stdout and "host" in run.stdout


@pytest.mark.slow
def test_the_first_run_is_rehearsed(tmp_path):
    """Every stage in a process of its own, right and alike twice; every pin is understood."""
    pytest.importorskip("triton")
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--rehearse", "--only", "first"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert run.returncode == 0 and "ignored" not in log, run.stdout + log[-3000:]
    content = json.loads((tmp_path / "out" / "first.json").read_text())
    assert [len(attempts) for attempts in content["stages"].values()] == [1] * 4
    assert set(content["pins"]) == {"forward", "backward"}


@pytest.mark.slow
def test_gpu_script_rehearses_models_and_distillation(tmp_path):
    """A whole model in the modes that a CPU has, and a training step of each kind."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--rehearse", "--only",
               "models", "distill"]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                   "PYTEST_ADDOPTS": "-k 'flux-moe-s or shared or block_step'"}  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment,
                         timeout=600)  # fmt: skip
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert run.returncode == 0, run.stdout + log[-3000:]
    content = results.load(tmp_path / "out" / "cpu.json")
    assert [row["id"] for row in content["distillation"]] == ["digits/shared", "flux-double-block"]
    assert all(row["samples_per_second"] > 0 for row in content["distillation"])
    models = content["models"]
    assert set(models) == {"flux-dense", "flux-moe-s"} and content["skipped"] == []
    for model in models.values():
        assert model["mode"] == "compile" and model["latency_ratio"] > 0
        for mode in ("eager", "compile"):
            entry = model["modes"][mode]
            assert set(entry["image_seconds"]) == {"28", "8"}
            assert entry["peak_bytes"] > model["model_bytes"] and entry["step_seconds"] > 0
    assert models["flux-moe-s"]["modes"]["graphs"] == {
        "unavailable": "RuntimeError: CUDA graphs need a GPU"
    }
    assert models["flux-moe-s"]["latency_over_ideal"] > 0


@pytest.mark.slow
def test_gpu_script_without_packages_says_what_was_not_measured(tmp_path):
    """diffusers and scikit-learn are blocked: every record that needs them is there as skipped."""
    pytest.importorskip("pytest_benchmark")
    blocked = "import sys; sys.modules['diffusers'] = sys.modules['sklearn'] = None"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    out = tmp_path / "out"
    command = ["bash", "benchmarks/gpu.sh", str(out), "--rehearse", "--only", "models", "blocks",
               "distill"]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(tmp_path)}  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment,
                         timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stdout + (out / "gpu.log").read_text()[-3000:]
    skipped = {row["id"]: row["why"] for row in results.load(out / "cpu.json")["skipped"]}
    assert set(skipped) == {
        *(f"flux-moe-{name}" for name in ("l", "m", "s", "xs")),
        *(f"digits/{stage}" for stage in ("shared", "moe", "mob")),
        "double/16+8", "single/16+8", "flux-double-block",
    }  # fmt: skip
    assert all(why.startswith("needs diffusers: ") for why in skipped.values())


def test_wheels_of_the_gpu_machine_are_all_listed():
    """What a listed package depends on is listed, or comes with torch, triton, numpy or pytest."""
    requirements = pytest.importorskip("packaging.requirements")

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    def needs(name):
        for text in metadata.requires(name) or []:
            requirement = requirements.Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield plain(requirement.name)

    def there(name):
        return any(metadata.distributions(name=name))

    listed = dict(re.findall(r"^(\S+)==(\S+)", GPU_WHEELS.read_text(), re.M))
    given, waiting = set(), ["torch", "triton", "numpy", "pytest"]
    while waiting:
        name = waiting.pop()
        if name not in given and there(name):
            waiting.extend(needs(name))
        given.add(name)
    assert given & set(listed) == {"setuptools"}  # torch has it, but any version of it will do
    known = [n for n, pin in listed.items() if there(n) and metadata.version(n) == pin]
    if not known:
        pytest.skip("none of the listed versions is installed")
    for name in known:
        lacking = set(needs(name)) - set(listed) - given
        assert not lacking, f"{name} needs {lacking}"


def test_gpu_script_help_is_its_comment():
    run = subprocess.run(["bash", "benchmarks/gpu.sh", "--help"], cwd=ROOT, capture_output=True,
                         text=True)  # fmt: skip
    assert run.returncode == 0 and run.stdout.startswith("Everything on a GPU in one go")
    assert run.stdout.rstrip().endswith("its numbers mean nothing.")
    assert not re.search(r"[{}$]|^set ", run.stdout, re.M), "shell code"


def test_gpu_script_lists_the_wheels_that_a_machine_lacks(tmp_path):
    def missing(*options):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" {" ".join(options)} "$@"\n')
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        run = subprocess.run(["bash", "benchmarks/gpu.sh", "--missing"], cwd=ROOT, text=True,
                             capture_output=True, env=environment)  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    listed = re.findall(r"^\S+==.*", GPU_WHEELS.read_text(), re.M)
    assert missing("-S", "-E") == listed  # a python without any package
    lacking = {line.split("==")[0] for line in missing()}
    there = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in metadata.distributions()}
    absent = {line.split("==")[0] for line in listed} - set(there)
    assert absent <= lacking
    for name in lacking - absent:
        least = re.search(rf"^{name}==.*# (\S+) or later$", GPU_WHEELS.read_text(), re.M)
        assert least and there[name] != least.group(1), f"{name} {there[name]} is there"

    old = tmp_path / "old" / "setuptools-65.5.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Name: setuptools\nVersion: 65.5.1\n")
    (tmp_path / "old" / "pybind11-2.13.0.dist-info").mkdir()
    (tmp_path / "old" / "pybind11-2.13.0.dist-info" / "METADATA").write_text(
        "Name: pybind11\nVersion: 2.13.0\n"
    )
    (tmp_path / "start.py").write_text(
        f"import sys; del sys.argv[0]; sys.path.append({str(tmp_path / 'old')!r})\n"
        "exec(sys.stdin.read())\n"
    )
    left = missing("-S", "-E", str(tmp_path / "start.py"))
    assert left == [line for line in listed if not line.startswith("pybind11==")]


def test_gpu_script_refuses_what_it_does_not_know():
    for arguments in (["out", "--only", "nonsense"], ["--nonsense"], []):
        run = subprocess.run(["bash", "benchmarks/gpu.sh", *arguments], cwd=ROOT,
                             capture_output=True, text=True)  # fmt: skip
        assert run.returncode == 2, arguments
