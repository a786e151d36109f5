"""A run as one HTML page that needs nothing else: it can be mailed, archived, and opened without a network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_rl.report.table import DEFAULT_COLUMNS, Row, column_title, format_cell, is_missing, present_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRACE_COLUMNS = (
    "position",
    "old_token",
    "new_token",
    "reward_before",
    "reward_after",
    "accepted",
    "gradient_norm",
    "entropy",
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1f; background: #fff; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
pre { background: #f5f5f7; padding: .6rem .8rem; margin: .3rem 0 .8rem; white-space: pre-wrap;
      overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
.note { color: #666; } .right { color: #17692f; } .wrong { color: #a3222c; } tr.rejected td { color: #999; }
summary { cursor: pointer; }
"""


def write_report(
    path: str | Path,
    title: str,
    summary: Sequence[Row],
    results: Iterable[Mapping[str, Any]] = (),
    *,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    max_problems: int = 5,
) -> Path:
    """Write the page: accuracy against arithmetic, the summary table, and the first problems' completions.

    Args:
        path: the file; its folder is made. An older page is replaced only once the new one is complete.
        title: the heading.
        summary: one row per decoder, as for `format_table`.
        results: one mapping per problem and decoder. Keys, all optional: `id`, `decoder`, `problem` (or `prompt`),
            `answer`, `text`, `reward`, `correct`, and `trace`, a list of edits (mappings with `position`, `old_token`,
            `new_token`, `reward_before`, `reward_after`, `accepted`, `gradient_norm`, `entropy`, or other keys).
        columns: the table's columns; those without any value are left out.
        max_problems: how many problems are shown, the first in the order of `results`: a choice would flatter.

    Returns:
        The path written.
    """
    return write_page(
        path, title, [_figure(summary), _summary_table(summary, columns), _samples(results, max_problems)]
    )


def write_page(path: str | Path, title: str, contents: Iterable[str]) -> Path:
    """Write a page of that title with pieces of HTML in its body; empty pieces leave no trace."""
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
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _summary_table(summary: Sequence[Row], columns: Sequence[str]) -> str:
    if not summary:
        return '<p class="note">No summary: the run finished no problem.</p>'
    return "<h2>Summary</h2>\n" + rows_table(summary, columns)


def rows_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a table of those columns that say something."""
    columns = present_columns(rows, columns)
    return _table(
        [column_title(column) for column in columns],
        [([format_cell(row, column) for column in columns], "") for row in rows],
    )


def _table(header: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    """A table from plain texts; every row comes with its CSS class."""
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "\n".join(
        f'<tr class="{escape(kind)}">' + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>"
        for cells, kind in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _figure(summary: Sequence[Row]) -> str:
    rows = [row for row in summary if not is_missing(row.get("accuracy"))]
    if not rows:
        return ""
    return figure_block(_accuracy_svg(rows), "Accuracy of each decoder with its 95% interval, alone and against FLOPs")


def figure_block(svg: str, label: str) -> str:
    """A picture with the line that says what it shows, to the eye and to a screen reader."""
    # The XML prologue has no place within HTML.
    svg = svg[svg.index("<svg ") :].rstrip()
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f'<figure>\n{svg}\n<figcaption class="note">{escape(label)}.</figcaption>\n</figure>'


def _accuracy_svg(rows: Sequence[Row]) -> str:
    """Left: a bar per decoder with its interval. Right, if FLOPs are known: accuracy against them, on a log axis."""
    # Slow to import, and only this picture needs it. No pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = [str(row.get("decoder", "?")) for row in rows]
    accuracy = [float(row["accuracy"]) for row in rows]
    below, above = [], []
    for row, value in zip(rows, accuracy, strict=True):
        low, high = row.get("accuracy_low"), row.get("accuracy_high")
        below.append(0.0 if low is None or is_missing(low) else max(value - float(low), 0.0))
        above.append(0.0 if high is None or is_missing(high) else max(float(high) - value, 0.0))
    flops = [row.get("flops") for row in rows]
    costed = [index for index, value in enumerate(flops) if not is_missing(value) and value]
    colours = [f"C{index % 10}" for index in range(len(rows))]

    figure = Figure(figsize=(10 if costed else 5.5, 1.4 + 0.4 * max(len(rows), 5)), layout="constrained")
    FigureCanvasSVG(figure)
    bars, *others = figure.subplots(1, 2 if costed else 1, squeeze=False)[0]
    places = list(range(len(rows)))
    bars.barh(places, accuracy, xerr=[below, above], color=colours, alpha=0.8, ecolor="#333", capsize=3)
    bars.set_yticks(places, names, parse_math=False)
    bars.invert_yaxis()
    bars.set(xlabel="accuracy", xlim=(0, 1))
    if others:
        plane = others[0]
        for index in costed:
            plane.errorbar(
                flops[index], accuracy[index], [[below[index]], [above[index]]],
                fmt="o", color=colours[index], capsize=3,
            )  # fmt: skip
            plane.annotate(
                names[index], (flops[index], accuracy[index]), (5, 5), textcoords="offset points", fontsize=8,
                parse_math=False,
            )  # fmt: skip
        plane.set(xscale="log", xlabel="FLOPs", ylabel="accuracy", ylim=(0, 1))
        plane.margins(x=0.25)
        plane.grid(alpha=0.3)
    return svg_text(figure)


def svg_text(figure: Figure) -> str:
    """A figure as an SVG file. Fixed ids and no date: the same run writes the same picture."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "nabla_rl"}), StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return buffer.getvalue()


