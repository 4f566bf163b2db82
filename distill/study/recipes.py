"""`d2m ablate --recipes`: when is a mixture worth more than pruning?

Ways to start and to train an MoE or a MoB, and pruned models that are given the same start, at
equal activated neurons (or depth), steps, batches and learning-rate search, over several lengths of
training. One teacher; a seed changes data, noise, calibration and routers. Every measurement is
cached under a fingerprint of what it depends on, so a run that was stopped continues.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from distill import files as ckpt
from distill import stages
from distill.configs.checked import bundled, from_dict, load_config, to_dict
from distill.configs.sections import StageConfig
from distill.data.batch import held_out_batch
from distill.data.sources import built_in
from distill.device import environment
from distill.study import comparators
from distill.study.comparators import Context
from distill.study.config import Arm, RecipeConfig
from distill.study.measure import expert_use, predict, relative_mse
from distill.study.recipes_page import render, text_table
from distill.study.workers import Workers
from distill.teacher import find_teacher, load_teacher

SCHEMA = "dense2moe-recipes/1"
VERSION = 1  # raise when a result comes to mean something else

# --- one arm --------------------------------------------------------------------------------


class Setting:
    """The teacher and what arms are judged on: held-out data, and for the search training data with
    noise of its own."""

    def __init__(self, config: RecipeConfig):
        self.config = config
        self.source = built_in(config.data)
        self.teacher = load_teacher(config.teacher, config.data, 0, progress=False)
        self.held = held_out_batch(built_in(config.data, "test"), config.held_out, 0)
        self.seen = held_out_batch(self.source, config.held_out, 0)
        self.targets = [predict(self.teacher, batch) for batch in (self.held, self.seen)]

    def context(self, seed: int, folder: Path) -> Context:
        return Context(self.config, seed, folder, self.teacher, self.source,
                       importance_samples=self.config.importance_samples)  # fmt: skip

    def errors(self, model: nn.Module) -> dict[str, float]:
        """rel_mse: on held-out data; seen: on new noise of training data."""
        held, seen = (relative_mse(target, predict(model, batch)) for target, batch
                      in zip(self.targets, (self.held, self.seen), strict=True))  # fmt: skip
        return {"rel_mse": held, "seen": seen}


def started(arm: Arm, context: Context) -> tuple[nn.Module, dict[str, str]]:
    """The arm's model before training, and `aliases` for `distil`."""
    config = context.config
    moe = {**config.structure["moe"], "routed_scale": arm.routed_scale}
    structure = context.structure({**config.structure, "moe": moe})
    if arm.kind == "moe":
        return comparators.start_moe(context, structure, arm.start), {}
    tokens = arm.start.get("tokens") if arm.start.get("outputs") == "refitted" else None
    if arm.kind == "prune":
        ratio = structure.moe.activated_ratio
        return comparators.prune_width(context, structure, ratio, tokens), {}
    dense = context.dense(context.structure({"moe": None}))
    if arm.kind == "mob":
        return comparators.mob_of(context, dense, config.groups), {}
    batch = context.source.batch(context.seed, 0, 128, "calibrate")
    return comparators.prune_groups(context, dense, config.groups, batch)


@lru_cache(maxsize=2)
def _started(config: str, start: str, seed: int) -> tuple[nn.Module, dict[str, str]]:
    """Lengths, rates and ways to train share a start."""
    arm = from_dict(Arm, json.loads(start))
    return started(arm, _setting(config).context(seed, Path()))


@lru_cache(maxsize=1)
def _setting(config: str) -> Setting:
    return Setting(from_dict(RecipeConfig, json.loads(config)))


def phases(arm: Arm, config: RecipeConfig, length: int, lr: float) -> list[StageConfig]:
    """The arm's stages: one, or the paper's two."""
    steps = length * config.train.steps
    if arm.start.get("outputs") != "refitted":
        steps += config.calibration_steps
    alone = round(arm.shared * steps)
    train = replace(config.train, lr=lr, router_lr_scale=arm.router_lr_scale)
    last = {"moe": "moe", "mob": "mob"}.get(arm.kind, "moe")
    options = {"freeze_shared": arm.shared > 0} if last == "moe" else {}
    options |= {"train_isolated": arm.train_isolated} if last == "mob" else {}
    found = [StageConfig(last, replace(train, steps=steps - alone), arm.loss, **options)]
    if alone:
        found.insert(0, StageConfig("shared", replace(train, steps=alone), arm.loss))
    return found


