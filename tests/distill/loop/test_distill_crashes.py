"""Killed at any moment, out of disk, out of patience: nothing that was saved is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from helpers.ranks import IN_A_SAVE, die_in_a_save

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from distill import files as ckpt
from distill.configs.training import TrainConfig
from distill.errors import CheckpointError, UserError
from distill.loop import snapshots
from distill.loop.parallel import World
from distill.loop.train import read_log, train

CONFIG = TrainConfig(
    steps=120, batch_size=4, lr=1e-2, warmup=2, ema=0.9, log_every=6, save_every=3, keep=2
)
MACHINE = ("samples_per_second", "peak_memory_gib")


def model_and_objective(pause=0.0, on_step=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1)
    )

    def objective(step):
        if on_step:
            on_step(step)
        time.sleep(pause)
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return model, objective


def run(folder, config=CONFIG, pause=0.0, on_step=None):
    torch.set_num_threads(1)
    model, objective = model_and_objective(pause, on_step)
    torch.manual_seed(7)
    options = {"run_id": "id", "label": "test", "progress": False}
    return model, train(model, objective, config, folder, **options)


def spawn(target, *arguments):
    """A child that has torch imported already (a fork of a server that did nothing else)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.loop.train", "distill.loop.snapshots"])
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def stripped(folder):
    entries = read_log(folder / "log.jsonl")
    return [{k: v for k, v in e.items() if k not in MACHINE} for e in entries]


# --- kill -9 --------------------------------------------------------------------------------


def die_in_save(folder, moment):
    """Train, and die by SIGKILL at one moment of the third save."""
    die_in_a_save(moment)
    run(folder)


def train_slowly(folder):
    run(folder, pause=0.01)


def complete_and_readable(folder):
    """Steps of the complete checkpoints; each is read in full."""
    steps = []
    for path in snapshots.complete(folder):
        meta = snapshots.read_meta(path)
        from distill.loop.optimizer import Average, make_optimizer, optimizer_tensors, start_state

        model, _ = model_and_objective()
        params = dict(model.named_parameters())
        optimizer = make_optimizer(model, CONFIG)
        start_state(optimizer)
        names = {id(p): n for n, p in params.items()}
        state = snapshots.ckpt.pack("model", model.state_dict())
        state |= snapshots.ckpt.pack("optimizer", optimizer_tensors(optimizer, names))
        state |= snapshots.ckpt.pack("average", Average(params, 0.9).values)
        snapshots.load(path, state, World())
        assert state["optimizer/0.weight/step"] == meta["step"]
        steps.append(meta["step"])
    return steps


def test_kill_at_any_moment(tmp_path):
    """Ten deaths and more in one run, which then ends bit for bit like one that nobody killed."""
    folder, seen = tmp_path / "run", 0

    def check():
        nonlocal seen
        steps = complete_and_readable(folder)
        # never fewer than `keep`, once there were as many, and never an older newest one
        assert len(steps) >= min(CONFIG.keep, len(steps) if not seen else CONFIG.keep)
        assert steps[-1] >= seen and not any(s % CONFIG.save_every for s in steps)
        assert all(b - a == CONFIG.save_every for a, b in zip(steps, steps[1:], strict=False))
        seen = steps[-1]
        return steps

    for moment in IN_A_SAVE:
        process = spawn(die_in_save, folder, moment)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moment
        steps = check()
        unfinished = list(folder.glob(".step-*.tmp"))
        renamed = moment in IN_A_SAVE[3:]
        assert bool(unfinished) == (not renamed or moment == "half purged"), moment
        # between rename and purge there is one more
        assert len(steps) == CONFIG.keep + (moment in IN_A_SAVE[3:5]), moment
    for wait in (0.0, 0.03, 0.06, 0.1, 0.15):
        process = spawn(train_slowly, folder)
        deadline, newest = time.time() + 60, snapshots.newest(folder)
        while snapshots.newest(folder) == newest and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        check()
    assert seen < CONFIG.steps
    resumed, _ = run(folder)
    whole, _ = run(tmp_path / "whole")
    state = resumed.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in whole.state_dict().items())
    assert stripped(folder) == stripped(tmp_path / "whole")
    assert sorted(p.name for p in folder.iterdir()) == ["log.jsonl", "model.safetensors"]


