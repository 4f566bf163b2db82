"""Of benchmark results: pictures, one self-contained page, and the tables of Markdown pages."""

from __future__ import annotations

import html
import re
from pathlib import Path

from report import every_dit
from report.pictures import FIGURES
from report.quality import with_quality
from report.read import Results, load_results, machine_label, rows_of
from report.tables import TABLES, filled, markdown, origin
from report.verdict import verdicts

from distill import files as ckpt
from distill.errors import UserError
from distill.page import figure
from distill.page import page as html_page
from distill.page import table as html_table
from distill.study import claims

_TITLES = {
    "table1": ("Table 1", "The paper's cost columns (one H20, 1024x1024), our counts, and what was "
               "measured. Latency/FLOPs is the latency ratio to dense over the FLOPs ratio, "
               "attention in full on both sides; latency/ideal sets the latency against dense's "
               "own measured parts, each scaled by what the model keeps of it. Predicted columns "
               "are predictions."),
    "peers": ("The layer and its peers", "Medians of ratios to the dense FFN measured in the same "
              "rounds, balanced routing, D = 3072, 3072 shared neurons and 2 of 12 experts of 768; "
              "quartiles in brackets."),
    "layers": ("Every layer measured", "Medians of ratios to the dense FFN measured in the same "
               "rounds, the faster of eager and compiled; quartiles in brackets. Of floor: as for "
               "stages."),
    "stages": ("Stages", "Of ceiling, of copy ceiling: shares of the matrix-product and the copy "
               "rate that the same run measured at its start. Of floor: the least time that these "
               "allow (the longer one), over the time taken. More than 100% is possible: the "
               "ceilings are medians of one large product and one copy that no cache holds, while "
               "a stage's data may stay in cache from call to call."),
    "scaling": ("Scaling", "Medians; one thing varies at a time, from FLUX's layer (batch: "
                "DiT-XL/2's, 256 tokens a sample); ratio of moe_ffn to dense."),
    "blocks": ("Blocks", "One block of FLUX.1 at full width; where dense's time goes."),
    "models": ("Whole models", "Random weights; latency/ideal as above, in the same mode. "
               "Composed: added up from measured blocks, never run as a whole."),
    "dense-parts": ("Where dense's time goes", "By a profile of one step; GELU belongs to the "
                    "FFN, launch gaps to the rest."),
    "prediction-error": ("How good is the prediction?", "The paper's MoE rows ran other kernels "
                         "(MegaBlocks): there the difference is not the prediction's alone."),
    "distillation": ("Distillation", "Training steps of each stage."),
    "unavailable": ("Peers and modes that are missing", "Asked for, and why they were not "
                    "measured."),
    "environments": ("Environment", "Every number's run; ceilings are those that the run measured "
                     "at its start."),
}  # fmt: skip
_BEGIN = re.compile(r"^<!-- begin:([\w-]+) -->$", re.M)
_MARK = re.compile(r"(<!-- begin:([\w-]+) -->\n)(.*?)(<!-- end:\2 -->)", re.S)


def render(folder: Path | str) -> Path:
    """(Re)write the pictures and report.html of a folder of results files; returns the page."""
    folder = Path(folder)
    results = load_results(folder)
    if not results:
        raise UserError(
            f"{folder} holds no benchmark results; "
            "`pytest benchmarks/ --benchmark-only --results benchmarks/results` writes some"
        )
    parts = []
    for file, (title, draw) in FIGURES.items():
        words = draw(folder / file, results)
        if words is None:  # nothing measured that it could show
            (folder / file).unlink(missing_ok=True)
        else:
            parts.append(figure((folder / file).read_bytes(), title, words))
    for name, (title, caption) in _TITLES.items():
        made = TABLES[name](results)
        header, rows = filled(with_quality(made, folder) if name == "table1" else made)
        if rows:
            caption = f"{caption} {origin(name, results)}".strip()
            parts.append(f'<h2 id="{name}">{html.escape(title)}</h2>')
            parts.append(f"<p>{html.escape(caption)}</p>{html_table(header, rows)}")
    skipped = "".join(
        f"<li>{html.escape(': '.join((label, row['id'], row['why'])))}</li>"
        for label, row, _ in rows_of(results, "skipped")
    )
    if skipped:
        parts.append(f"<h2>Not measured</h2><ul>{skipped}</ul>")
    machines = ", ".join(machine_label(name, r) for name, r in results.items())
    text = html_page(
        "dense2moe benchmarks",
        "<h1>Does the latency fall as far as the FLOPs?</h1>",
        *(f"<p><b>{html.escape(sentence)}</b></p>" for sentence in verdicts(results)),
        f"<p>Measured on: {html.escape(machines)}. All contenders ran in turn in one process, on "
        "random data;",
        "numbers are medians.</p>",
        "".join(parts),
    )
    ckpt.write_text(folder / "report.html", text)
    return folder / "report.html"


def marked_pages(root: Path) -> list[Path]:
    """Every Markdown page of the repository with tables between markers."""
    pages = (p for part in (".", "docs", "benchmarks/**") for p in root.glob(f"{part}/*.md"))
    return [page for page in sorted(pages) if _BEGIN.search(page.read_text(encoding="utf-8"))]


def with_tables(text: str, results: Results, folder: Path | str) -> str:
    """The text with everything between <!-- begin:NAME --> and <!-- end:NAME --> made anew.

    "claims" is the verdicts of the folder's claims.json, written by `d2m ablate`; "every-dit" the
    transformers of diffusers, of every_dit.json, written by `benchmarks/every_dit.py`.
    """

    def fresh(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        if name == "claims":
            table, under = claims.table(claims.read(Path(folder) / "claims.json")), ""
        elif name == "every-dit":
            file = Path(folder) / "every_dit.json"
            table, under = every_dit.table(file), every_dit.below(file)
        elif name in TABLES:
            table, under = TABLES[name](results), origin(name, results)
            table = with_quality(table, folder) if name == "table1" else table
        else:
            known = sorted([*TABLES, "claims", "every-dit"])
            raise UserError(f"marker begin:{name} is unknown; tables are {known}")
        below = f"\n{under}\n" if under else ""
        return f"{begin}{markdown(table)}{below}{end}"

    return _MARK.sub(fresh, text)


def update_page(page: Path | str, folder: Path | str, check: bool = False) -> bool:
    """Writes a Markdown page's tables from the results in `folder`; returns whether it was stale.

    check: only look, write nothing.
    """
    page = Path(page)
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as err:
        raise UserError(f"cannot read {page}: {err.strerror or err}") from err
    begun = _BEGIN.findall(text)
    closed = [m.group(2) for m in _MARK.finditer(text)]
    if begun != closed:
        raise UserError(f"{page}: markers without an end: {sorted(set(begun) - set(closed))}")
    fresh = with_tables(text, load_results(folder), folder) if begun else text
    stale = fresh != text
    if stale and not check:
        ckpt.write_text(page, fresh)
    return stale
