"""`d2m evaluate MODEL`: images, metrics, scores.json, grid.png and report.html in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distill import files as ckpt
from distill.device import environment
from distill.errors import UserError
from distill.evaluate import compbench, dpg, fidelity, geneval, page, rewards
from distill.evaluate.generate import Settings, generate, keys_of, read_model
from distill.evaluate.judges import Item, Judges
from distill.evaluate.prompts import Prompt
from distill.evaluate.scores import SCHEMA, read_scores
from distill.evaluate.statistics import prompt_of, summarise
from distill.loop.parallel import World


@dataclass(frozen=True)
class Metric:
    """score(items, judges) -> {column: {key: value}}.

    kind: of the prompts it can judge, None: any. judges: role -> published default. grouped: the
    benchmark averages over the prompts' groups first.
    """

    score: Callable[[Sequence[Item], Judges], Mapping[str, Mapping[str, Any]]]
    kind: str | None = None
    judges: Mapping[str, str | None] = field(default_factory=dict)
    grouped: bool = False


METRICS = {
    "fidelity": Metric(fidelity.score, None, {"lpips": None, "features": None}),
    "clip": Metric(rewards.clip_score, None, {"model": "openai/clip-vit-base-patch32"}),
    "image-reward": Metric(rewards.image_reward, None, {
        "model": "THUDM/ImageReward", "tokenizer": "google-bert/bert-base-uncased"}),
    "mps": Metric(rewards.mps, None, {
        "model": "MPS_overall_checkpoint.pth", "clip": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}),
    "geneval": Metric(geneval.score, "geneval", {
        "detector": "facebook/mask2former-swin-small-coco-instance",
        "clip": "openai/clip-vit-large-patch14"}, grouped=True),
    "dpg": Metric(dpg.score, "dpg", {"vqa": "Salesforce/blip-vqa-capfilt-large"}),
    "t2i-compbench": Metric(compbench.score, "t2i-compbench", {
        "vqa": "Salesforce/blip-vqa-capfilt-large", "depth": "Intel/dpt-large", "vlm": None,
        "detector": "google/owlv2-base-patch16-ensemble"}, grouped=True),
}  # fmt: skip


def judges_of(given: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """metric -> role -> judge, from "METRIC.ROLE=NAME" (or "METRIC=NAME", its first role)."""
    names = {name: dict(metric.judges) for name, metric in METRICS.items()}
    for text in given:
        left, _, judge = text.partition("=")
        metric, _, role = left.partition(".")
        role = role or next(iter(names.get(metric, {})), "")
        if not judge or role not in names.get(metric, {}):
            known = [f"{m}.{r}" for m, roles in names.items() for r in roles]
            raise UserError(f"--judge is {text!r}; expected ROLE=NAME, ROLE of {', '.join(known)}")
        names[metric][role] = judge
    return names


def evaluate(
    out: Path,
    settings: Settings,
    prompts: Sequence[Prompt],
    metrics: Sequence[str],
    world: World,
    *,
    against: str | None = None,
    judges: Sequence[str] = (),
    batch: int = 1,
    offload: str | None = None,
    progress: bool = True,
) -> Path:
    """Generate what is missing, judge, and write OUT; returns report.html's path.

    Args:
        against: the teacher: a model, evaluated in OUT/against with the same settings, or the
            folder of an evaluation.
        judges: see `judges_of`. A metric that cannot be computed is named in scores.json with the
            reason; the others go on.

    Raises:
        UserError: no metric could be computed.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise UserError(f"--metrics has {unknown}; expected some of {', '.join(METRICS)}")
    named = judges_of(judges)
    made = {"batch": batch, "offload": offload, "progress": progress,
            "latents": "fidelity" in metrics}  # fmt: skip
    generate(out, prompts, settings, world, **made)
    other = None
    if against is not None:
        other = Path(against)
        if not (other / "settings.json").exists():
            other = out / "against"
            generate(other, prompts, replace(settings, model=against), world, **made)
        elif world.main:
            _same_noise(out, other)
    keys = keys_of(prompts, settings.images)
    items = [Item(key, prompts[prompt_of(key)], out, other) for key in keys]
    columns: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    if broken := {item.key: path for item in items if (path := item.broken()) is not None}:
        items = [item for item in items if item.key not in broken]
        failed["images"] = (
            f"{len(broken)} images that cannot be read are left out, {next(iter(broken.values()))} "
            "first; remove them, and the same command makes them again"
        )
    groups = {i: prompt.group for i, prompt in enumerate(prompts)}
    for name in metrics:
        metric = METRICS[name]
        used = Judges(name, named[name], world.device)
        found, error = _score(metric, used, items, world)
        if error is not None:
            failed[name] = error
            continue
        if pairs := found.pop("features", None):
            for column, value in fidelity.sets(pairs).items():
                columns[column] = {"mean": value, "interval": None, "images": len(pairs)}
        for column, values in found.items():
            summary = summarise(values, groups if metric.grouped else None)
            columns[column] = {**summary, "values": values}
        for column in columns.values():
            column.setdefault("metric", name)
            column.setdefault("judges", used.used)
    if world.main:
        return _write(out, other, columns, failed, prompts, world)
    return out / "report.html"


