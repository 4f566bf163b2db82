"""What the stored CPU measurements must show: the layer's share of the dense FFN's time."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu.json"


def entry(which: str) -> dict:
    name = f"moe_ffn/{which}/flux-4608/balanced"
    layers = json.loads(PATH.read_text())["layers"] if PATH.exists() else []
    found = [e for e in layers if e["id"] == name]
    if not found:
        pytest.skip(f"benchmarks/results/cpu.json holds no {name}")
    (one,) = found
    assert one["backend"] == "cpu" and one["shape"]["dtype"] == "bfloat16"
    return one


def ratios(one: dict) -> dict[str, float]:
    """Medians of the rounds' own ratios to the dense FFN, from the seconds that are stored."""
    rounds = {name: s["rounds"] for name, s in one["seconds"].items() if name != "dense"}
    dense = one["seconds"]["dense"]["rounds"]
    found = {
        name: median(a / b for a, b in zip(r, dense, strict=True)) for name, r in rounds.items()
    }
    for name, ratio in one["ratio_to_dense"].items():  # what the report and the tables print
        assert found[name] == pytest.approx(ratio, rel=2e-3), name
    return found


def test_forward():
    one = entry("forward")
    found = ratios(one)
    ours = found.pop("moe_ffn")
    assert len(one["seconds"]["moe_ffn"]["rounds"]) >= 15
    assert ours <= 0.39, f"{ours:.3f} of the dense FFN's time"
    assert found, "measured beside no peer"
    faster = {name: ratio for name, ratio in found.items() if ratio < 0.99 * ours}
    assert not faster, f"more than 1% faster than {ours:.4f}: {faster}"


def test_forward_and_backward():
    ours = ratios(entry("forward_backward"))["moe_ffn"]
    assert ours <= 0.42, f"{ours:.3f} of the dense FFN's time"