def run_arm(job: dict) -> dict[str, Any]:
    """Trains and judges one arm, or finds it done: its values as plain data."""
    file = Path(job["file"])
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    setting, arm = _setting(job["config"]), from_dict(Arm, job["arm"])
    context = setting.context(job["seed"], file.with_suffix(""))
    same = {key: job["arm"][key] for key in ("kind", "start", "routed_scale")}
    start = json.dumps(same, sort_keys=True)
    model, aliases = copy.deepcopy(_started(job["config"], start, job["seed"]))
    values: dict[str, Any] = {f"start_{k}": v for k, v in setting.errors(model).items()}
    chain = phases(arm, setting.config, job["length"], job["lr"])
    run_id = file.stem
    if arm.kind in ("moe", "mob"):
        for number, stage in enumerate(chain):
            run_id = comparators.train_stage(
                context, model, job["name"], stage, run_id, chain[:number]
            )
    else:
        comparators.distil(context, model, job["name"], chain[0], run_id, aliases)
    values |= setting.errors(model)
    values |= expert_use(model, setting.held[:128])
    ckpt.make_folder(file.parent)
    ckpt.write_text(file, json.dumps(values) + "\n")
    shutil.rmtree(context.folder, ignore_errors=True)  # 60 MB an arm
    return values


# --- the command ----------------------------------------------------------------------------


def task(config: RecipeConfig, out: Path, name: str, seed: int, length: int, lr: float) -> dict:
    """One unit of work as plain data; `file` is where its values go."""
    arm = to_dict(replace(config.arms[name], lengths=None))
    plain = {**to_dict(config), "arms": {}, "seeds": [0], "lengths": [1], "rates": []}
    text = json.dumps(plain, sort_keys=True)
    known = {"config": text, "arm": arm, "seed": seed, "length": length, "lr": lr}
    weights = _weights(config.teacher.path)
    tag = ckpt.fingerprint(VERSION, stages.VERSION, known, weights)
    return {
        **known,
        "name": name,
        "file": str(out / "values" / f"{name}-x{length}-seed{seed}-{tag}.json"),
    }


@lru_cache
def _weights(path: str | None) -> str | None:
    """What tells one shipped teacher from the next."""
    if path is None:
        return None
    about = Path(find_teacher(path)) / "training.json"
    return about.read_text(encoding="utf-8") if about.exists() else path


def runs(config: RecipeConfig) -> Iterator[tuple[str, int, int]]:
    """(arm, length, seed): short ones first, and what shares a start in a row."""
    for length in sorted(config.lengths):
        for seed in config.seeds:
            for name, arm in config.arms.items():
                if arm.lengths is None or length in arm.lengths:
                    yield name, length, seed


def run_recipes(
    out: Path | str, config: RecipeConfig | None = None, *, full: bool = False,
    results: Path | str | None = None, workers: int = 2, progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Everything that is not done yet; writes OUT/recipes.json and the page, whose path it returns.

    results: where recipes.json goes too, and the page beside it (.html). full: the lengths and
    seeds of the configuration; else its two shortest and three seeds.
    """
    out = ckpt.make_folder(out)
    if config is None:
        config = load_config(RecipeConfig, bundled("recipes.yaml"))
    if not full:
        config = replace(config, lengths=sorted(config.lengths)[:2], seeds=config.seeds[:3])
    with Workers(0 if workers == 1 else workers, run_arm) as pool:
        tries = [(name, lr) for name in config.arms for lr in config.rates]
        jobs = [task(config, out, n, config.search_seed, 1, lr) for n, lr in tries]
        tried: dict[str, dict[str, float]] = {name: {} for name in config.arms}
        found = pool.run(jobs, "learning rates", progress)
        for (name, lr), values in zip(tries, found, strict=True):
            tried[name][str(lr)] = values["seen"]
        best = {name: float(min(errors, key=errors.__getitem__)) for name, errors in tried.items()}
        todo = list(runs(config))
        jobs = [task(config, out, n, seed, length, best[n]) for n, length, seed in todo]
        done = pool.run(jobs, "arms", progress)
    rows: dict[str, dict[str, dict[str, Any]]] = {str(s): {} for s in config.seeds}
    for (name, length, seed), values in zip(todo, done, strict=True):
        rows[str(seed)][f"{name}@{length}"] = values
    content = {
        "schema": SCHEMA, "teacher": _weights(config.teacher.path), "rates": best, "tried": tried,
        "runs": rows, "config": to_dict(config), "environment": environment("cpu"),
    }  # fmt: skip
    text = json.dumps(content, indent=1) + "\n"
    ckpt.write_text(out / "recipes.json", text)
    say(text_table(content))
    page = render(out)
    if results is not None:
        ckpt.make_folder(Path(results).parent)
        ckpt.write_text(Path(results), text)
        ckpt.write_text(Path(results).with_suffix(".html"), page.read_text(encoding="utf-8"))
    return page
