"""Learning curves: held-out measures against the cost of training, over variants and seeds, as rows and plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nabla_rl.report.frontier import png_bytes, style
from nabla_rl.report.html import figure_block, rows_table, svg_text, write_page
from nabla_rl.run_folder import as_user_error, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("accuracy", "greedy_accuracy", "reward", "gold_reward", "kl", "objective")
"""The measures of a policy, each with `<name>_error`, its standard error over problems."""
SHARES = (0.25, 0.5, 1.0)
"""Parts of the cheapest variant's FLOPs at which the curves are also read."""
COLUMNS = (
    "variant", "seeds", "step", "flops", "accuracy", "accuracy_error", "greedy_accuracy", "reward", "gold_reward",
    "kl", "kl_error",
)  # fmt: skip

Run = Sequence[Mapping[str, Any]]
"""The points of one run in order: `step`, `flops` of the training so far, and measures."""


def build_curves(results: Mapping[str, Mapping[int, Run]]) -> dict[str, Any]:
    """The whole content of curves.json.

    Args:
        results: The points of each variant's runs, by variant and seed.

    Returns:
        `rows` has the mean over seeds of `flops` and of each of `FIGURES`, for each variant and step; `<name>_low` and
        `<name>_high` are the smallest and the largest value over seeds, and `<name>_error` is the standard error over
        problems. The problems are the same for all seeds, so that more seeds do not make it smaller. `at_equal_flops`
        has the same values where all variants have spent the same FLOPs, interpolated linearly between points.
    """
    rows = [row for label, runs in results.items() for row in _over_seeds(label, runs)]
    curves = {label: [row for row in rows if row["variant"] == label] for label in results}
    curves = {label: mine for label, mine in curves.items() if mine}
    spent = [mine[-1]["flops"] for mine in curves.values()]
    budgets = [share * min(spent) for share in SHARES] if spent and min(spent) > 0 else []
    equal = [{"variant": label, **read_at(mine, budget)} for budget in budgets for label, mine in curves.items()]
    return {"rows": rows, "at_equal_flops": equal}


def _over_seeds(label: str, runs: Mapping[int, Run]) -> list[dict[str, Any]]:
    """One row for each step that every seed has."""
    steps = set.intersection(*({point["step"] for point in run} for run in runs.values())) if runs else set()
    rows = []
    for step in sorted(steps):
        points = [next(point for point in run if point["step"] == step) for run in runs.values()]
        row: dict[str, Any] = {"variant": label, "seeds": len(points), "step": step}
        row["flops"] = sum(point["flops"] for point in points) / len(points)
        for name in FIGURES:
            values = [point[name] for point in points if point.get(name) is not None]
            if not values:
                row[name] = None
                continue
            row |= {name: sum(values) / len(values), f"{name}_low": min(values), f"{name}_high": max(values)}
            errors = [point[f"{name}_error"] for point in points if point.get(f"{name}_error") is not None]
            row[f"{name}_error"] = sum(errors) / len(errors) if errors else None
        rows.append(row)
    return rows


def read_at(curve: Sequence[Mapping[str, Any]], flops: float) -> dict[str, Any]:
    """The measures of a curve where it has spent `flops`, interpolated linearly between its points.

    Example:
        >>> read_at([{"flops": 0.0, "accuracy": 0.2}, {"flops": 4.0, "accuracy": 0.6}], 1.0)["accuracy"]
        0.3
    """
    after = next((k for k, row in enumerate(curve) if row["flops"] >= flops), len(curve) - 1)
    first, second = curve[max(after - 1, 0)], curve[after]
    width = second["flops"] - first["flops"]
    share = min(max((flops - first["flops"]) / width, 0.0), 1.0) if width else 1.0
    row: dict[str, Any] = {"flops": flops}
    for name in (part for figure in FIGURES for part in (figure, f"{figure}_low", f"{figure}_high")):
        a, b = first.get(name), second.get(name)
        row[name] = None if a is None or b is None else a + share * (b - a)
    return row


def format_curves(curves: Mapping[str, Any], *, title: str) -> Table:
    """The table for the terminal, with the last point of each variant, and all variants at equal FLOPs."""
    table = Table(title=title)
    for name in ("variant", "seeds", "step", "FLOPs", "accuracy", "greedy", "reward", "gold reward", "KL"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    last = {row["variant"]: row for row in curves["rows"]}
    for row in last.values():
        table.add_row(row["variant"], str(row["seeds"]), str(row["step"]), f"{row['flops']:.2e}", *_cells(row))
    for budget in sorted({row["flops"] for row in curves["at_equal_flops"]}):
        table.add_section()
        for row in curves["at_equal_flops"]:
            if row["flops"] == budget:
                table.add_row(row["variant"], "", "", f"{budget:.2e}", *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Means over seeds, with their range where the seeds differ."""
    cells = []
    for name in ("accuracy", "greedy_accuracy", "reward", "gold_reward", "kl"):
        value, low, high = row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")
        text = "–" if value is None else f"{value:.3f}"
        if value is not None and low is not None and high is not None and high > low:
            text += f" ({low:.3f} to {high:.3f})"
        cells.append(text)
    return cells


def write_curves(folder: str | Path, curves: Mapping[str, Any], title: str) -> list[str]:
    """Write curves.json, curves.csv, the plots as PNG and SVG, and a page, and return the names of the files."""
    folder, rows = Path(folder), curves["rows"]
    names = ["variant", "seeds", "step", "flops"]
    names += [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high", "_error")]
    sheet = StringIO()
    writer = csv.DictWriter(sheet, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    files: dict[str, str | bytes] = {
        "curves.json": json.dumps(curves, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "curves.csv": sheet.getvalue(),
    }
    figure = draw_curves(rows)
    svg = svg_text(figure)
    files |= {"curves.svg": svg, "curves.png": png_bytes(figure)}
    note = (
        f'<p class="note">{escape(title)}. Bands reach from the smallest to the largest value over seeds. FLOPs '
        "include the training and its rewards, but not the evaluations.</p>"
    )
    label = "Held-out measures against the FLOPs of training, and reward against KL from the reference"
    contents = [note, figure_block(svg, label), "<h2>Every point</h2>", rows_table(rows, COLUMNS)]
    if curves["at_equal_flops"]:
        shown = ("variant", "flops", "accuracy", "greedy_accuracy", "reward", "gold_reward", "kl")
        contents += ["<h2>At equal FLOPs</h2>", rows_table(curves["at_equal_flops"], shown)]
    with as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
        write_page(folder / "curves.html", f"learning curves: {folder.name}", contents)
    return [*files, "curves.html"]


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy, reward and gold reward against FLOPs, and reward against KL, with bands over seeds."""
    # Slow to import, and only this picture needs it. No pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("flops", "accuracy", "FLOPs of training", "accuracy"),
        ("flops", "reward", "FLOPs of training", "reward (trained on)"),
        ("flops", "gold_reward", "FLOPs of training", "gold reward (not trained on)"),
        ("kl", "reward", "KL from the reference, nats per completion", "reward (trained on)"),
    )
    labels = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, (across, up, across_label, up_label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for index, label in enumerate(labels):
            mine = [
                row for row in rows if row["variant"] == label and None not in (row.get(across), row.get(up))
            ]  # fmt: skip
            if not mine:
                continue
            x, looks = [row[across] for row in mine], style(index)
            axes.plot(x, [row[up] for row in mine], label=label, **{**looks, "markersize": 4})
            if across == "flops":
                low, high = ([row[f"{up}_{end}"] for row in mine] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=looks["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel=across_label, ylabel=up_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, texts, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
