"""The benchmarks' arithmetic, results files, report and README tables."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from distill import bench_report, roofline  # noqa: E402
from distill.bench_results import config_of, load_results, ran, run_ids  # noqa: E402
from distill.bench_tables import TABLES, markdown, origin  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.paper import DENSE, TABLE1  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def seconds(*values):
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "q1": ordered[0], "q3": ordered[-1],
            "rounds": list(values)}  # fmt: skip


def machine(peak=100.0, rate=1000.0, share=0.5):
    """Results of a machine that reaches `share` of its ceilings in every part of the work."""
    work = roofline.work("flux-dense")
    parts = {p: work[p] / (share * peak * 1e12) for p in ("attention", "ffn", "gemm")}
    parts["adaln"] = work["adaln"] / (share * rate * 1e9)
    parts["rest"] = 30 * work["rest"] * 3072 / (rate * 1e9)
    dense = sum(parts.values())
    models = {}
    for name in ("flux-dense", "flux-moe-l", "flux-moe-m", "flux-moe-s", "flux-moe-xs"):
        step = roofline.ideal(parts, work, roofline.work(name))
        ratio, flops_ratio = step / dense, roofline.work_ratio(name)
        models[name] = {
            "mode": "compile", "image_tokens": 4096, "text_tokens": 512, "step_seconds": step,
            "latency_ratio": ratio, "flops_ratio": flops_ratio,
            "latency_over_flops": ratio / flops_ratio, "latency_over_ideal": 1.0,
            "image_seconds": {"28": 28 * step, "8": 8 * step}, "backend": "triton", "run": "r",
        }  # fmt: skip
    models["flux-dense"]["parts"] = parts
    shape = {"T": 4608, "D": 3072, "S": 3072, "H": 768, "E": 12, "K": 2, "F": 12288,
             "dtype": "bfloat16", "routing": "balanced"}  # fmt: skip
    rates = {"gflop": 261.0, "gbyte": 0.2, "tflops": share * peak, "gbps": 50.0,
             "share_of_ceiling": {"tflops": share, "gbps": 0.1},
             "share_of_floor": share}  # fmt: skip
    ours = 0.261 / (share * peak)
    layer = {"id": "l", "name": "flux-4608", "shape": shape, "pass": "forward", **rates,
             "seconds": {"moe_ffn": seconds(ours), "dense": seconds(ours / 0.375)},
             "baseline": "dense", "ratio_to_dense": {"moe_ffn": 0.375, "expert loop": 0.5},
             "ratio_quartiles": {"moe_ffn": [0.37, 0.38], "expert loop": [0.5, 0.5]},
             "flop_limit": 0.375, "config": {"up": "128x256x64w8s3"}, "backend": "triton",
             "unavailable": {"megablocks": "no <module>"}, "run": "r"}  # fmt: skip
    stages = [
        {"id": s, "stage": s, "name": "flux-4608", "shape": shape, "pass": "forward", **rates,
         "seconds": {s: seconds(ours / 4), "eager": seconds(ours)}, "ratio_to": {"eager": 0.25},
         "backend": "triton", "run": "r"}
        for s in ("route", "grouped_gemm_up", "grouped_gemm_down", "combine")
    ]  # fmt: skip
    points = [{"value": v, "shape": shape, "ratio_to_dense": 0.4, "flop_limit": 0.375,
               "seconds": {"moe_ffn": seconds(ours * v), "dense": seconds(ours * v * 2)},
               "peak_bytes": {"moe_ffn": v << 20, "dense": v << 21}} for v in (1, 2)]  # fmt: skip
    env = {"device": "Model GPU", "device_type": "cuda", "date": "2026-01-01T00:00:00Z",
           "commit": "abc", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "driver": "580",
           "sm_mhz": "1980", "memory_mhz": "3201", "size": "full"}  # fmt: skip
    top = {"tflops": peak, "gbps": rate}
    return {
        "schema": "dense2moe-benchmarks/1", "environment": env,
        "runs": {"r": {**env, "ceilings": top}}, "ceilings": {**top, "run": "r"}, "stages": stages,
        "layers": [layer], "models": models, "blocks": [],
        "scaling": [{"id": a, "axis": a, "points": points, "backend": "triton", "run": "r"}
                    for a in ("tokens", "skew")],
        "distillation": [{"id": "digits/moe", "batch": 8, "samples_per_second": 10.0,
                          "config": "digits.yaml", "peak_bytes": 1 << 20, "backend": "triton",
                          "run": "r"}],
        "host": [], "skipped": [{"id": "x", "why": "no <time>", "run": "r"}],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(machine()))
    (tmp_path / "other.json").write_text("{}")  # not ours: ignored
    return tmp_path


# --- the arithmetic -------------------------------------------------------------------------


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


def later_run(results, peak, rate, *sections):
    """The same results after a later run, of another speed, measured some sections again."""
    top = {"tflops": peak, "gbps": rate}
    results["runs"]["s"] = {**results["environment"], "ceilings": top, "commit": "def"}
    results["ceilings"] = {**top, "run": "s"}
    for section in sections:
        for row in results[section]:
            row["run"] = "s"
    return results


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
    from distill.bench_plots import roofline_png

    words = roofline_png(folder / "x.png", {"h200": later_run(machine(), 50.0, 400.0, "scaling")})
    assert "100 TFLOP/s and 1e+03 GB/s (h200-1)" in words and "50 TFLOP/s" not in words
    words = roofline_png(folder / "x.png", {"h200": later_run(machine(), 50.0, 400.0, "stages")})
    assert "(h200-1), 50 TFLOP/s and 400 GB/s (h200-2)" in words


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


# --- tables and page ------------------------------------------------------------------------


def test_every_table_is_rectangular(folder):
    results = load_results(folder)
    assert list(results) == ["h200"]
    for name, make in TABLES.items():
        header, rows = make(results)
        assert all(len(row) == len(header) for row in rows), name
        text = markdown((header, rows))
        assert rows == [] or text.count("\n") == len(rows) + 2
    header, rows = TABLES["table1"](results)
    assert any(cell.startswith("A100 s, predicted from Model GPU") for cell in header)
    row = dict(zip(header, next(r for r in rows if r[0] == "FLUX.1-MoE-L"), strict=True))
    ratio = machine()["models"]["flux-moe-l"]["latency_ratio"]
    assert f"{ratio:.3f}" in row.values()


def test_a_measured_machine_is_no_longer_predicted(folder):
    results = load_results(folder)
    header, _ = TABLES["table1"](results)
    assert sum("predicted" in cell for cell in header) == 2
    results["h200"]["environment"]["device"] = "NVIDIA H20"
    header, rows = TABLES["table1"](results)
    assert [cell for cell in header if "predicted" in cell] == ["A100 s, predicted from NVIDIA H20"]
    assert all(len(row) == len(header) for row in rows)


def test_peers_are_one_column_a_shape(folder):
    header, rows = TABLES["peers"](load_results(folder))
    assert header == ["x dense", "Model GPU: forward, T=4608 (x eager dense, 1 round)"]
    assert rows == [["FLOP limit", "0.375"], ["moe_ffn", "0.375 (0.370-0.380)"],
                    ["expert loop", "0.500 (0.500-0.500)"]]  # fmt: skip


def test_every_measured_row_names_run_back_end_and_config(folder):
    results = load_results(folder)
    block = {"kind": "single", "image_tokens": 4096, "text_tokens": 512, "ratio_to_dense": 0.8,
             "seconds": {"dense": seconds(1.0)}, "backend": "cuda", "run": "r",
             "dense_parts": dict.fromkeys(roofline.PARTS, 1.0)}  # fmt: skip
    results["h200"]["blocks"].append({"id": "single", **block})
    tables = {t: TABLES[t](results) for t in
              ("layers", "stages", "scaling", "blocks", "models", "distillation")}  # fmt: skip
    for name, (header, rows) in tables.items():
        first = dict(zip(header, rows[0], strict=True))
        assert first["run"] == "h200-1", name
        assert first["back-end"] == ("cuda" if name == "blocks" else "triton"), name
        assert "config" in first, name
    header, rows = tables["layers"]
    assert dict(zip(header, rows[0], strict=True))["config"] == "up 128x256x64w8s3"
    header, rows = TABLES["environments"](results)
    row = dict(zip(header, rows[0], strict=True))
    assert (row["run"], row["size"], row["ceiling TFLOP/s"]) == ("h200-1", "full", "100")
    for table in ("peers", "table1", "prediction-error"):
        under = origin(table, results)
        assert "run h200-1, back-end triton" in under and "commit abc" in under, table
    # a model composed of blocks ran their back-end
    model = {"mode": "composed", "run": "r"}
    assert ran("h200", results["h200"], [model]) == "run h200-1, back-end cuda"


def test_runs_are_numbered_by_date_and_shown_with_their_ceilings():
    results = {"h200": later_run(machine(), 50.0, 400.0, "stages", "layers")}
    assert run_ids("h200", results["h200"]) == {"r": "h200-1", "s": "h200-2"}
    header, rows = TABLES["environments"](results)
    tops = [dict(zip(header, row, strict=True))["ceiling TFLOP/s"] for row in rows]
    assert tops == ["100", "50"]
    assert TABLES["stages"](results)[1][0][-1] == "h200-2"
    assert "run h200-2" in origin("peers", results)
    assert "run h200-1" in origin("table1", results)  # the models', and a prediction's layer
    assert "run h200-2" in origin("table1", results)
    assert config_of({"config": {"up": "a", "down": "b"}}) == "up a, down b" and config_of({}) == ""


def test_stages_show_both_ceilings_beside_the_floor(folder):
    header, rows = TABLES["stages"](load_results(folder))
    row = dict(zip(header, rows[0], strict=True))
    assert (row["of ceiling"], row["of copy ceiling"], row["of floor"]) == ("50%", "10%", "50%")


def test_scaling_has_time_and_memory_of_both(folder):
    header, rows = TABLES["scaling"](load_results(folder))
    assert len(rows) == 4
    row = dict(zip(header, rows[1], strict=True))
    assert (row["varied"], row["value"], row["peak MiB (dense)"]) == ("tokens", "2", "2 (4)")
    assert float(row["dense ms"]) == pytest.approx(2 * float(row["moe_ffn ms"]), rel=0.01)


def test_from_a_cpu_only_ratios_are_predicted(folder):
    results = load_results(folder)
    results["h200"]["environment"] |= {"device_type": "cpu", "threads": 2}
    header, rows = TABLES["table1"](results)
    assert header[-1] == "A100 latency / dense, predicted from a CPU" and rows[0][-1] == ""
    row = next(r for r in rows if r[0] == "FLUX.1-MoE-L")
    assert 0.6 < float(row[-1]) < 1 and 0.6 < float(row[-2]) / 21.2 < 1  # the paper's dense


def test_tables_of_measured_modes(folder):
    results = load_results(folder)
    dense = results["h200"]["models"]["flux-dense"]
    entry = {"step_seconds": 0.1, "parts": dense["parts"], "launches": 900, "host_syncs": 0,
             "image_seconds": {"28": 2.9}, "peak_bytes": 24 << 30}  # fmt: skip
    replayed = {"step_seconds": 20.0, "captured": "eager"}
    results["h200"]["models"]["flux-moe-l"]["modes"] = {"graphs": replayed}
    dense["modes"] = {"compile": entry, "graphs": {"unavailable": "no"}}
    dense["attention"], dense["config"] = "flash", {"up": "64x64"}
    _, rows = TABLES["models"](results)
    assert rows[0] == ["Model GPU", "flux-dense", "compile", "100", "", "", "2.90", "", "24.0",
                       "900", "0", "triton", "up 64x64", "flash", "h200-1"]  # fmt: skip
    assert rows[1][2:4] == ["graphs of eager code", "20000"]
    _, missing = TABLES["unavailable"](results)
    assert missing[-1] == ["Model GPU", "flux-dense, graphs", "no", "models", "h200-1"]
    _, rows = TABLES["dense-parts"](results)
    assert len(rows) == 1 and sum(int(cell[:-1]) for cell in rows[0][3:-1]) in range(98, 103)


def test_tables_without_any_result(tmp_path):
    header, rows = TABLES["table1"](load_results(tmp_path))
    assert len(rows) == len(TABLE1) and not any("predicted" in cell for cell in header)
    assert markdown(TABLES["layers"]({})).startswith("Nothing measured")


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attrs)
        self.links += [v for k, v in attrs.items() if k in ("src", "href")]


def test_report_is_self_contained_and_described(folder):
    text = bench_report.render(folder).read_text()
    page = Page()
    page.feed(text)
    assert len(page.images) == len(bench_report.FIGURES)
    assert all(re.search(r"\d", image["alt"]) for image in page.images)
    assert all(link.startswith("data:") for link in page.links)
    assert "script" not in page.tags and "prefers-color-scheme:dark" in text
    assert "no &lt;time&gt;" in text  # what was not measured, escaped
    assert "no &lt;module&gt;" in text  # why a peer is missing
    assert all("run h200-1, back-end triton" in image["alt"] for image in page.images)
    scaling = page.images[list(bench_report.FIGURES).index("scaling.png")]["alt"]
    assert "peak memory 1 to 2, dense 2 to 4 MiB" in scaling
    for file in bench_report.FIGURES:
        assert (folder / file).stat().st_size > 1000


def test_rendering_twice_gives_the_same_bytes(folder):
    def files():
        bench_report.render(folder)
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    assert files() == files()


def test_a_picture_without_data_is_left_out(folder):
    results = machine()
    results["scaling"] = []
    (folder / "scaling.png").write_bytes(b"old")
    (folder / "h200.json").write_text(json.dumps(results))
    bench_report.render(folder)
    assert not (folder / "scaling.png").exists()


CHROMIUM = next(
    (
        p
        for n in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (p := shutil.which(n))
    ),
    None,
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_opens_without_a_console_message(folder, tmp_path, scheme):
    page = bench_report.render(folder)
    flags = ["--force-dark-mode"] if scheme == "dark" else []
    run = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", *flags,
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0 and "<h1>" in run.stdout, run.stderr[-2000:]
    assert "CONSOLE" not in run.stderr, run.stderr[-2000:]


# --- the README -----------------------------------------------------------------------------


def test_readme_tables_are_fresh():
    """The committed README shows what the committed results say."""
    assert not bench_report.update_readme(ROOT / "README.md", RESULTS, check=True), (
        "README.md is stale: run `d2m report --readme`"
    )


def words_and_pictures(page: Path) -> tuple[str, list[bytes]]:
    text = page.read_text(encoding="utf-8")
    data = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    return re.sub(r'base64,[^"]*', "", text), [base64.b64decode(d) for d in data]


def test_the_committed_report_is_current(tmp_path):
    """Words, numbers and tables; the pictures' bytes belong to matplotlib's version."""
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fresh, _ = words_and_pictures(bench_report.render(tmp_path))
    committed, pictures = words_and_pictures(RESULTS / "report.html")
    assert committed == fresh, "benchmarks/results/report.html is stale: run `d2m report`"
    assert pictures == [(RESULTS / file).read_bytes() for file in bench_report.FIGURES]


# Keys of every record, as benchmarks/README.md has them.
TIMED = {"id", "seconds", "backend", "run"}
RATES = {"gflop", "gbyte", "tflops", "gbps", "share_of_ceiling", "floor_seconds", "share_of_floor"}
COMMON = TIMED | RATES | {"name", "shape", "pass", "peak_bytes", "host_syncs"}
SECTIONS = {
    "stages": COMMON | {"stage", "ratio_to"},
    "layers": COMMON | {"baseline", "ratio_to_dense", "ratio_quartiles", "flop_limit",
                        "dense_tflops", "peak_bytes_of", "counts_of", "notes", "unavailable"},
    "blocks": TIMED | {"kind", "image_tokens", "text_tokens", "dim", "ratio_to_dense",
                       "dense_parts", "peak_bytes", "parameters"},
    "scaling": {"id", "axis", "points", "backend", "run"},
    "distillation": TIMED | {"stage", "batch", "samples_per_second", "peak_bytes"},
    "host": {"id", "pass", "host_us", "seconds", "run"},
    "skipped": {"id", "why", "run"},
}  # fmt: skip
MODEL = {"mode", "image_tokens", "text_tokens", "step_seconds", "latency_ratio", "flops",
         "flops_ratio", "latency_over_flops", "ideal_seconds", "latency_over_ideal",
         "total_params", "activated_params", "run"}  # fmt: skip
ENVIRONMENT = {"device", "device_type", "date", "commit", "cpu", "cores", "threads", "python", "os",
               "load_at_start", "dense2moe", "torch", "cuda", "triton", "diffusers",
               "transformers", "pins", "size"}  # fmt: skip


def test_committed_results_follow_the_schema():
    """Every section of the CPU's; a GPU's may be of a run cut short."""
    found = load_results(RESULTS)
    assert "cpu" in found and found["cpu"]["models"], "benchmarks/results/cpu.json is not there"
    for name, results in found.items():
        assert results["environment"]["size"] != "tiny", f"{name}.json is a rehearsal"
        assert set(SECTIONS) | {"schema", "environment", "runs", "ceilings", "models"} <= set(
            results
        )
        for run in results["runs"].values():
            assert ENVIRONMENT | {"ceilings"} <= set(run), ENVIRONMENT - set(run)
            assert {"tflops", "gbps", "how", "seconds"} <= set(run["ceilings"])
        assert results["ceilings"]["run"] in results["runs"]
        for section, keys in SECTIONS.items():
            assert results[section] or section == "skipped" or name != "cpu", section
            for row in results[section]:
                assert row["run"] in results["runs"], (name, row["id"])
                assert keys <= set(row), (name, row["id"], keys - set(row))
        for row in results["scaling"]:
            keys = RATES | {"value", "shape", "seconds", "ratio_to_dense", "flop_limit",
                            "peak_bytes"}  # fmt: skip
            assert row["points"] and all(keys <= set(point) for point in row["points"])
        assert set(results["models"]) == set(roofline.MODELS) or name != "cpu"
        for model in results["models"].values():
            assert model["run"] in results["runs"]
            keys = MODEL if name == "cpu" else {"mode", "image_tokens", "text_tokens"}
            assert keys <= set(model), keys - set(model)


def rated(results):
    """Every record with shares of a ceiling; a scaling row's run is its points'."""
    yield from results["stages"]
    yield from results["layers"]
    for row in results["scaling"]:
        yield from ({**point, "run": row["run"]} for point in row["points"])


def test_committed_shares_refer_to_the_ceilings_of_their_run():
    for results in load_results(RESULTS).values():
        for row in rated(results):
            top = results["runs"][row["run"]]["ceilings"]
            for unit, share in row["share_of_ceiling"].items():
                assert share == pytest.approx(row[unit] / top[unit], rel=1e-3, abs=1e-4)


def test_readme_is_renewed_between_the_markers_only(folder):
    readme = folder / "README.md"
    text = "# A\n<!-- begin:layers -->\nold\n<!-- end:layers -->\nend\n"
    readme.write_text(text)
    assert bench_report.update_readme(readme, folder, check=True)
    assert readme.read_text() == text
    assert bench_report.update_readme(readme, folder)
    new = readme.read_text()
    assert new.startswith("# A\n<!-- begin:layers -->\n| machine") and new.endswith("-->\nend\n")
    assert "expert loop 0.50" in new and "old" not in new
    assert not bench_report.update_readme(readme, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin:nonsense -->\n<!-- end:nonsense -->\n", "unknown"),
        ("<!-- begin:layers -->\n", "without an end"),
    ],
)
def test_readme_with_bad_markers_is_refused(folder, text, message):
    readme = folder / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match=message):
        bench_report.update_readme(readme, folder)


def test_report_command(folder):
    def d2m(*arguments):
        command = [sys.executable, "-m", "distill", "report", *map(str, arguments)]
        environment = {**os.environ, "MPLBACKEND": "Agg"}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    done = d2m(folder)
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr
    readme = folder / "README.md"
    readme.write_text("<!-- begin:table1 -->\n<!-- end:table1 -->\n")
    assert d2m(folder, "--readme", readme, "--check").returncode == 2
    assert d2m(folder, "--readme", readme).returncode == 0
    assert d2m(folder, "--readme", readme, "--check").returncode == 0
    assert "FLUX.1-MoE-XS" in readme.read_text()