# --- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_very_step_and_stops(tmp_path, number):
    """Between two checkpoints: step 5 of 3, 6, ...; the log's interval is not cut in two either."""
    folder = tmp_path / "run"
    handler = signal.getsignal(number)

    def on_step(step):
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run(folder, on_step=on_step)
    assert signal.getsignal(number) is handler
    assert snapshots.newest(folder).name == "step-0000005"
    assert (folder / "latest").read_text() == "step-0000005\n"
    resumed, _ = run(folder)
    whole, _ = run(tmp_path / "whole")
    state = resumed.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in whole.state_dict().items())
    assert stripped(folder) == stripped(tmp_path / "whole")


# --- a full disk ----------------------------------------------------------------------------


def limited(folder, queue):
    """No file may grow beyond 4 KiB: what a full disk is to the program."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        run(folder)
    except UserError as err:
        queue.put(str(err))


def test_a_file_that_cannot_be_written_is_one_message(tmp_path):
    folder = tmp_path / "run"

    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, on_step=stop)
    queue = multiprocessing.get_context("forkserver").Queue()
    process = spawn(limited, folder, queue)
    message = queue.get(timeout=600)
    process.join(60)
    assert "cannot write the checkpoint of step 9" in message and "step-0000006 remains" in message
    assert not list(folder.glob(".step-*")) and complete_and_readable(folder) == [3, 6]
    assert run(folder)[1][-1]["step"] == 120


@pytest.mark.parametrize("keeps_waiting", [True, False])
def test_full_disk(tmp_path, monkeypatch, keeps_waiting):
    """ENOSPC as the kernel says it, in a save that waits and in one beside the training."""
    config = replace(CONFIG, async_save=not keeps_waiting)
    real, writes = open, []

    def full(file, mode="r", *arguments, **options):
        if ".step-" in str(file) and "w" in mode and "shard" in str(file):
            writes.append(file)
            if len(writes) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr("io.open", full)
    monkeypatch.setattr("pathlib.io.open", full, raising=False)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.open", full, raising=False)
    with pytest.raises(UserError, match="step 9 .*No space left on device; step-0000006 remains"):
        run(tmp_path, config)
    monkeypatch.undo()
    assert complete_and_readable(tmp_path) == [3, 6] and not list(tmp_path.glob(".step-*"))


# --- checkpoints that are not what they were ------------------------------------------------


def test_damaged_checkpoint_says_what_to_do(tmp_path):
    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=stop)
    (file,) = (snapshots.newest(tmp_path) / "tensors").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="step-0000006 is damaged.*go on from step-0000003"):
        run(tmp_path)
    shutil.rmtree(snapshots.newest(tmp_path))
    assert run(tmp_path)[1][-1]["step"] == 120


def test_asynchronous_saves_give_the_same(tmp_path):
    config = replace(CONFIG, steps=12, async_save=True)

    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", config, on_step=stop)
    assert complete_and_readable(tmp_path / "run")[0] == 3
    resumed, _ = run(tmp_path / "run", config)
    whole, _ = run(tmp_path / "whole", replace(CONFIG, steps=12))
    state = resumed.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in whole.state_dict().items())


def test_an_asynchronous_save_is_a_checkpoint_once_it_is_written(tmp_path, monkeypatch):
    """Not an interval later, when the next one begins."""
    writers, seen, real = [], {}, snapshots.Snapshots.save

    def save(self, *arguments):
        writers.append(self)
        return real(self, *arguments)

    def on_step(step):
        deadline = time.time() + 60
        while step == 3 and writers[-1].writing() and time.time() < deadline:
            time.sleep(0.01)
        seen[step] = [p.name for p in snapshots.complete(tmp_path)]

    monkeypatch.setattr(snapshots.Snapshots, "save", save)
    run(tmp_path, replace(CONFIG, steps=6, async_save=True), on_step=on_step)
    assert seen[3] == [] and seen[4] == seen[5] == ["step-0000003"]


def test_a_checkpoint_that_is_in_the_way_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    """Killed in the middle of deleting it, it must not be taken for complete."""

    def stop(step):
        if step == 7:
            raise KeyboardInterrupt

    folder, aside = tmp_path / "run", tmp_path / "aside"
    with pytest.raises(KeyboardInterrupt):
        run(folder, on_step=stop)
    (folder / "step-0000006").rename(aside)
    deleted, real = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, *a, **k: deleted.append(p) or real(p, *a, **k))

    def put_back(step):
        assert step >= 3  # goes on from step 3
        if step == 4:
            aside.rename(folder / "step-0000006")
            (folder / "step-0000006" / "old").touch()
        if step == 6:
            assert not (folder / "step-0000006" / "old").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, on_step=put_back)
    assert complete_and_readable(folder) == [3, 6] and not list(folder.glob(".*"))
    assert deleted and all(path.name.startswith(".") for path in deleted)


@pytest.mark.parametrize("at", [6, 120])
def test_a_preview_that_fails_costs_nothing(tmp_path, at):
    """At a checkpoint's step and at the last one."""
    config = replace(CONFIG, preview_every=at)

    def preview(model, step):
        raise OSError(f"no place for the picture of step {step}")

    model, objective = model_and_objective()
    torch.manual_seed(7)
    options = {"run_id": "id", "label": "test", "progress": False}
    with pytest.raises(OSError, match=f"of step {at}"):
        train(model, objective, config, tmp_path / "run", preview=preview, **options)
    assert complete_and_readable(tmp_path / "run")[-1] == at
    resumed, _ = run(tmp_path / "run")
    whole, _ = run(tmp_path / "whole")
    state = resumed.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in whole.state_dict().items())
    assert stripped(tmp_path / "run") == stripped(tmp_path / "whole")


