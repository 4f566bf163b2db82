"""`d2m survey`: is this model worth converting, and how? Without training, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models.config import MoEConfig
from d2m_models.conversion.flux import ffn_linears
from d2m_models.conversion.formation import each_record
from d2m_models.conversion.grouping import measure_block_mse, propose_groups
from distill import files as ckpt
from distill.data.batch import generator
from distill.device import environment
from distill.errors import UserError
from distill.survey.ffn import Sample, survey_ffn
from distill.survey.groups import record_groups, survey_group

SCHEMA = "dense2moe-survey/1"
RATIOS = (0.5, 1.0, 1.25, 1.5, 2.0, 3.0)
GROUP = 3  # blocks of a group
# (shared_ratio, expert_ratio, experts, top-k) of an FFN of ratio 4: at r_a 1, 1.25, 1.5 and 2
CANDIDATES = (
    (0.5, 0.25, 14, 2),
    (1.0, 0.125, 24, 2),
    (1.0, 0.25, 12, 2),
    (1.0, 0.125, 24, 4),
    (0.5, 0.25, 14, 4),
    (1.0, 0.5, 6, 2),
    (1.0, 0.25, 12, 4),
)


def survey(
    model: nn.Module, source: Any, out: Path | str, *, about: Mapping[str, Any], samples: int = 128,
    rows: int = 32, tokens: int | None = None, memory_gib: float = 4.0, seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Surveys every FFN and the groups of single-stream blocks; returns survey.json's content.

    A layer that OUT/survey.json has, of the same settings, is not measured again.

    Args:
        model: a dense FLUX, frozen. source: training data (`distill.data.sources`).
        about: what else the results depend on and are to be shown beside them.
        samples: of the data that go through the model, for the fit and again to judge it. rows: at
            once. tokens: kept of each FFN, default 48 D: with fewer, mixtures, which have more to
            fit, look worse than they are. memory_gib: for them; what is over it makes the model run
            again for the next layers.
    """
    from tqdm import tqdm

    linears = ffn_linears(model)
    width = model.inner_dim
    tokens = tokens or 48 * width
    if samples < 1 or rows < 1 or tokens < 2:
        raise UserError(f"samples is {samples}, rows {rows}, tokens {tokens}; expected 1 or more")
    weights = [float(down.weight.float().sum()) for _, down, _ in linears.values()]
    about = {**about, "weights": ckpt.fingerprint(weights)}
    settings = {**about, "samples": samples, "tokens": tokens, "seed": seed}
    path = ckpt.make_folder(out) / "survey.json"
    content = _read(path, settings, next(model.parameters()).device.type)
    candidates = [MoEConfig(*c) for c in CANDIDATES]

    def batches(part: int) -> Iterator[dict[str, Tensor]]:
        device = next(model.parameters()).device
        for start in range(0, samples, rows):
            number = min(rows, samples - start)
            step = start // rows + part * -(-samples // rows)  # other images, not other noise alone
            batch = source.batch(seed, step, number, ("calibrate", "test")[part])
            yield batch.to(device).inputs()

    def write() -> None:
        ckpt.write_text(path, json.dumps(content, indent=1) + "\n")

    todo = [name for name in linears if name not in content["layers"]]
    bar = tqdm(total=len(linears), initial=len(linears) - len(todo), desc="survey", unit=" layers",
               disable=not progress)  # fmt: skip
    with bar, torch.no_grad():
        records = (
            each_record(model, partial(batches, p), tokens, seed + p, todo, memory_gib / 2)
            for p in (0, 1)
        )
        for (name, fitted), (_, judged) in zip(*records, strict=True):
            _, down, first = linears[name]
            w2_DF = down.weight[:, first:].detach().float()
            fit, judge = Sample.of(fitted, w2_DF), Sample.of(judged, w2_DF)
            content["layers"][name] = survey_ffn(
                fit, judge, w2_DF, RATIOS, candidates, generator(seed, "weights")
            )
            write()
            bar.update()
    if "groups" not in content:
        content["groups"] = _survey_groups(model, batches, tokens, seed)
        write()
    return content


