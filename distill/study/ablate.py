"""`d2m ablate`: the paper's claims, re-tested on a small real teacher over several seeds.

One teacher for all seeds; what a seed changes is the student's data, noise, calibration and
routers. Every model and every measurement is cached under a fingerprint of all it depends on, so a
run that was stopped continues, and two workers never do the same work.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from distill import files as ckpt
from distill.configs.checked import bundled, from_dict, load_config, to_dict
from distill.data.photos import Photos
from distill.errors import UserError
from distill.study import claims, comparators
from distill.study.ablate_page import render
from distill.study.claim_list import collect
from distill.study.comparators import Context
from distill.study.config import AblateConfig
from distill.study.patterns import block_variation, selection
from distill.study.teachers import Teachers, fingerprint
from distill.study.workers import Workers

# kind of training -> the comparator with which its learning rate is searched
SEARCHED = {"moe": "moe", "joint": "joint", "prune-mlp": "prune-mlp-1.5", "mob": "mob-deep",
            "bk": "bk-deep", "lite": "lite-deep"}  # fmt: skip
LONGER = 4  # times the steps of those "...-long": does more training turn Table 2 around?


def comparator_names(config: AblateConfig) -> list[str]:
    """Every comparator of one seed, in the paper's order."""
    groupings = [f"groups-{name}" for name in config.groups if name not in ("shallow", "deep")]
    depth = [f"{m}-{d}" for d in ("shallow", "deep") for m in ("mob", "bk", "lite")]
    return ["moe", "prune-mlp-1.5", "prune-mlp-2", *depth, "mob-all-deep", "teacher", "moe-half",
            "joint", "random", *groupings, "hyper-moe", "prune-mlp-1.5-long",
            "moe-long"]  # fmt: skip


# --- one comparator -------------------------------------------------------------------------


