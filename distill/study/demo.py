"""`d2m demo`: from the dense icons teacher to MoE and MoB, next to pruning with the same start."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import files as ckpt
from distill.configs.checked import bundled, from_dict, load_config, to_dict
from distill.configs.training import settings
from distill.data.sources import built_in
from distill.device import environment
from distill.loop.train import RESULT
from distill.stages import VERSION
from distill.study import comparators, demo_page
from distill.study.comparators import Context
from distill.study.config import DemoConfig
from distill.study.outcome import measure
from distill.study.workers import beside, cores
from distill.teacher import find_teacher, load_teacher

# --- the comparators ------------------------------------------------------------------------


def start(config: DemoConfig, seed: int, device: str, folder: Path, progress: bool) -> Context:
    """The teacher that comes with the package, and its data."""
    teacher = load_teacher(config.teacher, config.data, seed, device, progress)
    source = built_in(config.data)
    return Context(config, seed, ckpt.make_folder(folder), teacher, source, progress=progress,
                   importance_samples=config.importance_samples)  # fmt: skip


def fingerprint(context: Context, *parts: Any) -> str:
    """Of everything a model depends on before its own training.

    "cpu" and "cpu:0", "cuda" and "cuda:1" are one kind of device: a run may move between them.
    """
    kind = context.device.type
    plain = {**settings(context.config), "evaluate": None}
    return ckpt.fingerprint(VERSION, plain, context.seed, kind, *parts)


def train(
    name: str, context: Context, moe: nn.Module | None = None, parent: str = ""
) -> tuple[nn.Module, str]:
    """(the comparator, its fingerprint); `moe` and `parent` are the MoE and its fingerprint.

    prune-mlp: as wide as the MoE's activated FFN, with the same start and as many steps. mob: the
    MoE's blocks grouped. prune-depth: the MoE as deep as the MoB runs, as many steps.
    """
    config = context.config
    structure, run_id = context.structure(config.structure), fingerprint(context, name, parent)
    done = any(context.folder.glob(f"{name}/*/{RESULT}"))  # then its start does not matter
    if name == "moe":
        begin = {"initialisation": "random"} if done else config.start
        return comparators.train_moe(context, name, structure, [config.moe], run_id,
                                     start=begin)[:2]  # fmt: skip
    if name == "prune-mlp":
        ratio, tokens = structure.moe.activated_ratio, None if done else config.start["tokens"]
        model = comparators.prune_width(context, structure, ratio, tokens)
        return comparators.distil(context, model, name, config.moe, run_id), run_id
    assert moe is not None
    before = [config.moe]
    if name == "mob":
        return comparators.train_mob(context, moe, name, config.groups, config.mob, parent, before)
    batch = context.source.batch(context.seed, 0, config.importance_samples, "calibrate")
    model, aliases = comparators.prune_groups(context, moe, config.groups, batch)
    # the MoB's schedule; what is balanced here are experts, as in the MoE's stage
    stage = replace(config.mob, loss=config.moe.loss)
    return comparators.distil(context, model, name, stage, run_id, aliases, before), run_id


def train_all(context: Context) -> dict[str, nn.Module]:
    """Every model of the table, in the table's order."""
    models = {"teacher": context.teacher}
    with _beside(context, "prune-mlp"):
        models["moe"], parent = train("moe", context)
    models["prune-mlp"], _ = train("prune-mlp", context)
    with _beside(context, "prune-depth"):
        models["mob"], _ = train("mob", context, models["moe"], parent)
    models["prune-depth"], _ = train("prune-depth", context, models["moe"], parent)
    return models


def _beside(context: Context, name: str) -> AbstractContextManager[None]:
    """Train a pruned comparator in a second process during the block, where that helps."""
    done = (context.folder / name / "distill" / RESULT).exists()
    if done or context.device.type != "cpu" or cores() < 2:
        return nullcontext()
    return beside(_train_pruned, {
        "config": to_dict(context.config), "seed": context.seed, "folder": str(context.folder),
        "progress": context.progress, "name": name,
    })  # fmt: skip


def _train_pruned(task: dict) -> dict:
    config = from_dict(DemoConfig, task["config"])
    context = start(config, task["seed"], "cpu", Path(task["folder"]), task["progress"])
    train(task["name"], context, *(train("moe", context) if "depth" in task["name"] else ()))
    return {}


# --- the command ----------------------------------------------------------------------------


def run_demo(
    out: Path | str, *, quick: bool = False, prompts: Sequence[str] = (), seed: int = 0,
    device: str = "cpu", progress: bool = True, say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Everything `d2m demo` does; returns the path of report.html.

    prompts: to be drawn instead of the configuration's.
    """
    out = ckpt.make_folder(out)
    config = load_config(DemoConfig, bundled("demo-quick.yaml" if quick else "demo.yaml"))
    if prompts:
        config = replace(config, evaluate=replace(config.evaluate, prompts=list(prompts)))
    known = {**to_dict(config), "evaluate": None}
    teacher = Path(find_teacher(str(config.teacher.path))) / "training.json"
    tag = ckpt.fingerprint(VERSION, known, teacher.read_text(encoding="utf-8"),
                           torch.device(device).type)  # fmt: skip
    context = start(config, seed, device, out / "stages" / f"seed{seed}-{tag}", progress)
    outcome = measure(context, train_all(context))
    for name in ("moe", "mob"):
        shutil.rmtree(out / "models" / name, ignore_errors=True)  # of an earlier run
        ckpt.write_folder(out / "models" / name, outcome.models[name].save_pretrained)
    ckpt.save_tensors(out / "report.safetensors", outcome.tensors, outcome.meta)
    demo_page.write_results(out, seed, environment(device), outcome.rows)
    page = demo_page.render(out)
    say(demo_page.text_table(outcome.rows))
    return page