def _score(
    metric: Metric, judges: Judges, items: Sequence[Item], world: World
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """(columns of all processes, None), or why there are none."""
    found: Mapping[str, Mapping[str, Any]] = {}
    error = None
    if metric.kind is not None:
        items = [item for item in items if item.prompt.kind == metric.kind]
    if not items and metric.kind is not None:
        error = f"{judges.metric}: no prompt is in the format of {metric.kind}; see --prompts"
    try:
        if mine := items[world.rank :: world.size]:
            found = metric.score(mine, judges)
    except UserError as err:
        error = str(err)
    except ModuleNotFoundError as err:
        error = (f"{judges.metric}: the package {err.name!r} is missing; pip install "
                 "'dense2moe[evaluate]' brings it")  # fmt: skip
    shares = [(found, error)]
    if world.size > 1:
        shares = [None] * world.size
        torch.distributed.all_gather_object(shares, (found, error))
    whole: dict[str, dict[str, Any]] = {}
    for columns, _ in shares:
        for column, values in columns.items():
            whole.setdefault(column, {}).update(values)
    whole = {column: dict(sorted(values.items())) for column, values in whole.items()}
    return whole, next((e for _, e in shares if e is not None), None)


def _same_noise(out: Path, other: Path) -> None:
    """An evaluation that is there already began with the same prompts, noise and size."""
    ours, theirs = (
        json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        for folder in (out, other)
    )
    differ = [k for k in ("prompts_hash", "seed", "size", "dtype") if ours[k] != theirs[k]]
    if differ or theirs["images"] < ours["images"]:
        raise UserError(f"--against {other} has other {', '.join(differ) or 'images'} than {out}")


def _write(
    out: Path, other: Path | None, columns: dict[str, dict[str, Any]], failed: dict[str, str],
    prompts: Sequence[Prompt], world: World,
) -> Path:  # fmt: skip
    """scores.json, with the columns of metrics that an earlier call computed, grid and page."""
    old = read_scores(out)["columns"] if (out / "scores.json").exists() else {}
    kept = {k: v for k, v in old.items() if k not in columns}
    content = {
        "schema": SCHEMA,
        "model": read_model(out),
        "against": None if other is None else read_model(other)["model"],
        "settings": json.loads((out / "settings.json").read_text(encoding="utf-8")),
        "columns": {**kept, **columns},
        "failed": failed,
        "groups": [prompt.group for prompt in prompts],
        "texts": [prompt.text for prompt in prompts],
        "environment": environment(world.device.type),
    }
    if not content["columns"]:
        raise UserError("no metric could be computed: " + "; ".join(failed.values()))
    ckpt.write_text(out / "scores.json", json.dumps(content, indent=1) + "\n")
    folders = {"model": out} | ({} if other is None else {"teacher": other})
    return page.write_report(out, content, folders, prompts)
