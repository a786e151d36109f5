"""From lines with curves to rows, comparisons, a table, files and a page."""

from __future__ import annotations

import csv
import json
import math

import pytest
from rich.console import Console

from nabla_rl.budget import Budget
from nabla_rl.metrics.paired import mcnemar_p, sign_flip_p
from nabla_rl.report import frontier as module
from nabla_rl.report.frontier import (
    COMPARED,
    ROW,
    build_frontier,
    format_frontier,
    joined_rows,
    read_at,
    readable_budgets,
    style,
    write_frontier,
)
from tests.report.test_html import Page

EVIL = "<b>$x_1$&"


def line(key: str, right: list[bool | None], *, step: float = 10.0, gold: float | None = 0.5) -> dict:
    """A problem whose k-th step costs `step` FLOPs more, and gives an answer that is right or not."""
    return {
        "id": key,
        "curve": [[k, step * k, 2 * k, 0.25 * k, k - 1] for k in range(1, len(right) + 1)],
        "answers": [
            {"index": k, "correct": value, "reward": 1.0 * k, "gold_reward": None if gold is None else gold * k}
            for k, value in enumerate(right)
        ],
    }


def fixed(*columns: list[list[bool | None]], **more) -> dict[int, list[dict]]:
    """A variant's lines: one list for each seed, in it the answers of each problem."""
    return {
        seed: [line(f"p{i}", right, **more) for i, right in enumerate(column)] for seed, column in enumerate(columns)
    }


RESULTS = {
    "climbs": fixed([[False, True, True], [False, False, True]], [[True, True, True], [False, True, True]]),
    "stays": fixed([[False, False], [True, True]], [[False, False], [False, True]]),
    "once": fixed([[True], [False]], step=15.0),
}


def test_a_reading_is_the_first_point_that_uses_the_budget_up():
    reading = read_at(RESULTS["climbs"], Budget(flops=20.0))
    assert reading["flops"].tolist() == [[20.0, 20.0], [20.0, 20.0]]
    assert reading["rollouts"].tolist() == [[2, 2], [2, 2]]
    assert reading["correct"].tolist() == [[1, 1], [0, 1]]  # problems down, seeds across
    assert read_at(RESULTS["climbs"], Budget(flops=20.5))["flops"].unique().tolist() == [30.0]
    assert read_at(RESULTS["climbs"], Budget())["seconds"].unique().tolist() == [0.75]


def test_budgets_below_the_cheapest_answer_are_left_out():
    assert readable_budgets(RESULTS["climbs"], [30.0, 5.0, 9.5, 10.0]) == [9.5, 10.0, 30.0]
    assert readable_budgets(RESULTS["climbs"], [1.0]) == [None]
    assert readable_budgets(RESULTS["once"], [30.0]) == [None]


def test_rows_and_comparisons():
    frontier = build_frontier(RESULTS, [30.0, 10.0], "stays")
    assert (frontier["problems"], frontier["seeds"]) == (2, [0, 1])
    rows = frontier["rows"]
    assert [(row["variant"], row["budget_flops"]) for row in rows] == [
        ("climbs", 10.0), ("climbs", 30.0), ("stays", 10.0), ("stays", 30.0), ("once", None)
    ]  # fmt: skip
    assert [row["accuracy"] for row in rows] == [0.25, 1.0, 0.25, 0.5, 0.5]
    assert [row["flops"] for row in rows] == [10.0, 30.0, 10.0, 20.0, 15.0]
    assert [row["reward"] for row in rows] == [0.0, 2.0, 0.0, 1.0, 0.0]
    assert [row["gold_reward"] for row in rows] == [0.0, 1.0, 0.0, 0.5, 0.0]
    assert (rows[1]["sequential_calls"], rows[1]["seconds"], rows[1]["rollouts"]) == (6, 0.75, 3)
    # two problems: means of two draws, so the ends are the problems' own means
    assert (rows[3]["accuracy_low"], rows[3]["accuracy_high"]) == (0.0, 1.0)
    by = {(entry["variant"], entry["budget_flops"]): entry for entry in frontier["comparisons"]}
    assert set(by) == {("climbs", 10.0), ("climbs", 30.0), ("once", 15.0)}
    most = by["climbs", 30.0]
    assert (most["difference"], most["low"], most["high"]) == (0.5, 0.0, 1.0)
    assert (most["flops"], most["baseline_flops"], most["problems"]) == (30.0, 20.0, 2)
    first, second = (read_at(RESULTS[name], Budget(flops=30.0))["correct"] for name in ("climbs", "stays"))
    assert most["mcnemar_p"] == mcnemar_p(first[:, 0], second[:, 0])
    assert most["sign_flip_p"] == sign_flip_p(first, second)
    # one seed against two; at its own cost, where the other has taken its second step
    assert by["once", 15.0]["difference"] == 0.0 and by["once", 15.0]["baseline_flops"] == 20.0


