from __future__ import annotations

import re

import pytest
from rich.console import Console

from nabla_rl.report import DEFAULT_COLUMNS, counted, format_cell, format_table, present_columns
from nabla_rl.report.table import format_power

ROW = {
    "decoder": "nabla",
    "accuracy": 0.53125,
    "accuracy_low": 0.4111,
    "accuracy_high": 0.6472,
    "mean_reward": -0.25,
    "gold_reward": None,
    "rollouts": 16,
    "policy_calls": 12345,
    "reward_calls": 7.25,
    "flops": 1.2345e12,
    "seconds": 12.34,
    "acceptance_rate": float("nan"),
}


def render(table, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize(
    ("column", "want"),
    [
        ("decoder", "nabla"),
        ("accuracy", "0.531 [0.41, 0.65]"),
        ("mean_reward", "-0.250"),
        ("gold_reward", "–"),
        ("rollouts", "16"),
        ("policy_calls", "12,345"),
        ("reward_calls", "7.2"),
        ("calls", "12,352.2"),
        ("flops", "1.2e12"),
        ("seconds", "12.3"),
        ("acceptance_rate", "–"),
        ("a_key_nobody_wrote", "–"),
    ],
)
def test_cells(column, want):
    assert format_cell(ROW, column) == want


def test_accuracy_without_an_interval_stands_alone_and_zero_is_not_missing():
    assert format_cell({"accuracy": 0.0, "accuracy_low": None}, "accuracy") == "0.000"
    assert format_cell({"flops": 0}, "flops") == "0"


def test_calls_are_unknown_where_a_part_of_them_is():
    assert format_cell({"policy_calls": 3, "reward_calls": None}, "calls") == "–"


@pytest.mark.parametrize(
    ("value", "want"), [(0.0, "0"), (9.96e9, "1.0e10"), (1.5e100, "1.5e100"), (3.0, "3.0e0"), (2e-7, "2.0e-7")]
)
def test_powers_of_ten(value, want):
    assert format_power(value) == want


def test_counted():
    assert [counted(number, "edit") for number in (0, 1, 2, 1000)] == ["0 edits", "1 edit", "2 edits", "1,000 edits"]


def test_table_has_a_line_per_row_and_a_column_per_key():
    table = format_table([{**ROW, "gold_reward": 1.0}, {"decoder": "greedy"}])
    assert (len(table.columns), table.row_count) == (len(DEFAULT_COLUMNS), 2)
    text = render(table)
    assert "0.531 [0.41, 0.65]" in text
    assert "FLOPs" in text and " gold " in text and " reward " in text
    assert next(line for line in text.splitlines() if "greedy" in line).count("–") == len(DEFAULT_COLUMNS) - 1


def test_five_decoders_fit_a_terminal_of_100_columns():
    decoders = ("greedy", "best_of_n", "self_consistency", "nabla", "edit_search")
    large = {
        "mean_reward": -12.345,
        "gold_reward": -12.345,
        "policy_calls": 12345,
        "reward_calls": 6789,
        "rollouts": 16.5,
    }
    rows = [{**ROW, **large, "decoder": name, "flops": 1.2e15, "seconds": 1234.5} for name in decoders]
    lines = render(format_table(rows, title="64 problems (words, test split); costs per problem"), 100).splitlines()
    assert max(map(len, lines)) <= 100
    for row in rows:
        (line,) = (line for line in lines if line.startswith(f" {row['decoder']} "))
        cells = [cell.strip() for cell in re.split(r" {2,}", line.strip())]
        assert cells == [format_cell(row, column) for column in DEFAULT_COLUMNS]


def test_names_are_not_markup():
    assert "[red]x[/red]" in render(format_table([{"decoder": "[red]x[/red]"}], ["decoder"], title="[b]t"))


def test_present_columns_leaves_out_what_no_row_knows():
    assert present_columns([ROW], ["decoder", "gold_reward", "acceptance_rate", "flops"]) == ["decoder", "flops"]
    assert present_columns([]) == []


@pytest.mark.parametrize(
    ("column", "same"), [("acceptance_rate", 1.0), ("rollouts", 1.0), ("reward_calls", 0.0), ("reward_calls", 0)]
)
def test_present_columns_leaves_out_what_cannot_vary(column, same):
    rows = [{column: same}, {column: None}, {column: same}]
    assert present_columns(rows, [column]) == []
    assert present_columns([*rows, {column: 0.5}], [column]) == [column]


def test_what_was_measured_stays_even_where_all_are_the_same():
    rows = [{"accuracy": 1.0, "mean_reward": 0.0, "acceptance_rate": 0.0}] * 2
    assert present_columns(rows, ["accuracy", "mean_reward", "acceptance_rate"]) == list(rows[0])
