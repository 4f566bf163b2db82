"""The benchmarks' arithmetic: work, ideal times, predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from helpers.benchmark_machine import later_run, machine
from report import roofline

from distill.evaluate.paper import DENSE, TABLE1

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(machine()))
    (tmp_path / "other.json").write_text("{}")  # not ours: ignored
    return tmp_path


def test_paper_ratios_as_published():
    """In one FLOP convention the paper stands at 1.23, 1.20, 1.06 and 1.24."""
    for name, known in {"l": 1.23, "m": 1.20, "s": 1.06, "xs": 1.24}.items():
        got = roofline.paper_ratio(f"flux-moe-{name}")["latency_over_flops"]
        assert got == pytest.approx(known, abs=0.01)


def test_work_adds_up_to_the_flops_of_the_account():
    for name in roofline.MODELS:
        amount, counts = roofline.work(name), roofline.account_of(name)
        large = amount["attention"] + amount["ffn"] + amount["gemm"]
        assert large == pytest.approx(counts.flops, rel=2e-3)  # the rest is AdaLN: one row each


def test_rest_counts_the_blocks_that_run():
    blocks = {n: roofline.work(n)["rest"] / 4608 for n in roofline.MODELS}
    assert blocks == {"flux-dense": 57, "flux-lite": 46, "flux-mini": 15, "flux-moe-l": 57,
                      "flux-moe-m": 47, "flux-moe-s": 35, "flux-moe-xs": 27}  # fmt: skip


def test_ideal_of_dense_is_dense_and_parts_shrink_separately():
    work = roofline.work("flux-dense")
    parts = dict(zip(roofline.PARTS, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    assert roofline.ideal(parts, work, work) == pytest.approx(15.0)
    half = dict(work, ffn=work["ffn"] / 2)
    assert roofline.ideal(parts, work, half) == pytest.approx(14.0)


def test_a_machine_that_keeps_its_rates_is_predicted_exactly():
    """Calibrating on a machine and predicting that machine gives back what was measured."""
    results = machine(share=0.5)
    calibration = roofline.calibrate(results)
    assert calibration.attention == pytest.approx(0.5)
    assert calibration.moe == pytest.approx(0.5)
    same = roofline.Machine("same", 100.0, 1.0)
    for name in ("flux-dense", "flux-moe-l", "flux-moe-xs"):
        step = results["models"][name]["step_seconds"]
        assert roofline.predict(name, same, calibration) == pytest.approx(step, rel=1e-6)
    twice = roofline.Machine("twice", 200.0, 2.0)
    half = roofline.predict("flux-moe-l", twice, calibration)
    assert half == pytest.approx(results["models"]["flux-moe-l"]["step_seconds"] / 2)


def test_no_calibration_without_parts_or_layers():
    results = machine()
    assert roofline.calibrate({**results, "layers": []}) is None
    del results["models"]["flux-dense"]["parts"]
    assert roofline.calibrate(results) is None


def test_fill_of_the_last_wave():
    assert roofline.fill(128 * 132, 256, 132) == 1.0
    assert roofline.fill(128 * 133, 256, 132) == pytest.approx(133 / 264)
    assert roofline.fill(5, 5, None) == 1.0


def test_shares_refer_to_the_ceilings_of_their_own_run():
    """A later run of other parts, at other ceilings, changes neither calibration nor prediction."""
    alone, mixed = machine(), later_run(machine(), 50.0, 400.0, "scaling")
    assert roofline.calibrate(mixed) == roofline.calibrate(alone)
    kept = roofline.error_rows(roofline.calibrate(alone), {"h200": alone})
    assert roofline.error_rows(roofline.calibrate(mixed), {"h200": mixed}) == kept
    # a layer of the later run is a share of that run's ceiling
    renewed = roofline.calibrate(later_run(machine(), 50.0, 400.0, "layers"))
    assert renewed.moe == pytest.approx(2 * roofline.calibrate(alone).moe)
    assert renewed.ffn == roofline.calibrate(alone).ffn


def test_the_roofline_draws_every_runs_own_ceilings(folder):
    from report.pictures import roofline_svg

    words = roofline_svg(folder / "x.svg", {"h200": later_run(machine(), 50.0, 400.0, "scaling")})
    assert "100 TFLOP/s and 1e+03 GB/s (h200-1)" in words and "50 TFLOP/s" not in words
    words = roofline_svg(folder / "x.svg", {"h200": later_run(machine(), 50.0, 400.0, "stages")})
    assert "(h200-1), 50 TFLOP/s and 400 GB/s (h200-2)" in words


def test_no_point_of_the_roofline_is_above_its_own_runs_ceiling(folder):
    """Not one of a faster run beside a slower one; one out of the cache is on the roof."""
    from report.pictures import roofline_svg

    mixed = later_run(machine(), 40.0, 400.0, "stages")  # these rows reached 50 TFLOP/s
    for row in mixed["stages"][1:]:
        row["tflops"] = 20.0
    words = roofline_svg(folder / "x.svg", {"h200": mixed})
    assert "route 100.0%, grouped_gemm_up 50.0%" in words and "moe_ffn 50.0%" in words
    assert "1 of 5, faster from the cache" in words


def test_a_machine_without_waves_lends_dense_and_moe_the_same_ones():
    """Calibrated without SMs, MoE layers lose as much to the last wave as the dense FFN does."""
    calibration = roofline.calibrate(machine())
    assert calibration.sms is None and calibration.moe == pytest.approx(calibration.ffn)
    coarse = roofline.Machine("coarse", 100.0, 1.0, 300)
    assert roofline.fill(4608, 3072, 300) < 0.8
    for name in ("flux-moe-l", "flux-moe-xs"):
        moe = roofline.predict_parts(name, coarse, calibration)["ffn"]
        dense = roofline.predict_parts("flux-dense", coarse, calibration)["ffn"]
        work = roofline.work(name)["ffn"] / roofline.work("flux-dense")["ffn"]
        assert moe / dense == pytest.approx(work)


def test_error_rows_compare_like_with_like():
    results = {"h200": machine()}
    rows = roofline.error_rows(roofline.calibrate(results["h200"]), results)
    paper = [r for r in rows if r["machine"] == "H20 (paper)"]
    absolute = [r["what"] for r in paper if r["what"].endswith(", s")]
    assert absolute == [f"{row.name}, s" for row in TABLE1]
    relative = {r["what"]: r["known"] for r in paper if r["what"].endswith("/ dense")}
    assert relative["FLUX.1-MoE-L / dense"] == pytest.approx(17.8 / 21.2) and len(relative) == 6
    assert paper[0]["known"] == DENSE.latency_s and paper[0]["note"] == "same model"
    own = [r for r in rows if r["machine"] == "Model GPU"]
    assert len(own) == 4 and all(abs(r["error"]) < 1e-6 for r in own)
    assert {r["note"] for r in own} == {"compile, calibrated on itself"}
    other = {"h200": results["h200"], "h100": machine(share=0.4)}
    rows = roofline.error_rows(roofline.calibrate(other["h100"]), other)
    notes = [r["note"] for r in rows if r["machine"] == "Model GPU"]
    assert notes == 4 * ["compile"] + 4 * ["compile, calibrated on itself"]
