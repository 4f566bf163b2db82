"""Several processes (gloo, FSDP2): the same result as one, whatever joins, leaves or dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.ranks import ROOT, environment, models, torchrun

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from safetensors.torch import load_file

from distill.configs.training import ParallelConfig
from distill.errors import ConfigError
from distill.loop import snapshots
from distill.loop.parallel import World, start_world
from distill.loop.progress import read_log

slow = pytest.mark.slow
LIMIT = 1200  # seconds after which a run that hangs is ended


def launch(jobs, processes, folder, check=True, **options):
    """Run jobs on so many ranks; returns (exit status, output)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([{"folder": str(folder), "kind": "moe", **j} for j in jobs]))
    arguments = [str(ROOT / "tests/helpers/ranks.py"), str(path)]
    command = [sys.executable, *arguments]
    if processes > 1:
        command = torchrun(processes, *arguments, **options)
    status, output = execute(command)
    assert not check or status == 0, output[-3000:]
    return status, output


def execute(command, **options):
    """(exit status, output) of a command; if it hangs, it and all its children are ended."""
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **{"env": environment(), **options},
    )
    try:
        output, _ = run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        run.terminate()  # torchrun ends its workers, which are in sessions of their own
        try:
            output, _ = run.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, 9)
            output, _ = run.communicate()
        raise AssertionError(f"hung: {output[-3000:]}") from None
    return run.returncode, output


def result(folder):
    return load_file(folder / "model.safetensors")


def close(ours, reference, start, share=1e-3):
    """Equal up to rounding: a small share of what training has changed."""
    for name, value in reference.items():
        if value.is_floating_point():
            moved = (value - start[name]).norm()
            assert (ours[name] - value).norm() <= share * moved + 1e-7, name
        else:
            assert torch.equal(ours[name], value), name


def losses(folder):
    return [[e[k] for k in ("loss", "feature", "balance")] for e in read_log(folder / "log.jsonl")]


