"""`d2m ablate`: the paper's claims, re-tested on a small real teacher over several seeds.

One teacher for all seeds; what a seed changes is the student's data, noise, calibration and
routers. Every model and every measurement is cached under a fingerprint of all it depends on, so a
run that was stopped continues, and two workers never do the same work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill import files as ckpt
from distill.configs.checked import bundled, from_dict, load_config, to_dict
from distill.errors import UserError
from distill.study import claims
from distill.study.arms import (
    Context,
    train_mob,
    train_moe,
    train_pruned_depth,
    train_pruned_mlp,
)
from distill.study.config import AblateConfig
from distill.study.teachers import fingerprint, train_hyper, train_teacher
from distill.study.workers import Workers

# kind of training -> the arm with which its learning rate is searched
SEARCHED = {
    "moe": "moe",
    "joint": "joint",
    "prune-mlp": "prune-mlp-1.5",
    "mob": "mob-deep",
    "bk": "bk-deep",
    "lite": "lite-deep",
}
LONGER = 4  # times the steps of the arms "...-long": does more training turn Table 2 around?


def arm_names(config: AblateConfig) -> list[str]:
    """Every arm of one seed, in the paper's order."""
    groupings = [f"groups-{name}" for name in config.groups if name not in ("shallow", "deep")]
    depth = [f"{m}-{d}" for d in ("shallow", "deep") for m in ("mob", "bk", "lite")]
    return ["moe", "prune-mlp-1.5", "prune-mlp-2", *depth, "mob-all-deep", "teacher", "moe-half",
            "joint", "random", *groupings, "hyper-moe", "prune-mlp-1.5-long",
            "moe-long"]  # fmt: skip


# --- one arm --------------------------------------------------------------------------------


def run_arm(arm: str, context: Context, out: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Train and measure one arm: (values, tensors for the pictures)."""
    from distill.study import patterns as am

    config, evaluate = context.config, context.config.evaluate
    text = json.dumps(to_dict(config), sort_keys=True)
    bench = _bench(text, str(out), "teacher")
    method, _, rest = arm.partition("-")
    if arm.endswith("-long"):
        context = replace(context, share=LONGER * context.share)
    if arm == "teacher":
        return _measure_teacher(context, bench, text, out)
    if arm == "moe":
        model, shared = train_moe(context, arm, config.structure)
        if context.share < 1:
            return {"rel_mse": bench.rel_mse(model)}, {}
        values = {**bench.measure(model), "shared_only": bench.rel_mse(shared)}
        values |= am.by_top_k(bench, model, evaluate.top_k)
        values |= _few_steps(text, out, model)
        found, tensors = am.selection(model, bench.noise, evaluate.sample_steps, context.seed)
        return values | found, tensors
    if arm == "hyper-moe":
        hyper = _teacher(text, str(out), "hyper")
        from distill.data.photos import Photos

        own = replace(context, teacher=hyper, source=Photos("train", "grid", config.hyper.grid))
        model, _ = train_moe(own, arm, config.structure)
        values = _bench(text, str(out), "hyper").measure(model)
        return values | _few_steps(text, out, model), {}
    if arm == "moe-half":
        model, shared = train_moe(context, arm, config.other)
        return {**bench.measure(model), "shared_only": bench.rel_mse(shared)}, {}
    if arm == "random":
        _, shared = train_moe(context, arm, config.structure, initialisation="random", stages="a")
        return {"shared_only": bench.rel_mse(shared)}, {}
    if arm == "moe-long":
        model, _ = train_moe(context, arm, config.structure)
    elif arm == "joint":
        model, _ = train_moe(context, arm, config.structure, stages="joint", kind="joint")
    elif method == "prune":
        model = train_pruned_mlp(context, arm, float(arm.split("-")[2]))
    elif method in ("bk", "lite"):
        model = train_pruned_depth(context, arm, config.groups[rest], method)
    elif arm == "mob-all-deep":
        model = train_mob(context, arm, config.groups["deep"], train_isolated=True)
    elif method in ("mob", "groups"):
        model = train_mob(context, arm, config.groups[rest])
    else:
        raise ValueError(f"arm is {arm!r}; expected one of {arm_names(config)}")
    return bench.measure(model, samples=context.share >= 1), {}


def _measure_teacher(context: Context, bench: Any, text: str, out: Path) -> tuple[dict, dict]:
    """The dense model itself (its relative MSE is 0), and how its blocks vary (Fig. 3)."""
    from distill.study import patterns as am

    varies, curves = am.block_variation(context.teacher, context.seed)
    values = bench.measure(context.teacher) | varies | _few_steps(text, out, context.teacher)
    hyper = _few_steps(text, out, _teacher(text, str(out), "hyper"))
    values |= {f"hyper_{name}": value for name, value in hyper.items()}
    return values, {f"blocks/{kind}": table for kind, table in curves.items()}


def _few_steps(text: str, out: Path, model: Any) -> dict[str, float]:
    """Distance of the model's samples, in as few steps as the step-distilled teacher takes and in
    as many as the original, to the original teacher's."""
    from distill.sampling import sample
    from distill.study.measure import relative_mse

    config = from_dict(AblateConfig, json.loads(text))
    reference, noise = _reference(text, str(out)), _bench(text, str(out), "teacher").noise
    return {
        name: relative_mse(reference, sample(model, noise, steps))
        for name, steps in (
            ("few_steps", len(config.hyper.grid)),
            ("many_steps", config.evaluate.reference_steps),
        )
    }


# Caches of one process: teachers and what they answer are the same for all its arms.


@lru_cache
def _teacher(text: str, out: str, which: str) -> Any:
    config = from_dict(AblateConfig, json.loads(text))
    if which == "teacher":
        return train_teacher(config, Path(out), False)
    return train_hyper(config, _teacher(text, out, "teacher"), Path(out), False)


@lru_cache
def _bench(text: str, out: str, which: str) -> Any:
    from distill.study.patterns import Bench

    config = from_dict(AblateConfig, json.loads(text))
    grid = config.hyper.grid if which == "hyper" else None
    return Bench(_teacher(text, out, which), config.evaluate, grid)


@lru_cache
def _reference(text: str, out: str) -> Any:
    from distill.sampling import sample

    config = from_dict(AblateConfig, json.loads(text))
    noise = _bench(text, out, "teacher").noise
    return sample(_teacher(text, out, "teacher"), noise, config.evaluate.reference_steps)


# --- tasks ----------------------------------------------------------------------


def task(config: AblateConfig, out: Path, arm: str, seed: int, rates: dict, share: float) -> dict:
    """One unit of work as plain data; `file` is where its values go."""
    plain = to_dict(replace(config, seeds=[0]))  # an arm does not depend on the other seeds
    kinds = {} if arm == "teacher" else rates
    tag = fingerprint(plain, kinds, share)
    return {
        "config": plain, "out": str(out), "arm": arm, "seed": seed, "rates": kinds,
        "share": share, "folder": str(out / "models" / f"seed{seed}-{tag}"),
        "file": str(out / "values" / f"{arm}-seed{seed}-{tag}"),
    }  # fmt: skip


def work(job: dict) -> dict:
    """Do a task, or find it done; returns its values."""
    file = Path(job["file"] + ".json")
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    config = from_dict(AblateConfig, job["config"])
    text, out = json.dumps(to_dict(config), sort_keys=True), Path(job["out"])
    teacher = _teacher(text, str(out), "hyper" if job["arm"] == "hyper" else "teacher")
    if job["arm"] in ("fit-teacher", "hyper"):  # trained above, kept by `train`
        return {}
    from distill.data.photos import Photos

    context = Context(config, job["seed"], Path(job["folder"]), teacher, Photos("train"),
                      job["rates"], job["share"])  # fmt: skip
    values, tensors = run_arm(job["arm"], context, out)
    ckpt.make_folder(file.parent)
    if tensors:
        ckpt.save_tensors(job["file"] + ".safetensors", tensors)
    ckpt.write_text(file, json.dumps(values, indent=2) + "\n")
    return values


class Measured:
    """In place of `Workers`: what earlier runs have measured, {} where nothing was."""

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, kind: Any, err: Any, trace: Any) -> None:
        pass

    def run(self, jobs: Sequence[dict], label: str, progress: bool) -> list[dict]:
        files = [Path(job["file"] + ".json") for job in jobs]
        return [json.loads(f.read_text(encoding="utf-8")) if f.exists() else {} for f in files]


