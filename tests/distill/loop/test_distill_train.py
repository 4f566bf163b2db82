"""The loop: a run that is stopped and continued equals one that was not; checkpoint files."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from distill import files as ckpt
from distill.configs.training import TrainConfig
from distill.errors import CheckpointError, TrainingError, UserError
from distill.loop import snapshots
from distill.loop.train import FrozenSlice, learning_rate, read_log, train

MACHINE = ("samples_per_second", "peak_memory_gib")
CONFIG = TrainConfig(steps=12, batch_size=4, lr=1e-2, warmup=2, ema=0.9, log_every=3)


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))


def _objective(model, stop_at=None):
    def objective(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()  # dropout: the global RNG counts
        return {"loss": loss, "twice": 2 * loss}

    return objective


def _train(folder, model=None, config=CONFIG, stop_at=None, **kwargs):
    model = _model() if model is None else model
    torch.manual_seed(7)
    options = {"run_id": "id", "label": "test", "progress": False, **kwargs}
    log = train(model, _objective(model, stop_at), config, folder, **options)
    return model, log


def _states_equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def _strip(log):
    return [{k: v for k, v in e.items() if k not in MACHINE} for e in log]


def _newest_step(folder):
    return snapshots.read_meta(snapshots.newest(folder))["step"]


# --- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [0, 1, 3, 4, 8, 11])
def test_resume_is_bit_exact(tmp_path, stop_at):
    whole, log = _train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", stop_at=stop_at)
    lost = stop_at - (_newest_step(tmp_path / "parts") if stop_at >= 3 else 0)
    assert lost <= CONFIG.log_every
    parts, resumed = _train(tmp_path / "parts")
    assert _states_equal(whole, parts)
    assert _strip(log) == _strip(resumed) and [e["step"] for e in log] == [3, 6, 9, 12]


def test_resume_needs_the_optimizer_and_rng(tmp_path):
    """The test above can fail: without Adam's moments or the dropout stream the result differs."""
    whole, _ = _train(tmp_path / "whole")
    for group in ("optimizer", "rng", "average"):
        folder = tmp_path / group
        with pytest.raises(KeyboardInterrupt):
            _train(folder, stop_at=8)
        newest = snapshots.newest(folder)
        if group == "rng":
            ckpt.save_tensors(newest / "rng-00000.safetensors", {"cpu": torch.get_rng_state()})
        else:
            (path,) = (newest / "tensors").glob("*.safetensors")
            _zero(path, f"{group}/")
        parts, _ = _train(folder)
        assert not _states_equal(whole, parts), group


@pytest.mark.parametrize("older", [False, True])
def test_python_and_numpy_streams_go_on(tmp_path, older):
    """An objective that draws from both; a checkpoint without them is read as well."""

    def run(folder, stop_at=None, seed=3):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        model = _model()
        inner, draws = _objective(model, stop_at), []

        def objective(step):
            parts = inner(step)
            draws.append((random.gauss(0, 1), np.random.standard_normal()))
            return {"loss": parts["loss"] * (1 + sum(map(abs, draws[-1])))}

        config = replace(CONFIG, save_every=5)  # in the middle of a pair of normal draws
        return train(model, objective, config, folder, run_id="i", label="t", progress=False), model

    whole, expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=8)
    newest = snapshots.newest(tmp_path / "parts")
    assert newest.name == "step-0000005"
    if older:
        ckpt.save_tensors(newest / "rng-00000.safetensors", {"cpu": torch.get_rng_state()})
    parts, model = run(tmp_path / "parts", seed=99)
    assert (_strip(parts) == _strip(whole)) == (not older)
    assert _states_equal(model, expected) == (not older)


def _zero(path, prefix):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert any(name.startswith(prefix) for name in tensors)
    for name in tensors:
        if name.startswith(prefix):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata=header)


def test_finished_run_is_not_trained_again(tmp_path):
    first, log = _train(tmp_path)
    again, same = _train(tmp_path, stop_at=0)
    assert _states_equal(first, again) and log == same
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "model.safetensors"]


def test_checkpoints_of_a_finished_run_are_removed(tmp_path):
    """Killed when the result was written and they were not gone yet."""
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "run", stop_at=8)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "run", kept)
    _train(tmp_path / "run")
    for path in kept.glob("*"):
        if path.name != "log.jsonl":
            path.rename(tmp_path / "run" / path.name)
    (tmp_path / "run" / ".step-0000009.tmp").mkdir()
    assert len(snapshots.complete(tmp_path / "run")) == 2
    _train(tmp_path / "run", stop_at=0)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["log.jsonl", "model.safetensors"]


