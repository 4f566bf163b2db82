"""The committed results, and what report and pages say of them."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from draw import main as draw_main
from helpers.benchmark_machine import machine
from report import page as report_page
from report import roofline
from report.read import load_results

from distill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(machine()))
    (tmp_path / "other.json").write_text("{}")  # not ours: ignored
    return tmp_path


PAGES = {  # and the tables that each has to show
    "README.md": ["peers"],
    "benchmarks/results/README.md": ["table1", "environments", "prediction-error"],
    "docs/claims.md": ["claims"],
    "docs/models.md": ["every-dit"],
}


def test_every_marked_page_is_known():
    found = [page.relative_to(ROOT).as_posix() for page in report_page.marked_pages(ROOT)]
    assert found == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_committed_tables_are_fresh(page):
    """The committed pages show what the committed results say."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall("<!-- begin:(.*) -->", text) == PAGES[page]
    assert not report_page.update_page(ROOT / page, RESULTS, check=True), (
        f"{page} is stale: run `python benchmarks/draw.py --pages`"
    )


def words_and_pictures(page: Path) -> tuple[str, list[bytes]]:
    text = page.read_text(encoding="utf-8")
    data = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', text)
    return re.sub(r'base64,[^"]*', "", text), [base64.b64decode(d) for d in data]


@pytest.mark.long
def test_the_committed_report_is_current(tmp_path):
    """Words, numbers and tables; the pictures' bytes belong to matplotlib's version."""
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fresh, _ = words_and_pictures(report_page.render(tmp_path))
    committed, pictures = words_and_pictures(RESULTS / "report.html")
    assert committed == fresh, "report.html is stale: run `python benchmarks/draw.py`"
    assert pictures == [(RESULTS / file).read_bytes() for file in report_page.FIGURES]


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


def test_a_page_is_renewed_between_the_markers_only(folder):
    readme = folder / "README.md"
    text = "# A\n<!-- begin:layers -->\nold\n<!-- end:layers -->\nend\n"
    readme.write_text(text)
    assert report_page.update_page(readme, folder, check=True)
    assert readme.read_text() == text
    assert report_page.update_page(readme, folder)
    new = readme.read_text()
    assert new.startswith("# A\n<!-- begin:layers -->\n| machine") and new.endswith("-->\nend\n")
    assert "expert loop 0.50" in new and "old" not in new
    assert not report_page.update_page(readme, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin:nonsense -->\n<!-- end:nonsense -->\n", "unknown"),
        ("<!-- begin:layers -->\n", "without an end"),
    ],
)
def test_a_page_with_bad_markers_is_refused(folder, text, message):
    readme = folder / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match=message):
        report_page.update_page(readme, folder)


@pytest.mark.slow
def test_draw_command(folder):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/draw.py", "--results", folder],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MPLBACKEND": "Agg"},
    )  # fmt: skip
    assert done.returncode == 0 and "report.html" in done.stdout, done.stderr


def test_draw_pages(folder, capsys):
    def draw(*pages):
        return draw_main(["--results", str(folder), "--pages", *map(str, pages)])

    page = folder / "README.md"
    page.write_text("<!-- begin:table1 -->\n<!-- end:table1 -->\n")
    assert [draw(page, "--check"), draw(page), draw(page, "--check")] == [1, 0, 0]
    assert "FLUX.1-MoE-XS" in page.read_text()
    # without files: every page; here beside other results than those that they show
    for file in ("claims.json", "every_dit.json"):
        (folder / file).write_bytes((RESULTS / file).read_bytes())
    capsys.readouterr()
    assert draw("--check") == 1
    stale = {
        page: "fresh" if page in ("docs/claims.md", "docs/models.md") else "stale"
        for page in sorted(PAGES)
    }
    said = [f"{state}: {ROOT / page}" for page, state in stale.items()]
    assert capsys.readouterr().out.splitlines() == said
