"""Runs of several gloo processes on a small model, for tests; this file run with JOB is one.

A job is a JSON file: {"folder", "steps", "train": {...}, "kind": "shared" | "moe" | "mob", ...}.
Run with other ARGUMENTS it is `d2m ARGUMENTS` with a `torch.compile` that only traces.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(processes: int, *arguments: str, **options: str) -> list[str]:
    """The command that starts `processes` ranks on this machine, with a port of its own."""
    extra = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", *extra, *arguments),
    ]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def models(kind: str):
    """(teacher, student before stage (b) or (c), data); the same in every process."""
    from d2m_models import FluxMoEConfig, MoBConfig, MoEConfig
    from distill.configs.sections import TeacherConfig
    from distill.configs.training import TrainConfig
    from distill.data.digits import Digits
    from distill.students import group_blocks, make_student, measure_importance
    from distill.teacher import build_teacher, modulation_inputs

    sizes = TeacherConfig(
        num_layers=2,
        num_single_layers=4,
        heads=2,
        head_dim=8,
        rope=[2, 2, 4],
        train=TrainConfig(steps=1, batch_size=4, lr=1e-3),
    )
    structure = FluxMoEConfig(
        moe=MoEConfig(shared_ratio=1.0, expert_ratio=0.25, num_experts=12, top_k=2),
        dense_double_blocks=(0,),
        adaln_dim=8,
        num_layers=2,
        num_single_layers=4,
    )
    digits = Digits("train")
    teacher = build_teacher(sizes, 0).eval().requires_grad_(False)
    importance = measure_importance(teacher, digits, 1, 0)
    temb = modulation_inputs(teacher, digits, 64, 0)
    student = make_student(teacher, structure, importance, temb, 0)
    if kind == "mob":
        student = group_blocks(student, MoBConfig(single_groups=((1, 2),)), 0)
        split_by_condition(student, modulation_inputs(teacher, digits, 64, 0))
    return teacher, student, digits


def split_by_condition(student, temb_ND) -> None:
    """Block routers that send about half of the samples to each of a group's two blocks."""
    import torch

    mean_D = temb_ND.mean(0)
    *_, directions = torch.linalg.svd(temb_ND - mean_D)
    way_D = directions[0] - mean_D * (mean_D @ directions[0]) / (mean_D @ mean_D)
    with torch.no_grad():
        for router in student.mob_routers["single_groups"]:
            router.condition_gate.weight.copy_(torch.stack([way_D, -way_D]) * 100)
            router.token_gate.weight.mul_(0.1)


class Recorder:
    """A source that writes down which samples a rank asked for in training, step by step."""

    def __init__(self, source, path):
        self.source, self.path = source, path

    def __getattr__(self, name):
        return getattr(self.source, name)

    def batch(self, seed, step, count, stream="train", rows=None):
        if stream == "train":
            taken = self.source.epochs(seed, step, count).tolist()
            taken = taken if rows is None else taken[rows]
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "samples": taken}) + "\n")
        return self.source.batch(seed, step, count, stream, rows)


def harm(source, rank: int, folder: Path, job: dict) -> None:
    """Signals that hit this process when it asks for a step: {"rank", "step"} of the job's keys

    stop: SIGTERM. die: SIGKILL, as often as there are entries, each once. poison: no signal, but
    the rows it gets are not finite.
    """
    from dataclasses import replace

    inner = source.batch
    stop = job.get("stop")

    def batch(seed, step, *arguments, **options):
        if stop == {"rank": rank, "step": step}:
            os.kill(os.getpid(), 15)
        for i, die in enumerate(job.get("die", [])):
            if die == {"rank": rank, "step": step} and not (folder / f"died{i}").exists():
                (folder / f"died{i}").touch()
                os.kill(os.getpid(), 9)
        drawn = inner(seed, step, *arguments, **options)
        if job.get("poison") == {"rank": rank, "step": step}:
            drawn = replace(drawn, x0=drawn.x0 * float("nan"))
        return drawn

    source.batch = batch