def run_comparator(
    name: str, context: Context, given: Teachers
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train and measure one comparator: (values, tensors for the pictures)."""
    if name == "teacher":  # the dense model itself; its relative MSE is 0
        varies, curves = block_variation(context.teacher, context.seed)
        values = given.bench.measure(context.teacher) | varies | given.few_steps(context.teacher)
        values |= {f"hyper_{k}": value for k, value in given.few_steps(given.hyper).items()}
        return values, {f"blocks/{kind}": table for kind, table in curves.items()}
    model, shared = train(name, context, given)
    bench = given.hyper_bench if name == "hyper-moe" else given.bench
    if context.share < 1:  # in the search
        return bench.measure(model, samples=False), {}
    values = {} if name == "random" else bench.measure(model)
    if name in ("moe", "moe-half", "random"):
        values["shared_only"] = bench.rel_mse(shared)
    if name == "moe":
        values |= bench.by_top_k(model, context.config.evaluate.top_k)
    if name in ("moe", "hyper-moe"):
        values |= given.few_steps(model)
    if name != "moe":
        return values, {}
    found, tensors = selection(model, bench.noise, bench.steps, context.seed)
    return values | found, tensors


def train(name: str, context: Context, given: Teachers) -> tuple[nn.Module, nn.Module | None]:
    """(the comparator, an MoE after stage (a) with shared experts only).

    An MoE has the paper's stages (a) and (b); "random" the first alone, "joint" one in which shared
    and routed experts train together. MoB groups and pruned depth are of dense blocks.
    """
    config = context.config
    method, _, rest = name.partition("-")
    both = config.shared.train.steps + config.moe.train.steps
    if name.endswith("-long"):
        context = replace(context, share=LONGER * context.share)
    if method == "hyper":
        source = Photos("train", "grid", config.hyper.grid)
        context = replace(context, teacher=given.hyper, source=source)
    known = (name, to_dict(config.teacher), context.seed)
    if method in ("moe", "joint", "random", "hyper"):
        stages = [context.stage(config.shared, "moe"), context.stage(config.moe, "moe")]
        if name == "random":
            stages.pop()
        if name == "joint":
            stages = [context.stage(config.moe, "joint", steps=both, freeze_shared=False)]
        parent = fingerprint(*known, context.share, config.importance_batches,
                             config.importance_samples)  # fmt: skip
        structure = context.structure(config.other if name == "moe-half" else config.structure)
        start = {"initialisation": "random"} if name == "random" else {}
        model, _, shared = comparators.train_moe(context, name, structure, stages, parent,
                                                 start=start)  # fmt: skip
        return model, shared
    dense, aliases = context.dense(context.structure({"moe": None})), {}
    if method in ("mob", "groups"):
        every = {"train_isolated": True} if name == "mob-all-deep" else {}
        stage = context.stage(config.mob, "mob", **every)
        parent = fingerprint(*known, context.share)
        groups = config.groups[rest.removeprefix("all-")]
        model, _ = comparators.train_mob(context, dense, name, groups, stage, parent)
        return model, None
    if method == "prune":
        structure, ratio = context.structure(config.structure), float(name.split("-")[2])
        model = comparators.prune_width(context, structure, ratio)
        stage = context.stage(config.moe, "prune-mlp", steps=both)
    else:
        assert method in ("bk", "lite"), f"{name!r} is none of {comparator_names(config)}"
        batch = context.source.batch(context.seed, 0, 128, "calibrate")
        groups, stage = config.groups[rest], context.stage(config.mob, method)
        model, aliases = comparators.prune_groups(context, dense, groups, batch, method)
    trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    run_id = fingerprint(*known, to_dict(stage), trained, aliases)
    return comparators.distil(context, model, name, stage, run_id, aliases), None


# --- tasks ----------------------------------------------------------------------------------


def task(config: AblateConfig, out: Path, name: str, seed: int, rates: dict, share: float) -> dict:
    """One unit of work as plain data; `file` is where its values go."""
    plain = to_dict(replace(config, seeds=[0]))  # a comparator does not depend on the other seeds
    kinds = {} if name == "teacher" else rates
    tag = fingerprint(plain, kinds, share)
    return {
        "config": plain, "out": str(out), "name": name, "seed": seed, "rates": kinds,
        "share": share, "folder": str(out / "models" / f"seed{seed}-{tag}"),
        "file": str(out / "values" / f"{name}-seed{seed}-{tag}"),
    }  # fmt: skip


def measured(job: dict) -> dict:
    """The values of a task that was done before, {} if it was not."""
    file = Path(job["file"] + ".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def work(job: dict) -> dict:
    """Do a task, or find it done; returns its values."""
    if values := measured(job):
        return values
    given = _teachers(json.dumps(job["config"], sort_keys=True), job["out"])
    if job["name"] in ("fit-teacher", "hyper"):  # trained here, kept by `train`
        _ = given.teacher if job["name"] == "fit-teacher" else given.hyper
        return {}
    context = Context(
        given.config, job["seed"], Path(job["folder"]), given.teacher, Photos("train"),
        job["rates"], job["share"], importance_samples=given.config.importance_samples,
    )  # fmt: skip
    values, tensors = run_comparator(job["name"], context, given)
    ckpt.make_folder(Path(job["file"]).parent)
    if tensors:
        ckpt.save_tensors(job["file"] + ".safetensors", tensors)
    ckpt.write_text(job["file"] + ".json", json.dumps(values, indent=2) + "\n")
    return values


@lru_cache
def _teachers(config: str, out: str) -> Teachers:
    """The same for all tasks of a process."""
    return Teachers(from_dict(AblateConfig, json.loads(config)), Path(out))


# --- the command ----------------------------------------------------------------------------


def search(
    config: AblateConfig, out: Path, workers: Workers, progress: bool
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(learning rate of every kind, relative MSE by kind and rate): the lowest error wins."""
    rates = config.search.rates
    if len(rates) == 1:
        return dict.fromkeys(SEARCHED, rates[0]), {}
    jobs = [
        task(config, out, name, config.search.seed, {kind: rate}, config.search.share)
        for kind, name in SEARCHED.items()
        for rate in rates
    ]
    found = workers.run(jobs, "learning rates", progress)
    if not all(found):
        raise UserError(f"{out} has no learning rates yet; leave out --so-far")
    values = iter(found)
    tried = {kind: {str(rate): next(values)["rel_mse"] for rate in rates} for kind in SEARCHED}
    best = {kind: min(rates, key=lambda r, e=e: e[str(r)]) for kind, e in tried.items()}
    return best, tried


def run_ablate(
    out: Path | str, *, quick: bool = False, config: AblateConfig | None = None,
    results: Path | str | None = None, workers: int = 2, so_far: bool = False,
    progress: bool = True, say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Everything `d2m ablate` does; returns the path of ablate.html.

    results: where claims.json goes too, and the page beside it (.html). so_far: train nothing,
    judge by what was measured.
    """
    out = ckpt.make_folder(out)
    if config is None:
        config = load_config(AblateConfig, bundled("ablate-quick.yaml" if quick else "ablate.yaml"))
    alone = so_far or workers == 1
    with Workers(0 if alone else workers, measured if so_far else work) as pool:
        progress = progress and not so_far
        for name in ("fit-teacher", "hyper"):
            pool.run([task(config, out, name, 0, {}, 1.0)], name, progress)
        rates, tried = search(config, out, pool, progress)
        jobs = {
            (seed, name): task(config, out, name, seed, rates, 1.0)
            for name in comparator_names(config)
            for seed in config.seeds
        }
        values = dict(
            zip(jobs, pool.run(list(jobs.values()), "comparators", progress), strict=True)
        )
    rows = {
        str(s): {name: values[s, name] for name in comparator_names(config)} for s in config.seeds
    }
    content = collect(config, rows, rates, tried)
    text = json.dumps(content, indent=1) + "\n"
    for path in {out / "claims.json", *([Path(results)] if results is not None else [])}:
        ckpt.make_folder(path.parent)
        ckpt.write_text(path, text)
    for entry in content["claims"]:
        say(f"{entry['verdict']:>14}  {claims.effect_text(entry):>22}  {entry['claim']}")
    tensors = {}
    for name in ("moe", "teacher"):  # the first seed's
        if not values[config.seeds[0], name]:
            raise UserError(f"no page yet: {name!r} is not measured; claims.json is written")
        file = jobs[config.seeds[0], name]["file"] + ".safetensors"
        tensors |= ckpt.pack(name, ckpt.load_tensors(file)[0])
    ckpt.save_tensors(out / "ablate.safetensors", tensors)
    page = render(out)
    if results is not None:
        ckpt.write_text(Path(results).with_suffix(".html"), page.read_text(encoding="utf-8"))
    return page