def test_problems_without_an_answer_count_for_cost_alone():
    results = {
        name: fixed([[True], [None], [False]], gold=None, step=step) for name, step in (("a", 10.0), ("b", 20.0))
    }
    frontier = build_frontier(results, [30.0], "a")
    assert [row["accuracy"] for row in frontier["rows"]] == [0.5, 0.5]
    assert [row["gold_reward"] for row in frontier["rows"]] == [None, None]
    assert frontier["comparisons"][0]["problems"] == 2
    unknown = build_frontier({"a": fixed([[None], [None]])}, [30.0], "a")
    assert unknown["rows"][0]["accuracy"] is unknown["rows"][0]["accuracy_low"] is None
    assert unknown["rows"][0]["flops"] == 10.0 and unknown["comparisons"] == []


def test_the_same_results_give_the_same_frontier():
    assert build_frontier(RESULTS, [10.0], "stays") == build_frontier(RESULTS, [10.0], "stays")


@pytest.mark.parametrize("results", [{}, {"a": {}}, {"a": {0: []}}])
def test_nothing_finished(results, tmp_path):
    frontier = build_frontier(results, [10.0], "a")
    assert frontier["rows"] == frontier["comparisons"] == []
    write_frontier(tmp_path, frontier, "nothing")
    assert "No problem was finished" in Page((tmp_path / "frontier.html").read_text()).text
    assert format_frontier(frontier).row_count == 0


def test_table_names_a_variant_once():
    table = format_frontier(build_frontier(RESULTS, [30.0, 10.0], "stays"), title="t")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert text.count("climbs") == text.count("stays") == 1
    assert "+0.500 [+0.000, +1.000]" in text and "1.000 [1.00, 1.00]" in text


def test_files(tmp_path):
    frontier = build_frontier({EVIL: RESULTS["climbs"], **RESULTS}, [30.0, 10.0], "stays")
    names = write_frontier(tmp_path, frontier, "two problems")
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    assert json.loads((tmp_path / "frontier.json").read_text()) == frontier
    with (tmp_path / "frontier.csv").open() as file:
        sheet = list(csv.DictReader(file))
    assert list(sheet[0]) == [*ROW, *COMPARED] and len(sheet) == len(frontier["rows"])
    assert sheet[-1]["budget_flops"] == "" and float(sheet[-1]["accuracy"]) == 0.5
    page = Page((tmp_path / "frontier.html").read_text())
    assert [tag for tag, _ in page.tags].count("figure") == 4
    assert EVIL in page.text and "script" not in {tag for tag, _ in page.tags}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert not links  # nothing is loaded
    for name, _, _ in module.PLOTS:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg " in (tmp_path / f"{name}.svg").read_text()


def test_the_same_frontier_writes_the_same_files(tmp_path):
    frontier = build_frontier(RESULTS, [30.0, 10.0], "stays")
    first, second = (
        {
            name: (tmp_path / side / "f" / name).read_bytes()
            for name in write_frontier(tmp_path / side / "f", frontier, "t")
        }
        for side in "ab"
    )
    assert first == second


def test_plots_without_a_gold_judge_leave_the_rewards_out(tmp_path):
    frontier = build_frontier({"a": fixed([[True, False], [False, True]], gold=None)}, [10.0, 30.0])
    names = write_frontier(tmp_path, frontier, "t")
    assert "accuracy_flops.png" in names and "rewards.png" not in names


def test_plotted_are_the_rows():
    rows = joined_rows(build_frontier(RESULTS, [30.0, 10.0], "stays"))
    figure = module.draw_accuracy(rows, against="flops", label="FLOPs")
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    lines = {artist.get_label(): artist for artist in axes.get_lines()}
    assert lines["climbs"].get_xydata().tolist() == [[10.0, 0.25], [30.0, 1.0]]
    assert len(axes.collections) >= 2  # bands
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["climbs", "stays", "once"]


def test_no_two_of_many_variants_look_alike():
    looks = [tuple(str(style(index)[name]) for name in ("color", "marker", "linestyle")) for index in range(28)]
    assert len(set(looks)) == 28
    assert all(not math.isnan(style(index)["linewidth"]) for index in range(28))
