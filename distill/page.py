"""One HTML page, self-contained: its style, tables, figures and facts.

The style has one column, light and dark; wide tables scroll. A rule is one line where it fits; a
line is only ever broken between declarations.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2m_models.inspection.figures import new_figure
from distill.files import write_atomic, write_text

_COLOURS = """
:root{color-scheme:light dark;
--ink:#1f2430;--faint:#5d6475;--line:#dfe3ea;--back:#fff;--card:#f6f7f9;
--good:#17703b;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{
--ink:#e7e9ee;--faint:#a2a9b8;--line:#343a46;--back:#14171c;--card:#1d2129;
--good:#5fd08a;--bad:#ff8a80}}
"""
STYLE = (
    f"""{_COLOURS.rstrip()}
"""
    + """\
body{margin:0 auto;max-width:64rem;padding:2rem 1.25rem 4rem;
font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--back)}
h1{font-size:1.6rem;margin:0 0 .3rem}
h2{font-size:1.15rem;margin:2.2rem 0 .5rem}
p,figcaption{color:var(--faint)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
thead th{color:var(--faint);font-weight:600}
.words th,.words td{text-align:left;white-space:normal}
.good{color:var(--good)}
.bad{color:var(--bad)}
.open{color:var(--faint)}
@media (max-width:40rem){
.words thead{display:none}
.words tr{display:block;padding:.6rem 0}
.words th,.words td{display:block;border-bottom:none;padding:.1rem 0}
}
figure{margin:1rem 0}
img{max-width:100%;height:auto;border:1px solid var(--line);border-radius:8px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;
background:var(--card);padding:1rem;border-radius:8px;font-size:.86rem}
dt{color:var(--faint)}
dd{margin:0}
"""
)


def page(title: str, *parts: str) -> str:
    """The whole page; `parts` are HTML, one a line."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], colours: Mapping[str, str] | None = None
) -> str:
    """A table of text; the first cell of a row is its heading.

    colours: of headings, "good", "bad" or "open"; then it is a table of words, whose cells wrap and
    whose rows stack on a narrow screen.
    """
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in header)
    body = "".join(
        f'<tr><th scope="row"{_class((colours or {}).get(first))}>{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(c)}</td>" for c in rest)
        + "</tr>"
        for first, *rest in rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table{_class(colours and "words")}>{inner}</table></div>'


def _class(name: str | None) -> str:
    return f' class="{name}"' if name else ""


def figure(image: bytes, title: str, caption: str, alt: str | None = None) -> str:
    """A PNG or SVG under its title, inside the page; alt: in words, if the caption does not say
    it."""
    alt = html.escape(caption if alt is None else alt, quote=True)
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    data = base64.b64encode(image).decode()
    return (
        f'<h2>{html.escape(title)}</h2><figure><img alt="{alt}" '
        f'src="data:image/{kind};base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """A list of names and what they are."""
    items = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in values.items()
    )
    return f"<dl>{items}</dl>"


# --- pictures -------------------------------------------------------------------------------

INK, FAINT, HAIR = "#1f2430", "#8a90a0", "#d6dae3"
PLOT = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "dense2moe",
}
# What an SVG takes from _COLOURS, so that it is dark where the reader is
_VARIABLES = {INK: "--ink", HAIR: "--line", "#ffffff": "--back"}


@contextmanager
def picture(
    path: Path, width: float, height: float, rows: int = 1, columns: int = 1, **layout: Any
) -> Iterator[tuple[Any, Any]]:
    """`new_figure` in the reports' style, written when the block ends; the same data give the same
    bytes. A PNG is light; an SVG is light or dark, as its reader's browser is, by itself or in an
    <img>. Axes are moved to fit once, unless layout="constrained" or None."""
    import matplotlib

    engine = layout.pop("layout", "tight")
    with matplotlib.rc_context(PLOT):
        figure, axes = new_figure(
            width, height, rows, columns, layout=None if engine == "tight" else engine, **layout
        )
        yield figure, axes
        if engine == "tight":
            figure.tight_layout()
        if path.suffix == ".svg":
            write_text(path, _svg(figure))
            return
        options = {"dpi": 150, "format": "png", "metadata": {"Software": None}}
        write_atomic(path, lambda tmp: figure.savefig(tmp, **options))


def _svg(figure: Any) -> str:
    """The figure with its own colours in place of matplotlib's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<defs>", f"<defs><style>{_COLOURS}</style>", 1)
