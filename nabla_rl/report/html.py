"""A run as one HTML page that needs nothing else: it can be mailed, archived, and opened without a network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_rl.report.table import (
    DEFAULT_COLUMNS,
    Row,
    column_title,
    counted,
    format_cell,
    is_missing,
    present_columns,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --soft: #5f6368; --line: #dcdde1; --page: #fff; --box: #f6f6f8;
        --good: #17692f; --bad: #a3222c; --accent: #2553a8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e8; --soft: #a3a6ad; --line: #3a3b40; --page: #17181b; --box: #202126; --good: #6fcf8a;
          --bad: #f2858c; --accent: #8ab0f5; }
  figure svg { background: #fff; border-radius: 4px; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--text); background: var(--page);
       max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .4rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93em; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
pre { background: var(--box); border-radius: 4px; padding: .6rem .8rem; margin: .4rem 0 .6rem; white-space: pre-wrap;
      overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
.scroll { overflow-x: auto; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
.note { color: var(--soft); } .right { color: var(--good); } .wrong { color: var(--bad); }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: .6rem 0 1rem; padding: 0; list-style: none; }
.facts b { font-weight: 600; } .facts span { color: var(--soft); }
details.problem { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; } summary .question { color: var(--soft); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: .9rem; }
.answer { border-top: 2px solid var(--line); padding-top: .4rem; min-width: 0; }
.edits { margin: .2rem 0 0; padding-left: 1.2rem; font-size: .9em; } .rejected { color: var(--soft); }
del { color: var(--bad); } ins { color: var(--good); text-decoration: none; font-weight: 600; }
del, ins { font-family: ui-monospace, monospace; white-space: pre; }
"""

MAX_PROBLEMS = 200
OPEN_PROBLEMS = 3


def write_report(
    path: str | Path,
    title: str,
    summary: Sequence[Row],
    results: Iterable[Mapping[str, Any]] = (),
    *,
    config: Mapping[str, Any] | None = None,
    columns: Sequence[str] = DEFAULT_COLUMNS,
    max_problems: int = MAX_PROBLEMS,
) -> Path:
    """Write the page of a run: what was run, a sentence for each decoder, accuracy against cost, and every answer.

    Args:
        path: The file; its folder is made. An older page is replaced only once the new one is complete.
        title: The heading.
        summary: One row for each decoder, as for `format_table`.
        results: The lines of results.jsonl.
        config: The run's configuration, nested, for the line that says what was run.
        columns: The table's columns; those without any value are left out.
        max_problems: Number of problems shown, the first in the order of `results`: a choice would flatter.

    Returns:
        The path written.
    """
    return write_page(
        path,
        title,
        [
            _facts(config or {}),
            _sentences(summary),
            _figure(summary),
            _summary_table(summary, columns),
            _problems(results, max_problems),
        ],
    )


def _facts(config: Mapping[str, Any]) -> str:
    """What was run, in a line of names and values."""
    model, data = config.get("model", config), config.get("data", {})
    sampling = model.get("sampling") or {}

    def name(role: str) -> Any:
        given = model.get(role)
        return given.get("name") if isinstance(given, Mapping) else given

    problems = data.get("path") or " ".join(str(data[key]) for key in ("family", "split") if data.get(key))
    facts = {
        "policy": name("policy"),
        "reward model": name("reward"),
        "gold reward model": name("gold"),
        "problems": problems or None,
        "β": model.get("beta"),
        "temperature": sampling.get("temperature"),
        "seed": config.get("seed"),
    }
    items = "".join(
        f"<li><span>{escape(key)}</span> <b>{escape(str(value))}</b></li>"
        for key, value in facts.items()
        if value is not None
    )
    return f'<ul class="facts">{items}</ul>' if items else ""


