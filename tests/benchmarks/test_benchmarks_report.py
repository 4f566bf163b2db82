"""The benchmarks' tables and page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from helpers.benchmark_machine import later_run, machine, seconds
from report import page as report_page
from report import roofline
from report.quality import with_quality
from report.read import config_of, load_results, ran, run_ids
from report.tables import TABLES, markdown, origin
from report.verdict import verdicts

from distill.evaluate.paper import TABLE1
from distill.evaluate.scores import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(machine()))
    (tmp_path / "other.json").write_text("{}")  # not ours: ignored
    return tmp_path


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


def test_scores_join_table_1(folder):
    """One table: costs as before, then the paper's quality and ours by structure and steps."""
    plain = TABLES["table1"](load_results(folder))
    assert with_quality(plain, folder) == plain
    (folder / "scores").mkdir()
    column = {"mean": 0.561, "interval": [0.55, 0.572]}
    for name, preset, steps in (("l", "flux-moe-l", 8), ("odd", None, 28)):
        scores = {"schema": SCHEMA, "model": {"preset": preset, "steps": steps},
                  "columns": {"geneval": column}}  # fmt: skip
        (folder / "scores" / f"{name}.json").write_text(json.dumps(scores))
    header, rows = with_quality(plain, folder)
    assert [row[: len(plain[0])] for row in rows] == plain[1]
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells["HyperFLUX-MoE-L"]["ours: GenEval"] == "0.561 [0.55, 0.572]"
    assert cells["HyperFLUX-MoE-L"]["paper: GenEval"] == "0.5917"
    assert cells["FLUX.1-MoE-L"]["ours: GenEval"] == "" == cells["FLUX.1 [dev]"]["ours: CLIP"]
    assert "0.561 [0.55, 0.572]" in report_page.render(folder).read_text()


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
    text = report_page.render(folder).read_text()
    page = Page()
    page.feed(text)
    assert len(page.images) == len(report_page.FIGURES)
    assert all(re.search(r"\d", image["alt"]) for image in page.images)
    assert all(link.startswith("data:") for link in page.links)
    assert "script" not in page.tags and "prefers-color-scheme:dark" in text
    assert "no &lt;time&gt;" in text  # what was not measured, escaped
    assert "no &lt;module&gt;" in text  # why a peer is missing
    assert all("run h200-1, back-end triton" in image["alt"] for image in page.images)
    scaling = page.images[list(report_page.FIGURES).index("scaling.svg")]["alt"]
    assert "peak memory 1 to 2, dense 2 to 4 MiB" in scaling
    for file in report_page.FIGURES:
        assert (folder / file).stat().st_size > 1000


@pytest.mark.slow
def test_rendering_twice_gives_the_same_bytes(folder):
    def files():
        report_page.render(folder)
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    assert files() == files()


def test_a_picture_without_data_is_left_out(folder):
    results = machine()
    results["scaling"] = []
    (folder / "scaling.svg").write_bytes(b"old")
    (folder / "h200.json").write_text(json.dumps(results))
    report_page.render(folder)
    assert not (folder / "scaling.svg").exists()


def test_the_question_is_asked_once_and_answered_for_every_machine(folder):
    fast, slow = machine(), machine()
    for model in fast["models"].values():
        model["latency_over_flops"] = 1.02
    fast["environment"]["device"] = "Fast GPU"
    cpu = machine()
    cpu["environment"] |= {"device_type": "cpu", "threads": 2}
    assert verdicts({"a": fast})[0] == ("Fast GPU: yes; latency / FLOPs is 1.02 (1: as far).")
    slow["models"]["flux-moe-xs"]["latency_over_flops"] = 1.3
    assert verdicts({"b": slow})[0].startswith("Model GPU: not quite, 30% more at worst")
    (words,) = verdicts({"c": cpu})
    assert words.startswith(
        "CPU (2 threads): yes in the parts that get sparser; latency / ideal is"
    )
    parts = cpu["models"]["flux-dense"]["parts"]
    assert f"attention takes {parts['attention'] / sum(parts.values()):.0%} of dense's" in words
    text = report_page.render(folder).read_text()
    assert len(re.findall("as far as the FLOPs", text)) == 1
    assert html.escape(verdicts(load_results(folder))[0]) in text.split("Measured on")[0]


def test_pictures_are_dark_in_the_dark_and_leave_runs_to_the_caption(folder):
    report_page.render(folder)
    for file in report_page.FIGURES:
        text = (folder / file).read_text()
        assert "prefers-color-scheme:dark" in text
        used = set(re.findall(r"var\((--[a-z]+)\)", text))
        assert {"--ink", "--back"} <= used <= set(re.findall(r"(--[a-z]+):#", text))
        assert "h200-1" not in text and "back-end" not in text


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
    page = report_page.render(folder)
    flags = ["--force-dark-mode"] if scheme == "dark" else []
    run = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", *flags,
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0 and "<h1>" in run.stdout, run.stderr[-2000:]
    assert "CONSOLE" not in run.stderr, run.stderr[-2000:]
