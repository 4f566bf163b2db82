"""Two ranks (gloo, FSDP2) that are killed inside a save, or stopped: nothing lost, bit for bit.

The ranks are forked from a process that has imported everything, so that many lives are cheap.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import time

import pytest
import torch
from helpers.ranks import free_port, one_of

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from safetensors.torch import load_file

from distill.loop import snapshots
from distill.loop.parallel import World
from distill.loop.progress import read_log

pytestmark = pytest.mark.slow
PRELOAD = ["_ranks", "distill.stages", "sklearn.datasets", "torch.distributed.fsdp", "diffusers"]
TRAIN = {"steps": 14, "batch_size": 4, "ema": 0.5, "weight_decay": 0.5, "log_every": 4}
MACHINE = ("samples_per_second", "peak_memory_gib")
KILLED = -signal.SIGKILL


def launch(jobs, folder, processes=2):
    """Run jobs on so many ranks; returns their exit statuses and what they said.

    When one has died the others are given a while to notice, then ended as a launcher would.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [{"folder": str(folder), "kind": "moe", **job} for job in jobs]
    port, outputs = free_port(), [folder / f"output-{rank}.txt" for rank in range(processes)]
    ranks = [
        context.Process(target=one_of, args=(processes, r, port, jobs, str(output)), daemon=True)
        for r, output in enumerate(outputs)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.time() + 180
    while any(r.exitcode is None for r in ranks) and time.time() < deadline:
        if any(r.exitcode for r in ranks):
            deadline = min(deadline, time.time() + 30)
        time.sleep(0.02)
    late = [r for r in ranks if r.exitcode is None]
    for rank in late:
        rank.kill()
        rank.join()
    said = "\n".join(o.read_text() for o in outputs if o.exists())
    assert not late, f"hung: {said[-3000:]}"
    return [r.exitcode for r in ranks], said


def finish(jobs, folder):
    statuses, said = launch(jobs, folder)
    assert statuses == [0, 0], said[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of runs that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    jobs = [{"folder": str(folder / k), "kind": k, "train": TRAIN} for k in ("moe", "mob")]
    finish(jobs, folder)
    return folder


def same_bits(ours, reference):
    mine, theirs = (load_file(f / "model.safetensors") for f in (ours, reference))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    logs = [
        [
            {k: v for k, v in entry.items() if k not in MACHINE}
            for entry in read_log(f / "log.jsonl")
        ]
        for f in (ours, reference)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def complete_and_readable(folder):
    """Steps of the complete checkpoints; every tensor of each is read."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    steps = []
    for path in snapshots.complete(folder):
        known = HuggingFaceStorageReader(str(path / "tensors")).read_metadata().state_dict_metadata
        state = {
            name: torch.full(tuple(m.size), float("nan")).to(m.properties.dtype)
            for name, m in known.items()
        }
        snapshots.load(path, state, World())
        assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())
        step = snapshots.read_meta(path)["step"]
        counts = {int(v) for k, v in state.items() if k.endswith("/step")}
        assert counts == {step} and sorted(p.name for p in path.glob("rng-*")) == [
            f"rng-0000{rank}.safetensors" for rank in (0, 1)
        ]
        steps.append(step)
    if (folder / "latest").exists():
        named = int((folder / "latest").read_text().strip().split("-")[1])
        assert named in steps and named >= steps[-1] - 1
    return steps


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_inside_a_save(whole, tmp_path, asynchronous):
    """In its third save after a start one rank dies; the next start goes on from the newest
    complete checkpoint, and in the end every bit is as if nobody had died.
    """
    deaths = [(1, "tensors not written"), (0, "not renamed")]
    if not asynchronous:
        deaths += [(0, "tensors not written"), (0, "pointer not written")]
    settings = {**TRAIN, "save_every": 1, "async_save": asynchronous}
    newest = 0
    for rank, moment in deaths:
        job = {"train": settings, "die_in": {"rank": rank, "moment": moment}}
        statuses, said = launch([job], tmp_path)
        assert statuses[rank] == KILLED and statuses[1 - rank] != 0, (moment, said[-3000:])
        steps = complete_and_readable(tmp_path)
        assert len(steps) >= 2 and steps == list(range(steps[0], steps[-1] + 1))
        published = 3 if moment == "pointer not written" else 2
        if asynchronous and moment == "not renamed":  # it may be the second that was published then
            assert steps[-1] - newest in (1, 2)
        else:
            assert steps[-1] == newest + published, moment
        newest = steps[-1]
    assert newest < TRAIN["steps"] - 1
    finish([{"train": settings}], tmp_path)
    same_bits(tmp_path, whole / "moe")
    assert not list(tmp_path.glob("*step-*"))


@pytest.mark.parametrize("kind", ["moe", "mob"])
def test_two_ranks_resume_bit_for_bit(whole, tmp_path, kind):
    """A signal to one rank, between two log lines; the same number of ranks goes on."""
    job = {"kind": kind, "train": TRAIN, "stop": {"rank": 1, "step": 5}}
    statuses, said = launch([job], tmp_path)
    assert 0 not in statuses and snapshots.newest(tmp_path).name == "step-0000006", said[-3000:]
    assert complete_and_readable(tmp_path) == [4, 6]
    finish([{"kind": kind, "train": TRAIN}], tmp_path)
    same_bits(tmp_path, whole / kind)


def test_changed_settings_are_refused_by_all_ranks_and_accepted_for_good(whole, tmp_path):
    """A finished run; were it an error on one rank alone, the others would wait for it."""
    shutil.copytree(whole / "moe", tmp_path / "run")
    job = {"folder": str(tmp_path / "run"), "train": TRAIN, "parent": "another"}
    statuses, said = launch([job], tmp_path)
    assert statuses == [1, 1], said[-3000:]
    for rank in (0, 1):
        text = (tmp_path / "run" / f"error-{rank}.txt").read_text()
        assert "belongs to a run with other settings" in text
    finish([{**job, "accept": True}, job], tmp_path)
    same_bits(tmp_path / "run", whole / "moe")