def _samples(results: Iterable[Mapping[str, Any]], max_problems: int) -> str:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    total: set[str] = set()
    for number, result in enumerate(results):
        key = str(result.get("id", number))
        total.add(key)
        if key in groups or len(groups) < max_problems:
            groups.setdefault(key, []).append(result)
    if not groups:
        return ""
    parts = [
        "<h2>Samples</h2>",
        f'<p class="note">The first {len(groups)} of {len(total)} problems, not selected.</p>',
    ]
    for key, members in groups.items():
        parts.append(f"<h3>{escape(key)}</h3>")
        problem = next((text for m in members if (text := m.get("problem", m.get("prompt"))) is not None), None)
        if problem is not None:
            parts.append(f"<pre>{escape(str(problem))}</pre>")
        answer = next((m["answer"] for m in members if m.get("answer") is not None), None)
        if answer is not None:
            parts.append(f"<p>Answer: {escape(str(answer))}</p>")
        parts.extend(_sample(member) for member in members)
    return "\n".join(parts)


def _sample(result: Mapping[str, Any]) -> str:
    words = [f"<strong>{escape(str(result.get('decoder', 'completion')))}</strong>"]
    if result.get("correct") is not None:
        words.append('<span class="right">right</span>' if result["correct"] else '<span class="wrong">wrong</span>')
    if not is_missing(result.get("reward")):
        words.append(f"reward {escape(_number(result['reward']))}")
    parts = [f"<p>{' · '.join(words)}</p>", f"<pre>{escape(str(result.get('text', '')))}</pre>"]
    if trace := result.get("trace"):
        parts.append(_trace(trace))
    return "\n".join(parts)


def _trace(trace: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for edit in trace for key in edit)
    columns = [key for key in _TRACE_COLUMNS if key in keys] + [key for key in keys if key not in _TRACE_COLUMNS]
    rows = [
        ([_number(edit.get(column)) for column in columns], "rejected" if edit.get("accepted") is False else "")
        for edit in trace
    ]
    accepted = sum(edit.get("accepted") is True for edit in trace)
    table = _table([column_title(column) for column in columns], rows)
    return f"<details><summary>{len(trace)} edits tried, {accepted} accepted</summary>\n{table}\n</details>"


def _number(value: object) -> str:
    if value is None or is_missing(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