# --- the command ----------------------------------------------------------------------------


def search(
    config: AblateConfig, out: Path, workers: Workers | Measured, progress: bool
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(learning rate of every kind, relative MSE by kind and rate): the lowest error wins."""
    rates = config.search.rates
    if len(rates) == 1:
        return dict.fromkeys(SEARCHED, rates[0]), {}
    jobs = [
        task(config, out, arm, config.search.seed, {kind: rate}, config.search.share)
        for kind, arm in SEARCHED.items()
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
    out: Path | str,
    *,
    quick: bool = False,
    config: AblateConfig | None = None,
    results: Path | str | None = None,
    workers: int = 2,
    so_far: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Everything `d2m ablate` does; returns the path of ablate.html.

    results: where claims.json goes too, and the page beside it (.html). so_far: train nothing,
    judge by what was measured.
    """
    from distill.study.ablate_page import render
    from distill.study.claim_list import collect

    out = ckpt.make_folder(out)
    if config is None:
        config = load_config(AblateConfig, bundled("ablate-quick.yaml" if quick else "ablate.yaml"))
    with Measured() if so_far else Workers(workers, work) as pool:
        for name in ("fit-teacher", "hyper"):
            pool.run([task(config, out, name, 0, {}, 1.0)], name, progress)
        rates, tried = search(config, out, pool, progress)
        jobs = {
            (seed, arm): task(config, out, arm, seed, rates, 1.0)
            for arm in arm_names(config)
            for seed in config.seeds
        }
        values = dict(zip(jobs, pool.run(list(jobs.values()), "arms", progress), strict=True))
    rows = {str(s): {arm: values[s, arm] for arm in arm_names(config)} for s in config.seeds}
    content = collect(config, rows, rates, tried)
    text = json.dumps(content, indent=1) + "\n"
    for path in {out / "claims.json", *([Path(results)] if results is not None else [])}:
        ckpt.make_folder(path.parent)
        ckpt.write_text(path, text)
    for entry in content["claims"]:
        say(f"{entry['verdict']:>14}  {claims.effect_text(entry):>22}  {entry['claim']}")
    tensors = {}
    for arm in ("moe", "teacher"):  # the first seed's
        if not values[config.seeds[0], arm]:
            raise UserError(f"no page yet: arm {arm!r} is not measured; claims.json is written")
        file = jobs[config.seeds[0], arm]["file"] + ".safetensors"
        tensors |= ckpt.pack(arm, ckpt.load_tensors(file)[0])
    ckpt.save_tensors(out / "ablate.safetensors", tensors)
    page = render(out)
    if results is not None:
        ckpt.write_text(Path(results).with_suffix(".html"), page.read_text(encoding="utf-8"))
    return page
