"""The style sheet of the reports: one column, light and dark, wide tables scroll.

A rule is one line where it fits; a line is only ever broken between declarations.
"""

from __future__ import annotations

import html

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


def _html_table(header: list[str], cells: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in header)
    body = "".join(
        "<tr>"
        + f'<th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in cells
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'
