"""What a step must cost: work by part, the ideal, and a roofline that predicts other machines.

A step of FLUX, dense or converted, is five kinds of work:

    attention   the softmax products, FLOPs
    ffn         the FFNs' (or experts') matrix products, FLOPs
    gemm        all other large matrix products, FLOPs
    adaln       modulation: products with one row a sample, bytes of weights
    rest        norms, modulation, residuals, rotary, launch gaps: tokens x blocks
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from report.read import ceilings_of, peer_rows

from d2m_models import PRESETS, FluxMoEConfig, account
from distill.evaluate.paper import DENSE, TABLE1, PaperRow, first_row

PARTS = ("attention", "ffn", "gemm", "adaln", "rest")
IMAGE, TEXT = 4096, 512  # tokens at 1024x1024
MODELS = ("flux-dense", "flux-lite", "flux-mini", "flux-moe-l", "flux-moe-m", "flux-moe-s",
          "flux-moe-xs")  # fmt: skip
CONFIGS = {"flux-dense": FluxMoEConfig(moe=None, dense_double_blocks=()), **PRESETS}
_TILE = (128, 256)  # a GEMM's output tile on a GPU, for the rounding to whole waves


def account_of(source: Any, image: int = IMAGE, text: int = TEXT) -> Any:
    config = CONFIGS[source] if isinstance(source, str) else source
    return account(config, image_tokens=image, text_tokens=text)


def blocks_run(config: Any) -> float:
    """Blocks that a forward runs: all outside groups, kappa of each group."""
    total, mob = config.num_layers + config.num_single_layers, getattr(config, "mob", None)
    if mob is None:  # diffusers' own models have none
        return total
    groups = mob.double_groups + mob.single_groups
    return total - sum(len(g) for g in groups) + mob.active * len(groups)


def work(source: Any, image: int = IMAGE, text: int = TEXT) -> dict[str, float]:
    """Amount of each part in one forward (a preset name, "flux-dense", or a FLUX model)."""
    parts = account_of(source, image, text).parts
    if isinstance(source, str):
        config = CONFIGS[source]
    else:
        config = getattr(source, "d2m_config", source.config)
    return {
        "attention": parts["attention"].attention_flops,
        "ffn": parts["ffn"].flops,
        "gemm": parts["attention"].flops + parts["in_out"].flops,
        "adaln": 2.0 * (parts["adaln"].activated + parts["conditioning"].activated),
        "rest": blocks_run(config) * (image + text),
    }


def work_ratio(name: str) -> float:
    """FLOPs of a forward at 1024x1024 over dense's, attention in full."""
    return account_of(name).flops / account_of("flux-dense").flops


def ideal(
    dense_parts: Mapping[str, float], dense: Mapping[str, float], model: Mapping[str, float]
) -> float:
    """Seconds of a step if every part of dense's measured time shrank as its work does."""
    return sum(dense_parts[p] * model[p] / dense[p] for p in PARTS)


# --- other machines -------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Ceilings: bf16 TFLOP/s, TB/s, multiprocessors (None: no rounding to waves)."""

    name: str
    tflops: float
    tbps: float
    sms: int | None = None


A_CPU = "a CPU"  # as the source of a calibration
H20 = Machine("H20", 148.0, 4.0, 78)
A100 = Machine("A100", 312.0, 2.0, 108)


@dataclass(frozen=True)
class Calibration:
    """What a measured machine reaches, as a share of its own ceilings.

    attention, ffn, gemm: of its matrix-product ceiling. moe: the same for the MoE layer's own
    FLOPs, with the last wave of the calibrating machine in it where that has SMs. adaln: of its
    copy ceiling. rest_bytes: bytes a token and block would have moved at that ceiling in the time
    of "rest".
    """

    source: str
    attention: float
    ffn: float
    gemm: float
    moe: float
    adaln: float
    rest_bytes: float
    sms: int | None


def fill(m: int, n: int, sms: int | None) -> float:
    """Share of the last wave's tiles that has work: tiles / (waves * SMs)."""
    if sms is None:
        return 1.0
    tiles = math.ceil(m / _TILE[0]) * math.ceil(n / _TILE[1])
    return tiles / (math.ceil(tiles / sms) * sms)


def _fills(sms: int | None, s: int) -> dict[str, float]:
    """Fill of each part's typical products at FLUX's width, D = 3072, and s tokens."""
    d = 3072
    up, down, square = fill(s, 4 * d, sms), fill(s, d, sms), fill(s, 3 * d, sms)
    return {"ffn": 2 / (1 / up + 1 / down), "gemm": square, "attention": 1.0}


