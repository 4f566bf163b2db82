"""`d2m demo`: teacher -> MoE -> MoB on real digits, next to pruning, measured and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from distill import files as ckpt
from distill.configs.checked import bundled, from_dict, load_config, to_dict
from distill.configs.training import settings
from distill.data.batch import held_out_batch
from distill.data.digits import Digits
from distill.device import environment
from distill.stages import VERSION
from distill.study import claims, comparators, demo_page
from distill.study.comparators import Context
from distill.study.config import DemoConfig
from distill.study.outcome import measure
from distill.study.workers import beside, cores
from distill.teacher import load_teacher

CLAIMS = (
    claims.Claim("MoE beats MLP pruning at the same activated expansion ratio", "Table 2",
                 "moe-l", "prune-mlp"),
    claims.Claim("MoB beats depth pruning at the same active depth", "Table 3",
                 "mob-s", "prune-depth"),
)  # fmt: skip

# --- the comparators ------------------------------------------------------------------------


def start(config: DemoConfig, seed: int, device: str, folder: Path, progress: bool) -> Context:
    """One seed's teacher, trained or from the cache, and its data."""
    teacher = load_teacher(config.teacher, config.data, seed, device, progress)
    source = Digits("train", config.data.timesteps, config.data.timestep_grid)
    return Context(
        config, seed, ckpt.make_folder(folder), teacher, source, {"pruned": config.pruned_lr},
        progress=progress, calibration=config.calibration,
    )  # fmt: skip


def fingerprint(context: Context, *parts: Any) -> str:
    """Of everything a model depends on before its own training.

    "cpu" and "cpu:0", "cuda" and "cuda:1" are one kind of device: a run may move between them.
    """
    kind = context.device.type
    return ckpt.fingerprint(VERSION, settings(context.config), context.seed, kind, *parts)


def train(
    name: str, context: Context, moe: nn.Module | None = None, parent: str = ""
) -> tuple[nn.Module, str]:
    """(the comparator, its fingerprint); `moe` and `parent` are moe-l and its fingerprint.

    moe-l: stages (a) and (b). mob-m, mob-s, mob-xs: stage (c). prune-mlp: as wide as moe-l's
    activated FFN; as many steps as (a) and (b). prune-depth: as deep as mob-s runs, from moe-l; as
    many steps as (c). lite: dense FFNs; as many steps as a mob model in all.
    """
    config = context.config
    shared, experts, blocks = config.shared, config.moe, config.mob
    if name == "moe-l":
        structure, parent = context.structure(config.structure), fingerprint(context, name)
        return comparators.train_moe(context, name, structure, (shared, experts), parent)[:2]
    if name.startswith("mob-"):
        groups, before = config.groups[name[4:]], (shared, experts)
        return comparators.train_mob(context, moe, name, groups, blocks, parent, before)
    steps, aliases, before = shared.train.steps + experts.train.steps, {}, ()
    if name == "prune-mlp":
        structure = context.structure(config.structure)
        model = comparators.prune_width(context, structure, structure.moe.activated_ratio)
        stage = context.stage(experts, "pruned", steps=steps)
    elif name == "prune-depth":
        batch = held_out_batch(context.source, 256, context.seed)
        model, aliases = comparators.prune_groups(context, moe, config.groups["s"], batch)
        # stage (c)'s schedule; what is balanced here are experts, as in stage (b)
        stage, before = replace(blocks, loss=experts.loss), (shared, experts)
    else:
        model, aliases = comparators.lite(context, config.lite)
        stage = context.stage(experts, "pruned", steps=steps + blocks.train.steps)
    run_id = fingerprint(context, name, parent, aliases)
    return comparators.distil(context, model, name, stage, run_id, aliases, before), run_id


