"""A study as a table for the terminal, a CSV file, a figure and one self-contained HTML page."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from nabla_rl.studies.base import Report, Row

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1f; background: #fff; max-width: 82rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; } .scroll { overflow-x: auto; } .holds { color: #17692f; }
.fails { color: #a3222c; } figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: #555; } summary { cursor: pointer; }
"""
MISSING = "–"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every key of any row, in the order of first sight."""
    return list(dict.fromkeys(name for row in rows for name in row))


def format_value(value: Any) -> str:
    """The text of a cell, with four significant digits; "–" where the value is unknown."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def with_intervals(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, with the interval from `x_low` to `x_high` in the cell of x."""
    names = [n for n in columns_of(rows) if not n.endswith(("_low", "_high"))]
    names = [n for n in names if any(row.get(n) is not None for row in rows)]
    cells = []
    for row in rows:
        line = []
        for name in names:
            low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
            interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
            line.append(format_value(row.get(name)) + interval)
        cells.append(line)
    return [name.replace("_", " ") for name in names], cells


def claims_table(report: Report, title: str) -> Table:
    """The table of the claims, one line each, with the verdict on each landscape."""
    table = Table(title=Text(title))
    columns = [name for name in columns_of(report.claims) if name != "holds"]
    for name in columns:
        table.add_column(Text(name), overflow="fold", no_wrap=name != "claim")
    for row in report.claims:
        table.add_row(
            *(
                Text(str(row.get(name, MISSING)), style=_style(row.get(name)) if name != "claim" else "")
                for name in columns
            )
        )
    return table


def rows_table(rows: Sequence[Row], title: str, shown: Sequence[str] = ()) -> Table:
    """The table of the rows, or of their columns `shown`, with intervals."""
    if shown:
        kept = {f"{name}{end}" for name in shown for end in ("", "_low", "_high")}
        rows = [{name: value for name, value in row.items() if name in kept} for row in rows]
    table, (names, cells) = Table(title=Text(title)), with_intervals(rows)
    for name in names:
        # the last part of a dotted name is enough in a terminal
        table.add_column(Text(name.rpartition(".")[2]))
    for line in cells:
        table.add_row(*map(Text, line))
    return table


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, with an empty cell where the value is unknown."""
    buffer = StringIO()
    writer = csv.DictWriter(buffer, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def to_html(report: Report, title: str, command: str) -> str:
    """The page with claims, figures and the table, which loads nothing from elsewhere."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        f"<p>Made with <code>{escape(command)}</code>.</p>",
    ]
    if report.claims:
        names = [name for name in columns_of(report.claims) if name != "holds"]
        cells = [[str(row.get(name, MISSING)) for name in names] for row in report.claims]
        parts.append("<h2>Verdicts</h2>\n" + _table(names, cells))
    for caption, path in report.figures:
        svg = path.read_text(encoding="utf-8")
        parts.append(
            f"<figure>\n{svg[svg.index('<svg ') :].rstrip()}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
        )
    notes = [
        [v["landscape"], v["claim"], v["text"], format_value(v["worst_lambda"]), v["note"]]
        for v in report.summary.get("verdicts", [])
    ]
    if notes:
        parts.append("<h2>Every verdict</h2>\n" + _table(["landscape", "claim", "verdict", "worst λ", "note"], notes))
    for heading, rows in report.tables:
        parts.append(f"<h2>{escape(heading)}</h2>\n" + _table(*with_intervals(rows)))
    names, cells = with_intervals(report.rows)
    table = _table(names, cells)
    parts.append(f"<details><summary>The table, {len(cells)} lines</summary>\n{table}\n</details>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join(
        "<tr>" + "".join(f'<td class="{_class(cell)}">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _class(cell: str) -> str:
    return "holds" if cell == "holds" else "fails" if cell.startswith("fails by") else ""


def _style(cell: object) -> str:
    return {"holds": "green", "fails": "red"}.get(_class(str(cell)), "")


def write_grid_figure(rows: Sequence[Row], names: Sequence[str], folder: Path) -> list[tuple[str, Path]]:
    """Draw accuracy and rewards against the setting that the grid varies, one column per family, one line per decoder.

    Args:
        rows: Rows with intervals.
        names: The settings that the grid varies; the last one that is no family of problems is the horizontal axis.
        folder: The folder of the file.

    Returns:
        Caption and path; an empty list where the grid varies nothing.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    varied = [name for name in names if len({str(row[name]) for row in rows}) > 1 and name != "data.family"]
    if not varied:
        return []
    axis_name, others = varied[-1], varied[:-1]
    families = list(dict.fromkeys(row.get("data.family", "") for row in rows))
    metrics = [m for m in ("accuracy", "mean_reward", "gold_reward") if any(row.get(m) is not None for row in rows)]
    places = list(dict.fromkeys(row[axis_name] for row in rows))
    numeric = all(isinstance(p, (int, float)) and not isinstance(p, bool) for p in places)
    figure = Figure(figsize=(4.8 * len(families), 2.9 * len(metrics)), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.subplots(len(metrics), len(families), squeeze=False, sharex="col")
    for column, family in enumerate(families):
        for line, metric in enumerate(metrics):
            axes, series = grid[line][column], {}
            for row in rows:
                if row.get("data.family", "") == family and row.get(metric) is not None:
                    label = ", ".join([row["decoder"], *(f"{o.rpartition('.')[2]}={row[o]}" for o in others)])
                    series.setdefault(label, []).append(row)
            for label, members in series.items():
                x = [row[axis_name] if numeric else places.index(row[axis_name]) for row in members]
                y = [row[metric] for row in members]
                low = [value - row.get(f"{metric}_low", value) for value, row in zip(y, members, strict=True)]
                high = [row.get(f"{metric}_high", value) - value for value, row in zip(y, members, strict=True)]
                axes.errorbar(x, y, [low, high], marker="o", capsize=3, linewidth=1.6, label=label)
            if numeric and min(places) > 0 and max(places) / min(places) > 20:
                axes.set_xscale("log")
            elif not numeric:
                axes.set_xticks(range(len(places)), [str(place) for place in places], rotation=20, ha="right")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_ylabel(metric.replace("_", " ") if column == 0 else "")
        grid[0][column].set_title(str(family), loc="left")
        grid[-1][column].set_xlabel(axis_name)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(families), frameon=False, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.svg"
    with matplotlib.rc_context({"svg.hashsalt": "nabla_rl"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)
    caption = (
        f"The effect of {axis_name}. Accuracy has 95% Wilson intervals over problems, rewards have 1.96 standard "
        "errors. The gold reward comes from a second reward model that no decoder sees."
    )
    return [(caption, path)]