def test_other_settings_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, stop_at=8)
    with pytest.raises(CheckpointError, match="other settings"):
        _train(tmp_path, run_id="another")
    _train(tmp_path)
    with pytest.raises(CheckpointError, match="other settings"):
        _train(tmp_path, run_id="another")


def test_log_lines_after_the_checkpoint_are_dropped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path, stop_at=8)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1e9}\n{"step": 12, "lo')
    assert len(read_log(tmp_path / "log.jsonl")) == 3
    _, log = _train(tmp_path)
    assert [e["step"] for e in log] == [3, 6, 9, 12] and log[2]["loss"] < 1e9


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {root!r})
from tests_train import _model, _objective, CONFIG
from dataclasses import replace
from distill.loop.train import train
torch.set_num_threads(1)
model = _model()
inner = _objective(model)
def objective(step):
    time.sleep(0.02)
    return inner(step)
torch.manual_seed(7)
config = replace(CONFIG, steps=120)
train(model, objective, config, sys.argv[1], run_id="id", label="t", progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_killed_process_continues_to_the_same_result(tmp_path, sig):
    (tmp_path / "tests_train.py").write_text(Path(__file__).read_text())
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(tmp_path)))
    folder = tmp_path / "run"
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
    deadline = time.time() + 600
    while not snapshots.complete(folder):
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(sig)
    process.communicate(timeout=60)
    assert process.returncode != 0
    step = _newest_step(folder)
    assert 0 < step < 120 and not (folder / "model.safetensors").exists()
    subprocess.run(command, env=env, check=True, timeout=600)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, log = _train(tmp_path / "whole", config=replace(CONFIG, steps=120))
    finally:
        torch.set_num_threads(threads)
    tensors, _ = ckpt.load_tensors(folder / "model.safetensors")
    assert all(torch.equal(v, tensors[k]) for k, v in whole.state_dict().items())
    assert _strip(log) == _strip(read_log(folder / "log.jsonl"))


# --- the loop -------------------------------------------------------------------------------


def test_schedule():
    config = TrainConfig(steps=10, batch_size=1, lr=1.0, warmup=1)
    factors = [learning_rate(config, s) for s in range(10)]
    assert factors[0] == pytest.approx(0.5)
    assert factors[5] == pytest.approx(0.5) and factors[9] < 0.03
    constant = TrainConfig(steps=10, batch_size=1, lr=1.0, warmup=3, schedule="constant")
    assert [learning_rate(constant, s) for s in (0, 1, 2, 3, 9)] == [0.25, 0.5, 0.75, 1, 1]


def test_log_holds_means_of_all_parts(tmp_path):
    config = TrainConfig(steps=4, batch_size=2, lr=1e-9, warmup=0, log_every=2, weight_decay=0.0)
    model = _model().eval()
    values = [_objective(model)(s)["loss"].item() for s in range(4)]
    _, log = _train(tmp_path, model=model, config=config)
    assert [e["loss"] for e in log] == pytest.approx(
        [sum(values[:2]) / 2, sum(values[2:]) / 2], rel=1e-4
    )
    assert log[0]["twice"] == pytest.approx(2 * log[0]["loss"])
    assert {"step", "lr", "grad_norm", "samples_per_second"} <= set(log[0])


def test_ema_is_the_result(tmp_path):
    averaged, _ = _train(tmp_path / "a")
    last, _ = _train(tmp_path / "b", config=TrainConfig(**{**CONFIG.__dict__, "ema": None}))
    assert not _states_equal(averaged, last)


def test_router_learning_rate_and_decay_groups():
    from distill.loop.train import make_optimizer

    model = torch.nn.Module()
    model.router = torch.nn.Linear(4, 2, bias=False)
    model.up = torch.nn.Linear(4, 2)
    config = TrainConfig(steps=1, batch_size=1, lr=1e-3, router_lr_scale=7.0, weight_decay=0.3)
    frozen = [FrozenSlice("up.weight", 0, 0, 1)]
    groups = {
        id(p): g for g in make_optimizer(model, config, frozen).param_groups for p in g["params"]
    }
    assert groups[id(model.router.weight)]["scale"] == 7.0
    assert groups[id(model.router.weight)]["weight_decay"] == 0
    assert groups[id(model.up.weight)]["weight_decay"] == 0  # decayed slice by slice instead
    whole = {id(p): g for g in make_optimizer(model, config).param_groups for p in g["params"]}
    assert whole[id(model.up.weight)]["weight_decay"] == 0.3
    assert whole[id(model.up.bias)]["weight_decay"] == 0