def train_all(context: Context, full: bool) -> dict[str, nn.Module]:
    """Every model of the table, in the table's order."""
    with _beside(context, "prune-mlp"):
        moe = train("moe-l", context)
    models = {"teacher": context.teacher, "moe-l": moe[0]}
    models["prune-mlp"], _ = train("prune-mlp", context)
    with _beside(context, "prune-depth"):
        for name in ("mob-m", "mob-s") if full else ("mob-s",):
            models[name], _ = train(name, context, *moe)
    models["prune-depth"], _ = train("prune-depth", context, *moe)
    if full:
        models["mob-xs"], _ = train("mob-xs", context, *moe)
        models["lite"], _ = train("lite", context)
    return models


def _beside(context: Context, name: str) -> AbstractContextManager[None]:
    """Train a pruned comparator in a second process during the block, where that helps."""
    done = (context.folder / name / "distill" / "model.safetensors").exists()
    if done or context.device.type != "cpu" or cores() < 2:
        return nullcontext()
    return beside(_train_pruned, {
        "config": to_dict(context.config), "seed": context.seed, "folder": str(context.folder),
        "progress": context.progress, "name": name,
    })  # fmt: skip


def _train_pruned(task: dict) -> dict:
    config = from_dict(DemoConfig, task["config"])
    context = start(config, task["seed"], "cpu", Path(task["folder"]), task["progress"])
    train(task["name"], context, *(train("moe-l", context) if "depth" in task["name"] else ()))
    return {}


# --- the command ----------------------------------------------------------------------------


def run_demo(
    out: Path | str, *, quick: bool = False, full: bool = False, seed: int = 0,
    device: str = "cpu", progress: bool = True, say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Everything `d2m demo` does; returns the path of report.html."""
    out = ckpt.make_folder(out)
    config = load_config(DemoConfig, bundled("demo-quick.yaml" if quick else "demo.yaml"))
    seeds = [seed, seed + 1, seed + 2] if full else [seed]
    outcomes = {}
    for s in seeds:
        if full:
            say(f"seed {s} ({seeds.index(s) + 1} of {len(seeds)})")
        tag = ckpt.fingerprint(VERSION, to_dict(config), s, torch.device(device).type)
        context = start(config, s, device, out / "stages" / f"seed{s}-{tag}", progress)
        outcomes[s] = measure(context, train_all(context, full))
    first = outcomes[seed]
    for name in ("moe-l", "mob-s"):
        shutil.rmtree(out / "models" / name, ignore_errors=True)  # of an earlier run
        ckpt.write_folder(out / "models" / name, first.models[name].save_pretrained)
    ckpt.save_tensors(out / "report.safetensors", first.tensors, first.meta)
    demo_page.write_results(out, seed, environment(device), first.rows)
    if full:
        content = summarise(seeds, {s: o.rows for s, o in outcomes.items()})
        ckpt.write_text(out / "full.json", json.dumps(content, indent=2) + "\n")
        for claim in content["claims"]:
            say(f"{claim['claim']}: {claim['verdict']} ({claim['detail']})")
    else:
        (out / "full.json").unlink(missing_ok=True)  # an earlier run's, of other models
    page = demo_page.render(out)
    say(demo_page.text_table(first.rows))
    return page


def summarise(seeds: list[int], rows: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the paper's two claims in relative MSE."""
    summary = {
        name: {
            key: _mean_and_spread([rows[s][name][key] for s in seeds])
            for key in ("rel_mse", "class_accuracy", "latency_ratio")
        }
        for name in rows[seeds[0]]
    }
    found = []
    for claim in CLAIMS:
        ratio = _mean_and_spread([rows[s][claim.low]["rel_mse"] / rows[s][claim.high]["rel_mse"]
                                  for s in seeds])  # fmt: skip
        detail = "ratio of relative MSE {mean:.3f} ± {spread:.3f}".format(**ratio)
        found.append({"claim": claim.claim, "verdict": claims.judge(claim, rows)["verdict"],
                      "detail": f"{detail} over {len(seeds)} seeds"})  # fmt: skip
    runs = {str(s): rows[s] for s in seeds}
    return {"seeds": seeds, "summary": summary, "claims": found, "runs": runs}


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "spread": stdev(values)}
