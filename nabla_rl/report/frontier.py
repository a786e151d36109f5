"""A frontier: the accuracy of decoder variants at each budget, as rows, paired comparisons, a table and plots."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from nabla_rl.decoding.budget import Budget, Point, point_at
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.metrics.paired import bootstrap_interval, mcnemar_p, sign_flip_p
from nabla_rl.report.html import figure_block, rows_table, svg_text, write_page
from nabla_rl.report.table import format_table, present_columns
from nabla_rl.run_folder import as_user_error, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = ("rollouts", "flops", "sequential_calls", "seconds", "correct", "reward", "gold_reward")
ROW = (
    "variant",
    "budget_flops",
    "flops",
    "sequential_calls",
    "seconds",
    "rollouts",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "reward",
    "gold_reward",
)
COMPARED = ("difference", "difference_low", "difference_high", "mcnemar_p", "sign_flip_p")
SHOWN = (
    "variant",
    "budget_flops",
    "flops",
    "sequential_calls",
    "seconds",
    "rollouts",
    "accuracy",
    "reward",
    "gold_reward",
    "difference",
    "sign_flip_p",
)
COMPARISON_SHOWN = (
    "variant",
    "baseline",
    "budget_flops",
    "flops",
    "baseline_flops",
    "difference",
    "mcnemar_p",
    "sign_flip_p",
)

Lines = Mapping[int, Sequence[Mapping[str, Any]]]
"""The results of a variant: one line per problem for each seed, in the same order for every seed."""
Reading = dict[str, Tensor]
"""Each of `QUANTITIES`, (problems, seeds), float64; NaN where the value is unknown."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which the colour-blind can distinguish, without its yellow, which is too pale."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", ":", "-.")


def read_at(lines: Lines, budget: Budget) -> Reading:
    """The cost of a variant and its answers at the point of its curves where `budget` was used up."""
    table = [[_quantities(line, budget) for line in column] for column in lines.values()]
    problems = len(table[0]) if table else 0
    values = torch.tensor(table, dtype=torch.float64).reshape(len(table), problems, len(QUANTITIES))
    return {name: values[..., place].T for place, name in enumerate(QUANTITIES)}


def _quantities(line: Mapping[str, Any], budget: Budget) -> list[float]:
    point = point_at([Point(*entry) for entry in line["curve"]], budget)
    answer = next(answer for answer in line["answers"] if answer["index"] == point.chosen)
    judged = (answer["correct"], answer["reward"], answer["gold_reward"])
    return [
        point.rollouts,
        point.flops,
        point.sequential_calls,
        point.seconds,
        *(math.nan if value is None else float(value) for value in judged),
    ]


def readable_budgets(lines: Lines, budgets: Sequence[float]) -> list[float] | list[None]:
    """The budgets at which a variant is read: those that pay for its cheapest answer, within a tenth.

    [None], its whole curve, where there is no such budget, or where it cannot be stopped early.
    """
    curves = [line["curve"] for column in lines.values() for line in column]
    if all(len(curve) == 1 for curve in curves):
        return [None]
    cheapest = sum(Point(*curve[0]).flops for curve in curves) / len(curves)
    return [budget for budget in sorted(budgets) if 1.1 * budget >= cheapest] or [None]


def build_frontier(
    results: Mapping[str, Lines], budgets: Sequence[float], baseline: str | None = None
) -> dict[str, Any]:
    """The whole content of frontier.json.

    Args:
        results: The lines of each variant's runs, with `curve` and `answers`, over the same problems.
        budgets: FLOPs per problem at which the curves are read.
        baseline: The variant that the others are compared with; None for no comparisons.

    Returns:
        `problems`, `seeds`, `rows` (see `ROW`: means over problems and seeds at each budget, accuracy with its 95%
        bootstrap interval over problems) and `comparisons` (variant less baseline at the same budget). Budgets that do
        not pay for a variant's cheapest answer have no row. A variant that works in one step, or costs more than every
        budget, has one row, whose `budget_flops` is None, and is compared at the FLOPs that it spent.
        Accuracy, and with it all comparisons, is over problems whose answer is known.
    """
    lines = next(iter(results.values()), {})
    problems = len(next(iter(lines.values()), []))
    seeds = sorted({seed for columns in results.values() for seed in columns})
    frontier: dict[str, Any] = {"problems": problems, "seeds": seeds, "rows": [], "comparisons": []}
    if not problems:
        return frontier
    readings = [
        (label, budget, read_at(columns, Budget(flops=budget)))
        for label, columns in results.items()
        for budget in readable_budgets(columns, budgets)
    ]
    # every row over the same draws of problems
    every = torch.stack([reading["correct"].mean(1) for *_, reading in readings], dim=1)
    graded = ~every.isnan().any(1)
    accuracy = bootstrap_interval(every[graded], generator=seeded_generator(0, "frontier"))
    for index, (label, budget, reading) in enumerate(readings):
        means = {name: _mean(values) for name, values in reading.items()}
        value, low, high = (_known(bound[index]) for bound in accuracy)
        row = means | {
            "variant": label,
            "budget_flops": budget,
            "accuracy": value,
            "accuracy_low": low,
            "accuracy_high": high,
        }
        frontier["rows"].append({name: row[name] for name in ROW})
    if baseline is not None and bool(graded.any()):
        others = [entry for entry in readings if entry[0] != baseline]
        frontier["comparisons"] = _compare(others, baseline, results[baseline], graded)
    return frontier


