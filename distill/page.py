"""One HTML page, self-contained: its style, tables, figures and facts.

The style has one column, light and dark; wide tables scroll. A rule is one line where it fits; a
line is only ever broken between declarations.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root{color-scheme:light dark;
--ink:#1f2430;--faint:#5d6475;--line:#dfe3ea;--back:#fff;--card:#f6f7f9}
@media (prefers-color-scheme:dark){:root{
--ink:#e7e9ee;--faint:#a2a9b8;--line:#343a46;--back:#14171c;--card:#1d2129}}
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
figure{margin:1rem 0}
img{max-width:100%;height:auto;background:#fff;border:1px solid var(--line);border-radius:8px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;
background:var(--card);padding:1rem;border-radius:8px;font-size:.86rem}
dt{color:var(--faint)}
dd{margin:0}
"""


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(c)}</td>" for c in rest)
        + "</tr>"
        for first, *rest in rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def figure(png: bytes, title: str, caption: str, alt: str | None = None) -> str:
    """A picture under its title, inside the page; alt: in words, if the caption does not say it."""
    alt = html.escape(caption if alt is None else alt, quote=True)
    data = base64.b64encode(png).decode()
    return (
        f'<h2>{html.escape(title)}</h2><figure><img alt="{alt}" '
        f'src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """A list of names and what they are."""
    items = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in values.items()
    )
    return f"<dl>{items}</dl>"