def calibrating(results: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The two records that a calibration rests on: dense's parts, and the largest MoE layer."""
    dense = results["models"].get("flux-dense", {})
    layers = [row for row in peer_rows(results) if row["pass"] == "forward"]
    if not dense.get("parts") or not layers:
        return None
    return dense, max(layers, key=lambda row: row["shape"]["T"])


def calibrate(results: Mapping[str, Any]) -> Calibration | None:
    """From a results file; None without dense's parts or without a measured MoE layer."""
    found = calibrating(results)
    if found is None:
        return None
    dense, layer = found
    split = dense["parts"]
    ceiling = ceilings_of(results, dense)
    peak, rate = ceiling["tflops"] * 1e12, ceiling["gbps"] * 1e9
    sms = results["environment"].get("sms")
    amount = work("flux-dense", dense["image_tokens"], dense["text_tokens"])
    full = _fills(sms, dense["image_tokens"] + dense["text_tokens"])
    reached = {p: amount[p] / (split[p] * peak) / full[p] for p in ("attention", "ffn", "gemm")}
    return Calibration(
        source=_label(results["environment"]),
        **reached,
        moe=layer["tflops"] / ceilings_of(results, layer)["tflops"],
        adaln=amount["adaln"] / (max(split["adaln"], 1e-9) * rate),
        rest_bytes=split["rest"] * rate / amount["rest"],
        sms=sms,
    )


def _label(env: Mapping[str, Any]) -> str:
    return A_CPU if env["device_type"] == "cpu" else env["device"]


def predict_parts(
    name: str, machine: Machine, c: Calibration, image: int = IMAGE, text: int = TEXT
) -> dict[str, float]:
    """Seconds of each part of a step, at 1024x1024 if nothing else is said."""
    amount, full = work(name, image, text), _fills(machine.sms, image + text)
    peak, rate = machine.tflops * 1e12, machine.tbps * 1e12
    routed = 0.0 if CONFIGS[name].moe is None else _moe_share(name)
    # A whole rate of the peak cannot be beaten, whatever the calibrating machine's ceiling was.
    # The measured MoE layer has a last wave in it, unless its machine knows none.
    full["moe"] = full["ffn"] if c.sms is None else 1.0
    best = {p: min(1.0, getattr(c, p)) * full[p] for p in ("attention", "ffn", "gemm", "moe")}
    return {
        "attention": amount["attention"] / (best["attention"] * peak),
        "ffn": amount["ffn"] * (routed / best["moe"] + (1 - routed) / best["ffn"]) / peak,
        "gemm": amount["gemm"] / (best["gemm"] * peak),
        "adaln": amount["adaln"] / (min(1.0, c.adaln) * rate),
        "rest": amount["rest"] * c.rest_bytes / rate,
    }


def predict(name: str, machine: Machine, c: Calibration, *tokens: int) -> float:
    """Seconds of a step with these image and text tokens (default: at 1024x1024)."""
    return sum(predict_parts(name, machine, c, *tokens).values())


def predict_ratio(name: str, machine: Machine, c: Calibration, *tokens: int) -> float:
    """Latency relative to dense: what two machines have in common cancels."""
    return predict(name, machine, c, *tokens) / predict("flux-dense", machine, c, *tokens)


def _moe_share(name: str) -> float:
    """Share of a model's FFN FLOPs that is in MoE layers."""
    config = CONFIGS[name]
    stays = account_of(replace(config, moe=None)).parts["ffn"].flops
    now = account_of(config).parts["ffn"].flops
    width, hidden = 3072, 4 * 3072
    shared, expert = config.moe.sizes(width, hidden)
    kept = (shared + config.moe.top_k * expert) / hidden
    # now = dense + kept * routed, stays = dense + routed (routers left aside)
    routed = (stays - now) / (1 - kept)
    return kept * routed / now


def error_rows(
    calibration: Calibration, measured: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Prediction against what is known: the paper's H20 rows, and every machine measured.

    Dense rows of the paper ran the same mathematics as ours; its MoE rows ran MegaBlocks, so there
    the difference is the two implementations' as much as the prediction's.
    """
    rows = []

    def add(machine: str, what: str, predicted: float, known: float, note: str) -> None:
        rows.append({"calibrated_on": calibration.source, "machine": machine, "what": what,
                     "predicted": predicted, "known": known, "error": predicted / known - 1,
                     "note": note})  # fmt: skip

    for row in TABLE1:
        own = row.preset in ("flux-dense", "flux-lite", "flux-mini")
        note = "same model" if own else "the paper's kernels"
        seconds = row.nfe * predict(row.preset, H20, calibration)
        add("H20 (paper)", f"{row.name}, s", seconds, row.latency_s, note)
        if row is first_row(row.preset) and row.preset != "flux-dense":
            ratio = predict_ratio(row.preset, H20, calibration)
            add("H20 (paper)", f"{row.name} / dense", ratio, _latency_ratio(row), note)
    for results in measured.values():
        env, itself = results["environment"], calibrate(results) == calibration
        dense = results["models"].get("flux-dense", {}).get("step_seconds")
        for name in MODELS:
            model = results["models"].get(name, {})
            if not dense or "step_seconds" not in model or name == "flux-dense":
                continue
            top = ceilings_of(results, model)
            machine = Machine(_label(env), top["tflops"], top["gbps"] * 1e-3, env.get("sms"))
            tokens = model["image_tokens"], model["text_tokens"]
            ratio = predict_ratio(name, machine, calibration, *tokens)
            note = model["mode"] + (", calibrated on itself" if itself else "")
            add(machine.name, f"{name} / dense", ratio, model["latency_ratio"], note)
    return rows


def _latency_ratio(row: PaperRow) -> float:
    """Of one step, to the paper's dense model."""
    return (row.latency_s / row.nfe) / (DENSE.latency_s / DENSE.nfe)


def paper_ratio(name: str) -> dict[str, float]:
    """The paper's latency ratio to dense over our FLOPs ratio, attention in full on both sides."""
    latency, flops = _latency_ratio(first_row(name)), work_ratio(name)
    return {"latency_ratio": latency, "flops_ratio": flops, "latency_over_flops": latency / flops}
