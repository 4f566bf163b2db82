"""Does the latency fall as far as the FLOPs? One sentence a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from report import roofline
from report.read import Results, machine_label

_NEAR = 1.05  # what still counts as "as far"


def verdicts(all_results: Results) -> list[str]:
    """Of every machine with an MoE model measured.

    On a GPU the latency is held against the FLOPs. On a CPU attention takes a far larger share of
    dense's time than of its FLOPs, so there each model is held against dense's own measured parts,
    scaled by what the model keeps of each: latency / ideal.
    """
    found = []
    for name, results in all_results.items():
        models = [m for p, m in results["models"].items()
                  if p.startswith("flux-moe-") and "latency_ratio" in m]  # fmt: skip
        if models:
            cpu = results["environment"]["device_type"] == "cpu"
            text = _on_a_cpu(results["models"], models) if cpu else _on_a_gpu(models)
            found.append(f"{machine_label(name, results)}: {text}.")
    return found


def _on_a_gpu(models: list[Mapping[str, Any]]) -> str:
    flops = [m["latency_over_flops"] for m in models]
    return f"{_answer(flops)}; latency / FLOPs is {_range(flops)} (1: as far)"


def _on_a_cpu(every: Mapping[str, Any], models: list[Mapping[str, Any]]) -> str:
    ideal = [m["latency_over_ideal"] for m in models if "latency_over_ideal" in m]
    flops = f"latency / FLOPs is {_range(m['latency_over_flops'] for m in models)}"
    parts = every.get("flux-dense", {}).get("parts")
    if not ideal or not parts:
        return f"{flops}; where dense's time goes was not measured"
    amount = roofline.work("flux-dense")
    counted = sum(amount[p] for p in ("attention", "ffn", "gemm"))
    time, work = parts["attention"] / sum(parts.values()), amount["attention"] / counted
    return (
        f"{_answer(ideal)} in the parts that get sparser; latency / ideal is {_range(ideal)} (1: "
        f"every part of dense's time shrinks as its own work does), while {flops}, because "
        f"attention takes {time:.0%} of dense's time here for {work:.0%} of its FLOPs and MoE "
        "layers leave it as it is"
    )


def _answer(ratios: list[float]) -> str:
    worst = max(ratios)
    return "yes" if worst <= _NEAR else f"not quite, {worst - 1:.0%} more at worst"


def _range(ratios: Iterable[float]) -> str:
    low, *_, high = (f"{r:.2f}" for r in sorted([*ratios] * 2))
    return low if low == high else f"{low} to {high}"