def _spoilt(model, bad):
    inner = _objective(model)

    def objective(step):
        parts = inner(step)
        return {"loss": parts["loss"] * (math.nan if step in bad else 1)}

    return objective


def test_non_finite_steps_change_nothing_and_are_counted(tmp_path, capsys):
    """The result is that of the same run in which the bad step's update never happens."""
    model, frozen = _model().eval(), {}

    def objective(step):
        if step == 6:
            frozen.update({k: v.clone() for k, v in model.state_dict().items()})
        if step == 8:  # steps 6 and 7 were skipped
            assert all(torch.equal(v, frozen[k]) for k, v in model.state_dict().items())
        return _spoilt(model, {6, 7})(step)

    options = {"run_id": "id", "label": "test", "progress": False}
    log = train(model, objective, CONFIG, tmp_path, **options)
    assert [e.get("skipped", 0) for e in log] == [0, 0, 2, 2]
    assert all(math.isfinite(e["loss"]) for e in log)
    assert all(v.isfinite().all() for v in model.state_dict().values())
    err = capsys.readouterr().err
    assert "step 6 skipped, not finite" in err and "step 7 skipped" in err


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path):
    model = _model().eval()

    def objective(step):
        x = next(model.parameters()).sum()
        broken = torch.sqrt(x - x) if step == 2 else 0 * x  # value 0, derivative infinite or NaN
        return {"loss": _objective(model)(step)["loss"] + broken}

    log = train(model, objective, CONFIG, tmp_path, run_id="id", label="t", progress=False)
    assert log[-1]["skipped"] == 1 and all(p.isfinite().all() for p in model.parameters())


def test_too_many_bad_steps_stop_with_the_last_good_state(tmp_path):
    model = _model().eval()
    config = replace(CONFIG, max_bad_steps=2, log_every=100, save_every=100)
    options = {"run_id": "id", "label": "test", "progress": False}
    with pytest.raises(TrainingError, match="3 steps in a row.*step 9.*step-0000010"):
        train(model, _spoilt(model, {4, 7, 8, 9, 10}), config, tmp_path, **options)
    assert _newest_step(tmp_path) == 10
    fresh = _model().eval()
    log = train(fresh, _spoilt(fresh, {4}), config, tmp_path, **options)  # goes on with batch 10
    assert log[-1]["skipped"] == 4 and log[-1]["step"] == 12


def test_nothing_to_train(tmp_path):
    model = _model().requires_grad_(False)
    with pytest.raises(TrainingError, match="every parameter is frozen"):
        _train(tmp_path, model=model)


# --- checkpoint files -----------------------------------------------------------------------


def test_round_trip(tmp_path):
    tensors = {"a/b": torch.randn(3, 4).t(), "n": torch.tensor(3)}
    ckpt.save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "run": "r"})
    back, meta = ckpt.load_tensors(tmp_path / "x.safetensors")
    assert meta == {"step": 3, "run": "r"} and all(
        torch.equal(v, back[k]) for k, v in tensors.items()
    )
    assert ckpt.unpack("a", back).keys() == {"b"}


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    ckpt.save_tensors(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="x.safetensors is truncated"):
        ckpt.load_tensors(path)


def test_foreign_and_missing_checkpoint(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="format None"):
        ckpt.load_tensors(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        ckpt.load_tensors(tmp_path / "none.safetensors")


def test_checkpoint_of_another_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing \['0.bias'.*unknown \['x'\]"):
        ckpt.load_state(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"x": torch.zeros(1)}, "file")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    ckpt.write_text(path, "old")

    def broken(tmp):
        tmp.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckpt.write_atomic(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def broken_folder(tmp):
        (tmp / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        ckpt.write_folder(tmp_path / "model", broken_folder)
    assert list(tmp_path.iterdir()) == [path]


def test_write_folder(tmp_path):
    ckpt.write_folder(tmp_path / "m", lambda tmp: (tmp / "a").write_text("x"))
    assert (tmp_path / "m/a").read_text() == "x"
    with pytest.raises(UserError, match="already exists and is not empty"):
        ckpt.write_folder(tmp_path / "m", lambda tmp: None)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into the folder"):
        ckpt.make_folder(tmp_path / "file" / "below")


def test_fingerprint_changes_with_any_setting():
    assert ckpt.fingerprint({"a": 1}, 2) == ckpt.fingerprint({"a": 1}, 2)
    assert ckpt.fingerprint({"a": 1}) != ckpt.fingerprint({"a": 2})
    assert json.dumps(ckpt.fingerprint("x"))