TRAIN = {"ema": 0.5, "weight_decay": 0.5, "log_every": 2}
PARTS = {"micro_batch": 1, "gradient_checkpointing": True}
HUNDRED = {"steps": 100, "batch_size": 2, "ema": 0.9, "weight_decay": 0.5, "log_every": 50}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder with the runs of one process, moe and mob."""
    folder = tmp_path_factory.mktemp("alone")
    jobs = [{"folder": str(folder / k), "kind": k, "train": TRAIN} for k in ("moe", "mob")]
    launch(jobs, 1, folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder with runs of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        "moe": {"train": TRAIN},
        "mob": {"kind": "mob", "train": {**TRAIN, **PARTS}},
        "poisoned": {"train": TRAIN, "poison": {"rank": 1, "step": 3}},
    }
    launch([{"folder": str(folder / k), **job} for k, job in jobs.items()], 2, folder)
    return folder


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """Folder with a hundred steps of every stage on two ranks."""
    folder = tmp_path_factory.mktemp("hundred")
    kinds = ("shared", "moe", "mob")
    jobs = [{"folder": str(folder / k), "kind": k, "train": HUNDRED} for k in kinds]
    launch(jobs, 2, folder)
    return folder


def equal(ours, reference):
    close(result(ours), result(reference), load_file(reference / "before.safetensors"))
    for mine, theirs in zip(losses(ours), losses(reference), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@slow
@pytest.mark.parametrize("kind", ["moe", "mob"])
def test_two_ranks_equal_one_process(alone, two, kind):
    """mob also in parts of one sample, with gradient checkpointing."""
    equal(two / kind, alone / kind)


@slow
def test_a_bad_batch_on_one_rank_is_skipped_by_all(two):
    """Were it skipped on one alone, the ranks would wait for each other for ever."""
    log = read_log(two / "poisoned" / "log.jsonl")
    assert [e.get("skipped", 0) for e in log] == [0, 1, 1]
    assert all(v.isfinite().all() for v in result(two / "poisoned").values())


@slow
def test_hybrid_sharding_equals_one_process(alone, tmp_path):
    """Parameters sharded over two ranks, in two copies."""
    job = {"kind": "mob", "train": TRAIN, "parallel": {"shard": 2, "replicate": 2}}
    launch([job], 4, tmp_path)
    equal(tmp_path, alone / "mob")


@slow
@pytest.mark.parametrize(("stage", "frozen"), [("shared", "experts"), ("moe", "shared")])
def test_frozen_slices_stay_bitwise_for_a_hundred_steps_when_sharded(hundred, stage, frozen):
    from distill.stages import ffn_slices

    folder = hundred / stage
    before, after = load_file(folder / "before.safetensors"), result(folder)
    _, student, _ = models(stage)
    for part in ("shared", "experts"):
        slices = ffn_slices(student, part)
        assert slices
        for f in slices:
            old, new = (s[f.name].narrow(f.dim, f.start, f.stop - f.start) for s in (before, after))
            assert torch.equal(old, new) == (part == frozen), f


@slow
def test_isolated_blocks_stay_bitwise_for_a_hundred_steps_when_sharded(hundred):
    folder = hundred / "mob"
    before, after = load_file(folder / "before.safetensors"), result(folder)
    grouped = ("single_transformer_blocks.1.", "single_transformer_blocks.2.")
    for part, moves in (("transformer_blocks.", False), ("single_transformer_blocks.", None)):
        names = [n for n in before if n.startswith(part) and not n.endswith("neuron_order")]
        assert names
        for name in names:
            moved = not torch.equal(before[name], after[name])
            assert moved == (name.startswith(grouped) if moves is None else moves), name


@slow
def test_four_then_two_then_four_ranks(alone, tmp_path):
    """A signal to one rank stops all with a checkpoint that any number of ranks continues."""
    folder = tmp_path / "run"
    plan = [(4, {"rank": 3, "step": 1}, 2), (2, {"rank": 1, "step": 3}, 4), (4, None, None)]
    for processes, stop, done in plan:
        job = {"kind": "mob", "train": TRAIN, "record": True, "stop": stop}
        status, output = launch([job], processes, folder, check=stop is None)
        if stop is not None:
            assert status != 0 and snapshots.newest(folder).name == f"step-{done:07d}", output
    seen: dict[int, list[int]] = {}
    for path in folder.glob("samples-*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            seen.setdefault(entry["step"], []).extend(entry["samples"])
    _, _, digits = models("moe")
    for step in range(6):
        assert sorted(seen[step]) == sorted(digits.epochs(0, step, 8).tolist())
    equal(folder, alone / "mob")


@slow
def test_a_dead_rank_ends_all_and_a_restart_goes_on_from_the_checkpoint(alone, tmp_path):
    """Killed at step 3, restarted by torchrun, killed again at step 5: the job ends; one process
    finishes it.
    """
    deaths = [{"rank": 1, "step": 3}, {"rank": 1, "step": 5}]
    job = {"train": TRAIN, "record": True, "die": deaths}
    status, output = launch([job], 2, tmp_path, check=False, max_restarts="1")
    ended = time.time() - (tmp_path / "died1").stat().st_mtime
    assert status != 0 and ended < 15, output  # 1.1 s on a machine with six busy processes
    assert snapshots.newest(tmp_path).name == "step-0000004"
    lines = (tmp_path / "samples-2-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2, 3, 4]
    launch([job], 1, tmp_path)
    equal(tmp_path, alone / "moe")


@slow
def test_a_full_disk_on_one_rank_ends_the_save_on_all(alone, tmp_path):
    job = {"train": TRAIN, "full": {"rank": 1, "step": 4}}
    status, output = launch([job], 2, tmp_path, check=False)
    assert status != 0, output
    texts = [(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert "another process could not write its part; step-0000002 remains" in texts[0]
    assert "No space left on device; step-0000002 remains" in texts[1]
    first, second = sorted(float(text.split()[0]) for text in texts)
    assert second - first < 30
    assert [p.name for p in tmp_path.glob("*step-*")] == ["step-0000002"]
    launch([{"train": TRAIN}], 2, tmp_path)
    equal(tmp_path, alone / "moe")


SMALL = """
teacher:
  num_layers: 2
  num_single_layers: 4
  heads: 2
  head_dim: 8
  rope: [2, 2, 4]
  train: {steps: 4, batch_size: 8, lr: 1.0e-3}
student:
  initialisation: coactivation
  routers: fitted
  importance_batches: 1
  calibration: 64
  structure:
    moe: {shared_ratio: 1.0, expert_ratio: 0.25, num_experts: 12, top_k: 2}
    dense_double_blocks: [0]
    adaln_dim: 8
    mob: {single_groups: [[1, 2]]}
stages:
  - {stage: shared, train: {steps: 2, batch_size: 8, lr: 1.0e-3, preview_every: 2}}
  - {stage: moe, train: {steps: 2, batch_size: 8, lr: 1.0e-3, compute_dtype: bfloat16}}
  - {stage: mob, train: {steps: 2, batch_size: 8, lr: 1.0e-3, async_save: true, save_every: 1}}
