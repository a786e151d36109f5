"""Summary rows, one per decoder, as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
"""A decoder's summary; a key that is missing, None or NaN is shown as "–"."""

MISSING = "–"

DEFAULT_COLUMNS = (
    "decoder",
    "accuracy",
    "mean_reward",
    "gold_reward",
    "rollouts",
    "calls",
    "flops",
    "seconds",
)
"""What fits a terminal of 100 columns.

`accuracy` shows `accuracy_low` and `accuracy_high` beside it, and `calls` adds `policy_calls` and `reward_calls`.
"""

_DECIMALS = {"mean_reward": 3, "reward": 3, "gold_reward": 3, "acceptance_rate": 3}
_NAMES = ("decoder", "variant")
_WITH_INTERVAL = ("accuracy", "difference")
_POWERS = ("flops", "budget_flops", "baseline_flops")
_SUMS = {"calls": ("policy_calls", "reward_calls")}
_TITLES = {"mean_reward": "reward"}
_SHORT_TITLES = {"gold_reward": "gold"}
_TRIVIAL = {"acceptance_rate": 1, "rollouts": 1, "reward_calls": 0}
"""A column that holds this value alone carries no information, because the decoders cannot have another."""


def is_missing(value: object) -> bool:
    """Is there nothing to show?"""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell_value(row: Row, column: str) -> Any:
    """The value behind a cell: a key of the row, or the sum of several."""
    parts: list[Any] = [row.get(name) for name in _SUMS.get(column, ())]
    return row.get(column) if not parts or any(map(is_missing, parts)) else sum(parts)


def format_cell(row: Row, column: str) -> str:
    """The text that a table shows for `row` under `column`.

    Args:
        row: A decoder's summary.
        column: One of its keys, or `calls`. The cells of `accuracy` and `difference` include their intervals.

    Returns:
        The text; "–" where the value is unknown.

    Example:
        >>> format_cell({"accuracy": 0.53125, "accuracy_low": 0.41, "accuracy_high": 0.65}, "accuracy")
        '0.531 [0.41, 0.65]'
        >>> format_cell({"flops": 1.2345e12}, "flops")
        '1.2e12'
        >>> format_cell({"policy_calls": 12345}, "policy_calls")
        '12,345'
    """
    value = cell_value(row, column)
    if is_missing(value):
        return MISSING
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return str(value)
    if column == "accuracy":
        low, high = row.get("accuracy_low"), row.get("accuracy_high")
        interval = "" if is_missing(low) or is_missing(high) else f" [{low:.2f}, {high:.2f}]"
        return f"{value:.3f}{interval}"
    if column == "difference":
        low, high = row.get("difference_low"), row.get("difference_high")
        interval = "" if is_missing(low) or is_missing(high) else f" [{low:+.3f}, {high:+.3f}]"
        return f"{value:+.3f}{interval}"
    if column in _POWERS:
        return format_power(value)
    if column.endswith("_p"):
        return f"{value:.2g}" if value >= 1e-4 else "<1e-4"
    if column == "seconds":
        return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
    if column in _DECIMALS:
        return f"{value:,.{_DECIMALS[column]}f}"
    # Counts, or means of counts.
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def format_power(value: float) -> str:
    """A large number with two digits and its power of ten.

    Example:
        >>> format_power(162204672.0), format_power(0.0)
        ('1.6e8', '0')
    """
    return re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", f"{value:.1e}") if value else "0"


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the singular for one.

    Example:
        >>> counted(1, "edit"), counted(0, "edit"), counted(1200, "problem")
        ('1 edit', '0 edits', '1,200 problems')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def present_columns(rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS) -> list[str]:
    """The columns that carry information, in the order given.

    A column is left out where no row has a value for it, or where every row that has one has the value that the column
    cannot help having, such as an acceptance rate of 1 for a decoder that accepts every edit.
    """
    kept = []
    for column in columns:
        values = [value for row in rows if not is_missing(value := cell_value(row, column))]
        if values and any(value != _TRIVIAL.get(column) for value in values):
            kept.append(column)
    return kept


def column_title(column: str) -> str:
    """A column's heading: its key in words."""
    return _TITLES.get(column) or re.sub(r"\bflops\b", "FLOPs", column.replace("_", " "))


def format_table(rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS, *, title: str | None = None) -> Table:
    """A table for the terminal, one line per decoder.

    Args:
        rows: The summaries, in the order of the table.
        columns: The keys to show, in order; those that `present_columns` finds empty are left out.
        title: A line above the table; null for none.

    Returns:
        The table, to be printed by a `rich.console.Console`.
    """
    # A Text, unlike a string, is taken literally: a decoder called "[red]" is not markup.
    table = Table(
        title=None if title is None else Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    columns = present_columns(rows, columns)
    for column in columns:
        left = column in _NAMES
        whole = left or column in _WITH_INTERVAL
        heading = _SHORT_TITLES.get(column) or column_title(column)
        table.add_column(Text(heading), justify="left" if left else "right", no_wrap=whole)
    for row in rows:
        table.add_row(*(Text(format_cell(row, column)) for column in columns))
    return table