def _compare(
    readings: Sequence[tuple[str, float | None, Reading]], baseline: str, lines: Lines, graded: Tensor
) -> list[dict]:
    """Compare each reading with the baseline at the same budget, problem by problem."""
    rows, differences = [], []
    for label, budget, reading in readings:
        limit = _mean(reading["flops"]) if budget is None else budget
        other = read_at(lines, Budget(flops=limit))
        first, second = reading["correct"][graded], other["correct"][graded]
        differences.append(first.mean(1) - second.mean(1))
        rows.append(
            {
                "variant": label,
                "baseline": baseline,
                "budget_flops": limit,
                "flops": _mean(reading["flops"]),
                "baseline_flops": _mean(other["flops"]),
                "mcnemar_p": mcnemar_p(first[:, 0], second[:, 0]),
                "sign_flip_p": sign_flip_p(first, second),
                "problems": int(graded.sum()),
            }
        )
    if not rows:
        return []
    interval = bootstrap_interval(torch.stack(differences, dim=1), generator=seeded_generator(0, "frontier"))
    return [
        row | {name: float(bound[index]) for name, bound in zip(("difference", "low", "high"), interval, strict=True)}
        for index, row in enumerate(rows)
    ]


def _mean(values: Tensor) -> float | None:
    return _known(values.nanmean())