def _survey_groups(model: nn.Module, batches: Any, tokens: int, seed: int) -> dict[str, Any]:
    """Groups of the blocks that change tokens least, as many as there is room for."""
    mse = measure_block_mse(model, batches(0)).values["single"].mean(0)
    count = (len(mse) - 2) // GROUP
    if count < 1:
        return {}
    groups = propose_groups(mse, count, GROUP)
    parts = [record_groups(model, groups, batches(p), GROUP * tokens, generator(seed, "order", p))
             for p in (0, 1)]  # fmt: skip
    blocks = model.single_transformer_blocks
    return {
        ", ".join(map(str, group)): survey_group(blocks[group[0]], GROUP, fit, judge)
        for group, fit, judge in zip(groups, *parts, strict=True)
    }


def _read(path: Path, settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    fresh = {"schema": SCHEMA, "settings": dict(settings), "environment": environment(device),
             "layers": {}}  # fmt: skip
    if not path.exists():
        return fresh
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        old = None
    if not isinstance(old, dict) or old.get("schema") != SCHEMA:
        raise UserError(f"{path} is no survey; choose another --out")
    return old if old["settings"] == fresh["settings"] else fresh


# --- what follows from it -------------------------------------------------------------------


def mixtures(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every mixture over all layers, best first: moe, ratio, formation, error and pruned (means),
    gain: geometric mean of pruned / error."""
    layers = list(content["layers"].values())
    found = []
    for same in zip(*(layer["mixtures"] for layer in layers), strict=True):
        found.append({
            **{k: same[0][k] for k in ("moe", "ratio", "formation")},
            "error": _mean([m["error"] for m in same]),
            "pruned": _mean([m["pruned"] for m in same]),
            "gain": math.exp(_mean([math.log(m["pruned"] / m["error"]) for m in same])),
        })  # fmt: skip
    return sorted(found, key=lambda m: (m["ratio"], m["error"]))


def suggest(content: Mapping[str, Any], budget: float) -> dict[str, Any]:
    """The mixture, and the blocks that stay dense, with the least mean error for at most `budget`
    activated neurons a width, on average over FFNs.

    A dense FFN has no error and activates all its neurons. Blocks that lose most stay dense first.

    Returns:
        moe, formation, dense (block names), activated (mean r_a), error, pruned (that of pruning
        the same blocks at the same ratio), gain = pruned / error.
    """
    layers = content["layers"]
    best: dict[str, Any] | None = None
    blocks: dict[str, list[str]] = {}
    for name in layers:
        blocks.setdefault(".".join(name.split(".")[:2]), []).append(name)
    for number, mixture in enumerate(next(iter(layers.values()))["mixtures"]):
        loss = {b: sum(layers[n]["mixtures"][number]["error"] for n in own) / len(own)
                for b, own in blocks.items()}  # fmt: skip
        moe = MoEConfig.from_dict(mixture["moe"])
        dense: list[str] = []
        for block in [None, *sorted(loss, key=lambda b: loss[b], reverse=True)]:
            if block is not None:
                dense.append(block)
            kept = [n for b, own in blocks.items() if b not in dense for n in own]
            whole = moe.expansion_ratio * (len(layers) - len(kept))
            activated = (whole + moe.activated_ratio * len(kept)) / len(layers)
            if activated > budget + 1e-9 or not kept:
                break
            rows = [layers[n]["mixtures"][number] for n in kept]
            error = sum(r["error"] for r in rows) / len(layers)
            if best is None or error < best["error"]:
                pruned = sum(r["pruned"] for r in rows) / len(layers)
                best = {"moe": mixture["moe"], "formation": mixture["formation"],
                        "dense": list(dense), "activated": activated, "error": error,
                        "pruned": pruned, "gain": pruned / error}  # fmt: skip
    if best is None:
        least = min(m["ratio"] for m in next(iter(layers.values()))["mixtures"])
        raise UserError(f"the budget is {budget}; expected an activated ratio of {least} or more")
    return best


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def verdict(content: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """One sentence: convert, or prune, and why."""
    linear = 1 - _mean([layer["linear"] for layer in content["layers"].values()])
    shape = MoEConfig.from_dict(best["moe"])
    gain, text = best["gain"], (
        f"a linear map explains {linear:.0%} of an FFN's output; at r_a {shape.activated_ratio:g} "
        f"the best mixture is {best['gain']:.2f} times as near as pruning with the same start"
    )  # fmt: skip
    if gain >= 1.1:
        return f"Convert: {text}."
    if gain > 1 / 1.05:
        return f"Either: {text}; what a mixture gains here must come from training."
    return f"Prune: {text}."
