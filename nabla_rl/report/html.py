"""One HTML page that needs nothing else: it can be mailed, archived, and opened without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_rl.report.table import MISSING, Row, column_title, format_cell, present_columns
from nabla_rl.run_folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --card: #fff; --ink: #1d1d1f; --soft: #62626a; --line: #dedee3;
        --code: #f4f4f6; --accent: #0b5aa6; --right: #14692f; --right-wash: #e5f4e9; --wrong: #a3222c;
        --wrong-wash: #fbe9e8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181b; --card: #1f2024; --ink: #e7e7e4; --soft: #a2a2aa; --line: #38393f; --code: #27282d;
          --accent: #7fb8f0; --right: #7fd39a; --right-wash: #1c3626; --wrong: #f2938c; --wrong-wash: #43211f; }
}
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
       color: var(--ink); background: var(--paper); max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 2.8rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .5rem 0; max-width: 46rem; }
.note { color: var(--soft); font-size: .9rem; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--line); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { font-weight: 600; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .5rem; }
figcaption { margin-top: .5rem; }
pre, code, .token { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { font-size: .85rem; line-height: 1.5; background: var(--code); border-radius: .4rem; padding: .6rem .8rem;
      margin: .6rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { margin: 0; } dd { margin: 0; overflow-wrap: anywhere; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); gap: .9rem 1.5rem; }
dl.facts dt { color: var(--soft); font-size: .8rem; } dl.facts dd { font-weight: 600; }
dl.terms > div { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem; padding: .2rem 0; max-width: 64rem; }
dl.terms dt { font-weight: 600; overflow-wrap: anywhere; }
.problem { margin: 2.2rem 0 0; padding-top: 1.4rem; border-top: 1px solid var(--line); }
.problem h3 { color: var(--soft); font-weight: 600; font-size: .9rem; }
.question { font-size: 1.05rem; max-width: 54rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
           margin-top: .9rem; align-items: start; }
.card { background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--line);
        border-radius: .5rem; padding: .7rem .9rem .8rem; min-width: 0; }
.card.is-right { border-top-color: var(--right); } .card.is-wrong { border-top-color: var(--wrong); }
.card header { display: flex; justify-content: space-between; align-items: baseline; gap: .75rem; }
.card h4 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.badge { font-size: .8rem; font-weight: 600; border-radius: 1rem; padding: .05rem .6rem; white-space: nowrap; }
.badge.right { background: var(--right-wash); } .badge.wrong { background: var(--wrong-wash); }
.card p { font-size: .875rem; margin: .35rem 0; overflow-wrap: anywhere; }
.edits { font-size: .85rem; list-style: none; margin: .3rem 0; padding: 0; }
.edits li { padding: .2rem 0; border-top: 1px solid var(--line); }
.edits .change { white-space: nowrap; } .edits li.rejected { color: var(--soft); }
.token { background: var(--code); border-radius: .2rem; padding: 0 .25rem; white-space: pre-wrap;
         overflow-wrap: anywhere; }
details { font-size: .875rem; }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.5rem; }
  dl.facts { grid-template-columns: 1fr 1fr; } dl.terms > div { display: block; padding: .35rem 0; }
  figure svg { max-width: none; min-width: 32rem; }
  td:first-child { overflow-wrap: normal; }
}
"""


def write_page(path: str | Path, title: str, contents: Iterable[str]) -> Path:
    """Write a page of that title with pieces of HTML as its body, whole or not at all. Empty pieces are left out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        # The browser itself then holds the page to its promise to load nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        *contents,
        "</body>\n</html>\n",
    ]
    return write_atomically(path, "\n".join(part for part in parts if part))


def rows_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a table of the columns that carry information."""
    columns = present_columns(rows, columns)
    head = "".join(f'<th scope="col">{escape(column_title(column))}</th>' for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(format_cell(row, column))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def facts(entries: Mapping[str, Any], kind: str = "facts") -> str:
    """Names with what belongs to them, as a list of descriptions; "–" for None.

    Args:
        entries: The names and their values, in order.
        kind: "facts" for short values side by side, "terms" for sentences one below the other.
    """
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(MISSING if value is None else str(value))}</dd></div>"
        for name, value in entries.items()
    )
    return f'<dl class="{kind}">\n' + "\n".join(items) + "\n</dl>"


def figure_block(svg: str, label: str) -> str:
    """A picture with the line that describes it, for the eye and for a screen reader."""
    # The XML prologue has no place within HTML.
    svg = svg[svg.index("<svg ") :].rstrip()
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f'<figure>\n{svg}\n<figcaption class="note">{escape(label)}.</figcaption>\n</figure>'


def svg_text(figure: Figure) -> str:
    """A figure as an SVG file with fixed ids and no date, so that the same run writes the same picture."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "nabla_rl"}), StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return buffer.getvalue()