def _known(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def joined_rows(frontier: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows, each with its comparison where there is one."""
    comparisons: dict[str, list[Mapping[str, Any]]] = {}
    for entry in frontier["comparisons"]:
        comparisons.setdefault(entry["variant"], []).append(entry)
    rows = []
    for row in frontier["rows"]:
        mine = comparisons.get(row["variant"], [])
        found = next((c for c in mine if row["budget_flops"] in (None, c["budget_flops"])), None)
        compared = {name: None if found is None else found[name.removeprefix("difference_")] for name in COMPARED}
        rows.append({**row, **compared})
    return rows


def format_frontier(frontier: Mapping[str, Any], *, title: str | None = None) -> Table:
    """The table for the terminal, with a variant's name at its first row only."""
    rows, before = [], None
    for row in joined_rows(frontier):
        rows.append({**row, "variant": "" if row["variant"] == before else row["variant"]})
        before = row["variant"]
    return format_table(rows, present_columns(rows, SHOWN), title=title)


def write_frontier(folder: str | Path, frontier: Mapping[str, Any], title: str) -> list[str]:
    """Write frontier.json, frontier.csv, the plots as PNG and SVG, and one page with everything.

    Returns:
        The names of the files.
    """
    folder = Path(folder)
    rows = joined_rows(frontier)
    sheet = StringIO()
    writer = csv.DictWriter(sheet, [*ROW, *COMPARED])
    writer.writeheader()
    writer.writerows(rows)
    files: dict[str, str | bytes] = {
        "frontier.json": json.dumps(frontier, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "frontier.csv": sheet.getvalue(),
    }
    figures = []
    for name, label, draw in PLOTS if rows else ():
        figure = draw(rows)
        if figure is None:
            continue
        svg = svg_text(figure)
        figures.append(figure_block(svg, label))
        files |= {f"{name}.svg": svg, f"{name}.png": png_bytes(figure)}
    with as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
        write_page(folder / "frontier.html", f"frontier: {folder.name}", [*_contents(frontier, rows, title, figures)])
    return [*files, "frontier.html"]


def _contents(
    frontier: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], title: str, figures: Sequence[str]
) -> list[str]:
    if not rows:
        return ['<p class="note">No problem was finished by every variant.</p>']
    shown = tuple(name for name in SHOWN if name not in ("difference", "sign_flip_p"))
    parts = [
        f'<p class="note">{escape(title)}. Intervals are 95% bootstrap intervals over problems.</p>',
        *figures,
        "<h2>Every variant at every budget</h2>",
        rows_table(rows, shown),
    ]
    if frontier["comparisons"]:
        compared = [
            {**entry, "difference_low": entry["low"], "difference_high": entry["high"]}
            for entry in frontier["comparisons"]
        ]
        parts += [
            "<h2>Against the baseline at equal budgets</h2>",
            '<p class="note">Difference of accuracies on the same problems, seeds averaged within each. McNemar: the '
            "first seed alone; sign flip: the exact paired test with all seeds.</p>",
            rows_table(compared, COMPARISON_SHOWN),
        ]
    return parts


# Plots


def png_bytes(figure: Figure) -> bytes:
    """A figure as a PNG file without a date or the name of a program."""
    with BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        return buffer.getvalue()


def _canvas() -> tuple[Figure, Axes]:
    # Slow to import, and only pictures need it. No pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _by_variant(rows: Sequence[Mapping[str, Any]], *needed: str) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each variant that have all the values, less those whose budget bought nothing more than the one
    before.

    Every variant keeps its place, and so its style.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        mine = groups.setdefault(row["variant"], [])
        if all(row[name] is not None for name in needed) and not (mine and mine[-1]["flops"] == row["flops"]):
            mine.append(row)
    return groups


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the index-th variant, different for the first few dozen."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": DASHES[turn % len(DASHES)],
        "markersize": 6,
        "linewidth": 1.6,
    }


def _legend(figure: Figure, axes: Axes, order: Iterable[str]) -> None:
    # in the order of the table; matplotlib puts error bars last
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in order if label in entries]
    legend = figure.legend(
        [entries[label] for label in labels], labels, loc="outside right upper", frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label_ticks(axes: Axes) -> None:
    """Marks at 1, 2 and 5 times the powers of ten, as plain numbers where those are short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(
            lambda x, _: f"{x:g}" if 1e-3 <= x < 1e5 else f"{x:.0e}".replace("e+0", "e").replace("e-0", "e-")
        )
    )
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_accuracy(rows: Sequence[Mapping[str, Any]], *, against: str, label: str) -> Figure | None:
    """Draw the accuracy of each variant against its cost on a log axis, with 95% bands; None where none is known."""
    groups = _by_variant(rows, "accuracy", against)
    if not any(groups.values()):
        return None
    figure, axes = _canvas()
    for index, (variant, mine) in enumerate(groups.items()):
        if not mine:
            continue
        mine = sorted(mine, key=lambda row: row[against])
        x, y, low, high = (
            [row[name] for row in mine] for name in (against, "accuracy", "accuracy_low", "accuracy_high")
        )
        looks = style(index)
        if len(mine) == 1:
            bars = [[max(y[0] - low[0], 0)], [max(high[0] - y[0], 0)]]
            axes.errorbar(x, y, bars, label=variant, capsize=3, elinewidth=1, **{**looks, "linestyle": "none"})
        else:
            axes.plot(x, y, label=variant, **looks)
            axes.fill_between(x, low, high, color=looks["color"], alpha=0.12, linewidth=0)
    axes.set(xscale="log", xlabel=label, ylabel="accuracy")
    _label_ticks(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))
    _legend(figure, axes, groups)
    return figure


def draw_rewards(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw gold reward against the reward that decoders optimise, from each variant's smallest budget (hollow mark) to
    its largest."""
    groups = _by_variant(rows, "reward", "gold_reward")
    if not any(groups.values()):
        return None
    figure, axes = _canvas()
    for index, (variant, mine) in enumerate(groups.items()):
        if not mine:
            continue
        x, y = ([row[name] for row in mine] for name in ("reward", "gold_reward"))
        looks = style(index)
        axes.plot(x, y, label=variant, **looks)
        if len(mine) > 1:
            axes.plot(x[:1], y[:1], **{**looks, "linestyle": "none"}, markerfacecolor="white")
    axes.set(xlabel="reward (optimised)", ylabel="gold reward (not optimised)")
    _legend(figure, axes, groups)
    return figure


def _accuracy_plot(against: str, label: str) -> Callable[..., Figure | None]:
    return lambda rows: draw_accuracy(rows, against=against, label=label)


PLOTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (
        "accuracy_flops",
        "Accuracy against FLOPs per problem, with 95% bands",
        _accuracy_plot("flops", "FLOPs per problem"),
    ),
    (
        "accuracy_sequential_calls",
        "Accuracy against sequential calls per problem (latency), with 95% bands",
        _accuracy_plot("sequential_calls", "sequential calls per problem"),
    ),
    (
        "accuracy_seconds",
        "Accuracy against seconds per problem on this machine, with 95% bands",
        _accuracy_plot("seconds", "seconds per problem"),
    ),
    (
        "rewards",
        "Gold reward against reward as the budget grows from the hollow mark; a line that goes right but not up "
        "exploits errors of the reward model",
        draw_rewards,
    ),
)
"""Name of the file, caption, and the function that draws it. A function that returns None leaves its plot out."""