"""


@slow
def test_all_stages_by_torchrun(tmp_path):
    """`torchrun --nproc-per-node 2 -m distill CONFIG.yaml` writes what one process writes."""
    (tmp_path / "small.yaml").write_text(SMALL)
    for processes, out in ((2, "two"), (1, "one")):
        arguments = ["-m", "distill", "small.yaml", "--out", out, "--device", "cpu"]
        command = torchrun(processes, *arguments) if processes > 1 else [sys.executable, *arguments]
        env = environment(D2M_CACHE=str(tmp_path / "cache"))
        status, output = execute(command, env=env, cwd=tmp_path)
        assert status == 0, output[-3000:]
        assert output.count(f"wrote {out}/model") == 1
    name = "diffusion_pytorch_model.safetensors"
    two, one = (load_file(tmp_path / out / "model" / name) for out in ("two", "one"))
    assert two.keys() == one.keys()
    for key in one:
        assert (two[key].float() - one[key].float()).norm() <= 5e-3 * one[key].float().norm(), key
    assert (tmp_path / "two/shared/previews/step-0000002.png").exists()
    settings = [(tmp_path / out / "settings.json").read_text() for out in ("two", "one")]
    assert settings[0] == settings[1]


FAST = """
teacher:
  num_layers: 1
  num_single_layers: 2
  heads: 2
  head_dim: 8
  rope: [2, 2, 4]
  train: {steps: 4, batch_size: 8, lr: 1.0e-3}
student:
  importance_batches: 1
  calibration: 64
  structure:
    moe: {shared_ratio: 1.0, expert_ratio: 0.25, num_experts: 12, top_k: 2}
    dense_double_blocks: []
    adaln_dim: 8
    mob: {single_groups: [[0, 1]]}
stages:
  - {stage: moe, train: &train {steps: 2, batch_size: 8, lr: 1.0e-3, warmup: 0, ema: 0.5,
     log_every: 1, compute_dtype: bfloat16, gradient_checkpointing: SPEED, compile: SPEED}}
  - {stage: mob, train: *train}
"""


@slow
def test_what_the_ready_configurations_combine(tmp_path):
    """Two stages, compiled, recomputed, in bf16, averaged, sharded: as one process in bf16."""
    (tmp_path / "fast.yaml").write_text(FAST.replace("SPEED", "true"))
    (tmp_path / "plain.yaml").write_text(FAST.replace("SPEED", "false"))
    env = environment(D2M_CACHE=str(tmp_path / "cache"))
    for name, processes in (("plain", 1), ("fast", 2)):
        arguments = [str(ROOT / "tests/helpers/ranks.py"), "distill", f"{name}.yaml", "--out", name]
        arguments += ["--device", "cpu"]
        command = torchrun(processes, *arguments) if processes > 1 else [sys.executable, *arguments]
        status, output = execute(command, env=env, cwd=tmp_path)
        assert status == 0, output[-3000:]
    for stage in ("moe", "mob"):
        fast, plain = (losses(tmp_path / out / stage) for out in ("fast", "plain"))
        assert len(fast) == len(plain) == 2
        for mine, theirs in zip(fast, plain, strict=True):
            assert mine == pytest.approx(theirs, rel=0.02)
    name = "model/diffusion_pytorch_model.safetensors"
    fast, plain = (load_file(tmp_path / out / name) for out in ("fast", "plain"))
    assert fast.keys() == plain.keys()
    for key, value in plain.items():
        assert (fast[key].float() - value.float()).norm() <= 0.03 * value.float().norm(), key


# --- what needs no processes ----------------------------------------------------------------


def test_rows_cover_the_batch_once():
    for size in (1, 2, 4):
        for micro in (None, 1, 3, 8, 100):
            each = [World(r, size).rows(16, micro) for r in range(size)]
            assert len({len(parts) for parts in each}) == 1  # ranks gather parameters together
            rows = [i for parts in each for p in parts for i in range(16)[p]]
            assert rows == list(range(16))
            if micro:
                assert all(p.stop - p.start <= micro for parts in each for p in parts)
    with pytest.raises(ConfigError, match="batch_size is 10.*multiple of their number, 4"):
        World(0, 4).rows(10)


def test_parallel_settings_need_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="this is one process; start it with torchrun"):
        start_world(ParallelConfig(shard=2), "cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="3 x 1; expected the number of processes, 4"):
        start_world(ParallelConfig(shard=3), "cpu")