def _sentences(summary: Sequence[Row]) -> str:
    """One sentence for each decoder."""
    lines = []
    for row in summary:
        cost = "" if is_missing(row.get("flops")) else f" at {format_cell(row, 'flops')} FLOPs"
        if not is_missing(row.get("seconds")):
            cost += f" and {format_cell(row, 'seconds')} s a problem"
        if is_missing(row.get("accuracy")):
            said = f"reaches a mean reward of {format_cell(row, 'mean_reward')}"
        else:
            said = f"answers {format_cell(row, 'accuracy')} of the problems right"
        lines.append(f"<li><b>{escape(str(row.get('decoder', '?')))}</b> {escape(said + cost)}.</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


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
    return "<h2>Summary</h2>\n" + rows_table(summary, columns) + '<p class="note">Costs per problem.</p>'


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
    return figure_block(
        _accuracy_svg(rows), "Accuracy of each decoder with its 95% interval against what a problem costs"
    )


def figure_block(svg: str, label: str) -> str:
    """A picture with the line that says what it shows, to the eye and to a screen reader."""
    # The XML prologue has no place within HTML.
    svg = svg[svg.index("<svg ") :].rstrip()
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f'<figure>\n{svg}\n<figcaption class="note">{escape(label)}.</figcaption>\n</figure>'


def _accuracy_svg(rows: Sequence[Row]) -> str:
    """Accuracy with its interval against FLOPs and against seconds, on log axes; bars where no cost is known."""
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
    costs = [key for key in ("flops", "seconds") if any(not is_missing(r.get(key)) and r.get(key) for r in rows)]
    figure = Figure(figsize=(11 if costs else 5.5, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, max(len(costs), 1), squeeze=False, sharey=True)[0]
    if not costs:
        places = list(range(len(rows)))
        axes[0].barh(places, accuracy, xerr=[below, above], alpha=0.8, ecolor="#333", capsize=3)
        axes[0].set_yticks(places, names, parse_math=False)
        axes[0].invert_yaxis()
        axes[0].set(xlabel="accuracy", xlim=(0, 1))
    for plane, key in zip(axes, costs, strict=False):
        for index, row in enumerate(rows):
            if is_missing(row.get(key)) or not row.get(key):
                continue
            plane.errorbar(
                row[key], accuracy[index], [[below[index]], [above[index]]], fmt="o", color=f"C{index % 10}",
                capsize=3, label=names[index],
            )  # fmt: skip
            plane.annotate(
                names[index], (row[key], accuracy[index]), (6, 5), textcoords="offset points", fontsize=8,
                parse_math=False,
            )  # fmt: skip
        plane.set(xscale="log", ylim=(0, 1))
        plane.set_xlabel({"flops": "FLOPs per problem", "seconds": "seconds per problem"}[key])
        plane.margins(x=0.25)
        plane.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy" if costs else "")
    return svg_text(figure)


def svg_text(figure: Figure) -> str:
    """A figure as an SVG file. Fixed ids and no date: the same run writes the same picture."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "nabla_rl"}), StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return buffer.getvalue()


def _problems(results: Iterable[Mapping[str, Any]], max_problems: int) -> str:
    """Every problem with its expected answer and what each decoder answered."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    total: set[str] = set()
    for number, result in enumerate(results):
        key = str(result.get("id", number))
        total.add(key)
        if key in groups or len(groups) < max_problems:
            groups.setdefault(key, []).append(result)
    if not groups:
        return ""
    shown = "All" if len(groups) == len(total) else f"The first {len(groups)} of"
    note = f"{shown} {counted(len(total), 'problem')}, not selected. Open one to read every answer."
    parts = ["<h2>Answers</h2>", f'<p class="note">{note}</p>']
    for number, (key, members) in enumerate(groups.items()):
        question = next((str(m["prompt"]) for m in members if m.get("prompt") is not None), "")
        expected = next((m["expected"] for m in members if m.get("expected") is not None), None)
        marks = " · ".join(f"{escape(str(m.get('decoder', '?')))} {_mark(m)}" for m in members)
        short = " ".join(question.split())
        short = short if len(short) <= 90 else short[:89] + "…"
        parts.append(
            f'<details class="problem"{" open" if number < OPEN_PROBLEMS else ""}><summary><b>{escape(key)}</b> '
            f'<span class="question">{escape(short)}</span><br>{marks}</summary>'
        )
        parts.append(f"<pre>{escape(question)}</pre>")
        if expected is not None:
            parts.append(f'<p>Expected answer: <b class="expected">{escape(str(expected))}</b></p>')
        parts.append('<div class="answers">')
        parts += [_answer(member) for member in members]
        parts.append("</div></details>")
    return "\n".join(parts)


def _mark(result: Mapping[str, Any]) -> str:
    if result.get("correct") is None:
        return '<span class="note">not graded</span>'
    return '<span class="right">✓ right</span>' if result["correct"] else '<span class="wrong">✗ wrong</span>'


def _answer(result: Mapping[str, Any]) -> str:
    """A decoder's completion, what was read from it, what it cost, and its edits."""
    facts = [_mark(result)]
    if result.get("answer") is not None:
        facts.append(f"answer {escape(str(result['answer']))}")
    elif result.get("correct") is not None:
        facts.append("no answer read")
    if result.get("finished") is False:
        facts.append("cut at the maximum length")
    if not is_missing(result.get("reward")):
        facts.append(f"reward {escape(_number(result['reward']))}")
    if cost := result.get("cost"):
        facts.append(f"{cost['flops']:.2g} FLOPs")
    if rollouts := result.get("rollouts"):
        facts.append(counted(len(rollouts), "rollout"))
    parts = [
        f'<div class="answer"><h3>{escape(str(result.get("decoder", "?")))}</h3>',
        f'<p class="note">{" · ".join(facts)}</p><pre>{escape(str(result.get("completion", "")))}</pre>',
    ]
    if trace := result.get("trace"):
        parts.append(_edits(trace))
    return "\n".join([*parts, "</div>"])


def _edits(trace: Sequence[Mapping[str, Any]]) -> str:
    """The edits that were tried, in order."""
    items = []
    for edit in trace:
        kept = bool(edit.get("accepted"))
        change = f"{_number(edit.get('reward_before'))} → {_number(edit.get('reward_after'))}"
        items.append(
            f'<li class="{"kept" if kept else "rejected"}">token {_number(edit.get("position"))}: '
            f"<del>{escape(_visible(edit.get('old_token')))}</del> → "
            f"<ins>{escape(_visible(edit.get('new_token')))}</ins>, reward {change}, "
            f"{'kept' if kept else 'rejected'}</li>"
        )
    accepted = sum(bool(edit.get("accepted")) for edit in trace)
    return (
        f"<details><summary>{counted(len(trace), 'edit')} tried, {accepted} kept</summary>"
        f'<ol class="edits">{"".join(items)}</ol></details>'
    )


def _visible(token: object) -> str:
    """A token whose blanks can be seen."""
    text = "" if token is None else str(token)
    return text.replace("\n", "⏎") if text.strip(" ") else "␣" * len(text) or "∅"


def _number(value: object) -> str:
    if value is None or is_missing(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