def fill_disk(rank: int, job: dict) -> None:
    """From the checkpoint of a step on, one rank cannot write: "full" is {"rank", "step"}."""
    from distill import files

    full, save = job.get("full", {}), files.save_tensors

    def save_tensors(path, *arguments, **options):
        if f".step-{full['step']:07d}.tmp" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(path, *arguments, **options)

    if full.get("rank") == rank:
        files.save_tensors = save_tensors


# Where a save is when the process dies; of the third save after the start.
IN_A_SAVE = (
    "tensors not written",
    "tensors not flushed",
    "not renamed",
    "pointer not written",
    "old one not purged",
    "half purged",
)


def die_in_a_save(moment: str) -> None:
    """From now on this process dies by SIGKILL at one moment of its third save."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from d2m_models import files
    from distill.loop import snapshots

    saves = 0

    def before(owner, name, applies):
        real = getattr(owner, name)

        def patched(*arguments, **options):
            if saves >= 3 and applies(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, name, patched)

    real_save = snapshots.Snapshots.save

    def save(self, *arguments):
        nonlocal saves
        saves += 1
        return real_save(self, *arguments)

    snapshots.Snapshots.save = save

    def named(start, which=0):
        return lambda *paths: str(paths[which]).split("/")[-1].startswith(start)

    step = {
        "tensors not written": (HuggingFaceStorageWriter, "write_data", lambda *_: True),
        "tensors not flushed": (files, "flush", lambda path: path.suffix == ".safetensors"),
        "not renamed": (os, "replace", named("step-", 1)),
        "pointer not written": (snapshots.ckpt, "write_text", named("latest")),
        "old one not purged": (os, "replace", named("step-", 0)),
        "half purged": (shutil, "rmtree", named(".step-")),
    }[moment]
    before(*step)


def run(job: dict, world) -> None:
    """One stage on a fresh student; its weights before are kept in before.safetensors."""
    from safetensors.torch import save_file

    from distill.configs.sections import LossConfig, StageConfig
    from distill.configs.training import TrainConfig
    from distill.loop.parallel import shard_model
    from distill.stages import run_stage

    teacher, student, source = models(job["kind"])
    shard_model(teacher, world)
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if job.get("record"):
        source = Recorder(source, folder / f"samples-{world.size}-{world.rank}.jsonl")
    train = {"steps": 6, "batch_size": 8, "lr": 1e-3, "warmup": 0, "schedule": "constant"}
    config = TrainConfig(**{**train, **job.get("train", {})})
    stage = StageConfig(job["kind"], config, LossConfig())
    harm(source, world.rank, folder, job)
    fill_disk(world.rank, job)
    if job.get("die_in", {}).get("rank") == world.rank:
        die_in_a_save(job["die_in"]["moment"])
    if world.main:
        save_file(student.state_dict(), folder / "before.safetensors")
    run_stage(
        student,
        teacher,
        source,
        stage,
        folder,
        seed=0,
        first=0,
        parent=job.get("parent", "test"),
        accept_changed=job.get("accept", False),
        label="test",
        progress=False,
        world=world,
    )


def main(jobs: list[dict]) -> None:
    """All jobs one after another, by the same processes."""
    import torch

    torch.set_num_threads(1)
    from distill.configs.training import ParallelConfig
    from distill.errors import UserError
    from distill.loop.parallel import start_world, stop_world

    world = start_world(ParallelConfig(**jobs[0].get("parallel", {}), timeout_minutes=10), "cpu")
    try:
        for job in jobs:
            try:
                run(job, world)
            except UserError as err:
                text = f"{time.time()} {err}"
                (Path(job["folder"]) / f"error-{world.rank}.txt").write_text(text)
                raise
    finally:
        stop_world(world)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def one_of(size: int, rank: int, port: int, jobs: list[dict], output: str) -> None:
    """What torchrun starts, for a process that was forked: rank `rank` of `size`."""
    with open(output, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in {**numbers, **place}.items()})
    main(jobs)


def command(arguments: list[str]) -> int:
    """The command line; Inductor's code generation, which takes minutes, is torch's to test."""
    import torch

    from distill import cli

    real = torch.compile
    torch.compile = lambda function, **options: real(function, backend="aot_eager", **options)
    torch.set_num_threads(1)
    return cli.main(arguments)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(command(sys.argv[1:]))
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
