"""tests/gpu/run.sh rehearsed without a GPU: parts, shards, verdicts and its limit of time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "gpu" / "run.sh"


@pytest.fixture(scope="module")
def sharding():
    spec = importlib.util.spec_from_file_location("gpu_conftest", ROOT / "tests/gpu/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rehearse(tmp_path, python: str, **settings):
    """run.sh with a `python3` of our own in front and no sanitizer: (exit status, what it said)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (tools / "python3").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("D2M_")}
    env |= {"PATH": f"{tools}:/usr/bin:/bin", "D2M_SHARDS": "3"} | settings
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")], env=env, timeout=120, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def verdicts(said: str) -> dict[str, int]:
    return {n: int(rc) for n, rc in re.findall(r"^(\S+) +rc=(\d+) ", said, re.MULTILINE)}


PARTS = {"build", "report", "kernels", "triton-0", "triton-1", "triton-2", "cuda-0", "cuda-1"}


def test_every_part_runs_and_is_told_of(tmp_path):
    rc, said = rehearse(tmp_path, 'echo "$D2M_SHARD $D2M_TEST_BACKENDS $PYTHONPATH: $*"')
    assert verdicts(said) == dict.fromkeys(PARTS, 0) and rc == 0, said
    logs = {p.stem: p.read_text() for p in (tmp_path / "out").glob("*.log")}
    assert set(logs) == PARTS
    for name, backends, count in (("triton", "triton,torch", 3), ("cuda", "cuda", 2)):
        for i in range(count):
            assert logs[f"{name}-{i}"].startswith(f"{i}/{count} {backends} {ROOT}:{ROOT}/tests")
            assert "tests/gpu" in logs[f"{name}-{i}"].split(": ")[1]
    assert "--target" in logs["build"] and "tests/gpu/sanitize.py" in logs["kernels"]
    assert logs["cuda-0"].split(": ")[0].endswith("/out/site")  # what the build has made


def test_one_failing_shard_fails_the_script(tmp_path):
    python = 'case "$D2M_SHARD" in 1/3) exit 1;; 0/3) exit 5;; esac'  # 5: a shard without a test
    rc, said = rehearse(tmp_path, python, D2M_GPU_BUILD="0")
    assert rc == 1 and "failed or cut short: triton-1 (see" in said, said
    assert verdicts(said) == dict.fromkeys(PARTS - {"build"}, 0) | {"triton-1": 1}


def test_ends_in_time_with_what_it_has(tmp_path):
    start = time.monotonic()
    rc, said = rehearse(
        tmp_path, 'echo so far; case "$*" in *pytest*) exec sleep 60;; esac', D2M_GPU_SECONDS="3"
    )
    assert time.monotonic() - start < 40
    late = {name for name, code in verdicts(said).items() if code == 124}
    assert rc == 1 and late >= {"triton-0", "triton-1", "triton-2", "cuda-0", "cuda-1"}, said
    assert all(f"{name} " in said.splitlines()[-1] for name in late)
    assert "so far" in (tmp_path / "out" / "triton-0.log").read_text()


def test_pytest_that_is_cut_short_says_what_has_passed(tmp_path):
    """INT from a shell's background, where it is ignored unless somebody asks for it."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests/gpu/conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\n"
    )
    command = f"timeout -s INT -k 20 5 {sys.executable} -m pytest -v {tmp_path} & wait $!"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert "test_quick PASSED" in done.stdout and "KeyboardInterrupt" in done.stdout, done.stdout
    assert "1 passed" in done.stdout


def item(name, **params):
    return SimpleNamespace(
        originalname=name.split("[")[0], name=name, callspec=SimpleNamespace(params=params)
    )


def test_shards_part_the_tests_and_keep_the_same_kernels_together(sharding):
    items = [
        item(f"test_shapes[{T}-{D}-{b}]", T=T, D=D, backend=b)
        for T in (0, 1, 127) for D in (1, 5, 33, 100) for b in ("triton", "cuda", "torch")
    ]  # fmt: skip
    items += [SimpleNamespace(name="test_alone", originalname="test_alone")]
    for backends in ("", "triton,torch", "cuda"):
        whole = sharding.keep(items, backends=backends)
        parts = [sharding.keep(items, f"{i}/4", backends) for i in range(4)]
        assert sorted(i.name for part in parts for i in part) == sorted(i.name for i in whole)
        groups = [{sharding.same_kernels(i) for i in part} for part in parts]
        assert sum(map(len, groups)) == len(set().union(*groups))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert "test_alone" in {i.name for i in sharding.keep(items, backends="triton,torch")}
    assert "test_alone" not in {i.name for i in sharding.keep(items, backends="cuda")}
    with pytest.raises(ValueError, match="expected I/N with 0 <= I < N"):
        sharding.keep(items, "4/4")
