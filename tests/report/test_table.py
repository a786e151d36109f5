from __future__ import annotations

import pytest
from rich.console import Console

from nabla_rl.report import DEFAULT_COLUMNS, format_cell, format_table, present_columns

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


def render(table) -> str:
    console = Console(width=200)
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
        ("flops", "1.2e+12"),
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


def test_table_has_a_line_per_row_and_a_column_per_key():
    table = format_table([ROW, {"decoder": "greedy"}])
    assert (len(table.columns), table.row_count) == (len(DEFAULT_COLUMNS), 2)
    text = render(table)
    assert "0.531 [0.41, 0.65]" in text
    assert "FLOPs" in text and "acceptance rate" in text
    assert next(line for line in text.splitlines() if "greedy" in line).count("–") == len(DEFAULT_COLUMNS) - 1


def test_names_are_not_markup():
    assert "[red]x[/red]" in render(format_table([{"decoder": "[red]x[/red]"}], ["decoder"], title="[b]t"))


def test_present_columns_leaves_out_what_no_row_knows():
    assert present_columns([ROW], ["decoder", "gold_reward", "acceptance_rate", "flops"]) == ["decoder", "flops"]
    assert present_columns([]) == []
