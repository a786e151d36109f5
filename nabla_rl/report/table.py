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
    "policy_calls",
    "reward_calls",
    "flops",
    "seconds",
)
"""`accuracy` shows `accuracy_low` and `accuracy_high` beside it."""

_DECIMALS = {"mean_reward": 2, "reward": 3, "gold_reward": 2, "acceptance_rate": 3}
_TITLES = {"mean_reward": "reward", "gold_reward": "gold"}
_NAMES = ("decoder", "variant")
_WITH_INTERVAL = ("accuracy", "difference")
_POWERS = ("flops", "budget_flops", "baseline_flops")


def is_missing(value: object) -> bool:
    """Is there nothing to show?"""
    return value is None or (isinstance(value, float) and math.isnan(value))


def format_cell(row: Row, column: str) -> str:
    """What a table shows of `row` under `column`.

    Args:
        row: a decoder's summary.
        column: a key of it; `accuracy` and `difference` take their intervals along.

    Returns:
        The text, "–" where nothing is known.

    Example:
        >>> format_cell({"accuracy": 0.53125, "accuracy_low": 0.41, "accuracy_high": 0.65}, "accuracy")
        '0.531 [0.41, 0.65]'
        >>> format_cell({"flops": 1.2345e12}, "flops")
        '1.2e+12'
        >>> format_cell({"policy_calls": 12345}, "policy_calls")
        '12,345'
    """
    value = row.get(column)
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
        return f"{value:.1e}" if value else "0"
    if column.endswith("_p"):
        return f"{value:.2g}" if value >= 1e-4 else "<1e-4"
    if column == "seconds":
        return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
    if column in _DECIMALS:
        return f"{value:,.{_DECIMALS[column]}f}"
    # Counts, or means of counts.
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.1f}"


def present_columns(rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS) -> list[str]:
    """The columns for which some row has a value, in the order given."""
    return [column for column in columns if any(not is_missing(row.get(column)) for row in rows)]


def column_title(column: str) -> str:
    """A column's heading: its key in words."""
    return _TITLES.get(column) or re.sub(r"\bflops\b", "FLOPs", column.replace("_", " "))


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 edit, 2 edits."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_table(rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS, *, title: str | None = None) -> Table:
    """A table for the terminal, one line per decoder.

    Args:
        rows: the summaries, in the order to show them.
        columns: the keys to show, in order; `present_columns` leaves out those that say nothing.
        title: a line above the table.

    Returns:
        The table, to be printed by a `rich.console.Console`.
    """
    # A Text, unlike a string, is taken literally: a decoder called "[red]" is not markup.
    table = Table(
        title=None if title is None else Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in columns:
        left = column in _NAMES
        whole = left or column in _WITH_INTERVAL
        table.add_column(Text(column_title(column)), justify="left" if left else "right", no_wrap=whole)
    for row in rows:
        table.add_row(*(Text(format_cell(row, column)) for column in columns))
    return table