def test_accepted_settings_are_the_runs_from_then_on(tmp_path):
    """The next start is not refused, be the run finished or not."""
    options = {"label": "test", "progress": False}

    def go(run_id, stop_at=None, **more):
        def on_step(step):
            if step == stop_at:
                raise KeyboardInterrupt

        model, objective = model_and_objective(on_step=on_step)
        train(model, objective, CONFIG, tmp_path, run_id=run_id, **options, **more)
        return model.state_dict()

    with pytest.raises(KeyboardInterrupt):
        go("first", stop_at=8)
    with pytest.raises(KeyboardInterrupt):  # killed before it has saved anything of its own
        go("second", stop_at=6, accept_changed=True)
    with pytest.raises(CheckpointError, match="--accept-changed-config"):
        go("first")
    result = go("second")
    with pytest.raises(CheckpointError, match="--accept-changed-config"):
        go("third")
    for more in ({"accept_changed": True}, {}):
        again = go("third", stop_at=0, **more)
        assert all(torch.equal(v, again[k]) for k, v in result.items())
    assert ckpt.load_meta(tmp_path / "model.safetensors")["step"] == 120


def test_changed_settings_need_to_be_accepted(tmp_path):
    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=stop)
    model, objective = model_and_objective()
    options = {"run_id": "another", "label": "test", "progress": False}
    with pytest.raises(CheckpointError, match="--accept-changed-config"):
        train(model, objective, CONFIG, tmp_path, **options)
    log = train(model, objective, CONFIG, tmp_path, accept_changed=True, **options)
    assert [e["step"] for e in log][:2] == [6, 12]  # went on from step 6


# --- memory ---------------------------------------------------------------------------------


def peaks(queue):
    """Peak resident memory after 100 and after 500 steps of stage (b) on a small student."""
    import tempfile
    from pathlib import Path

    from helpers.ranks import models

    from distill.configs.sections import LossConfig
    from distill.loop.objective import Distillation
    from distill.stages import prepare_stage

    torch.set_num_threads(1)
    teacher, student, source = models("moe")
    frozen = prepare_stage(student, "moe")
    inner, found = source.batch, []

    def batch(seed, step, *arguments, **options):
        if step in (100, 499):
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return inner(seed, step, *arguments, **options)

    source.batch = batch
    config = TrainConfig(steps=500, batch_size=2, lr=1e-3, ema=0.9, log_every=10, save_every=20)
    objective = Distillation(teacher, student, source, LossConfig(), 2, 0)
    with tempfile.TemporaryDirectory() as folder:
        options = {"run_id": "id", "label": "test", "progress": False, "frozen": frozen}
        train(student, objective, config, Path(folder), **options)
    queue.put(found)


@pytest.mark.slow
def test_memory_does_not_creep():
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    queue = multiprocessing.get_context("forkserver").Queue()
    process = spawn(peaks, queue)
    early, late = queue.get(timeout=400)
    process.join(60)
    assert late <= 1.02 * early, (early, late)
