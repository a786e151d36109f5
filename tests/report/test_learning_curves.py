"""Learning curves: means and ranges over seeds, readings at equal cost, and the files."""

from __future__ import annotations

import csv
import json

import pytest

from nabla_rl.report.learning_curves import build_curves, read_at, write_curves


def point(step: int, flops: float, accuracy: float, error: float = 0.02) -> dict:
    return {
        "step": step, "flops": flops, "accuracy": accuracy, "accuracy_error": error, "reward": 10 * accuracy,
        "reward_error": 0.1, "gold_reward": None, "kl": accuracy - 0.2, "kl_error": 0.01,
    }  # fmt: skip


RESULTS = {
    "cheap": {
        0: [point(0, 0.0, 0.2), point(10, 4.0, 0.4), point(20, 8.0, 0.6)],
        1: [point(0, 0.0, 0.2), point(10, 6.0, 0.6, 0.04), point(20, 10.0, 0.8)],
    },
    "dear": {0: [point(0, 0.0, 0.2), point(10, 30.0, 0.9)]},
}


def test_means_and_ranges_over_seeds():
    """FLOPs and figures are averaged; the error is that of the problems, and does not shrink with seeds."""
    rows = build_curves(RESULTS)["rows"]
    assert [(row["variant"], row["step"], row["seeds"]) for row in rows] == [
        ("cheap", 0, 2), ("cheap", 10, 2), ("cheap", 20, 2), ("dear", 0, 1), ("dear", 10, 1)
    ]  # fmt: skip
    middle = rows[1]
    assert (middle["flops"], middle["accuracy"]) == (5.0, pytest.approx(0.5))
    assert (middle["accuracy_low"], middle["accuracy_high"]) == (0.4, 0.6)
    assert middle["accuracy_error"] == pytest.approx(0.03)
    assert middle["gold_reward"] is None


def test_steps_that_some_seed_lacks_are_left_out():
    runs = {0: RESULTS["cheap"][0], 1: RESULTS["cheap"][1][:2]}
    assert [row["step"] for row in build_curves({"cheap": runs})["rows"]] == [0, 10]


def test_all_are_read_where_all_have_spent_as_much():
    """At shares of what the cheapest spends in all (9): along straight lines."""
    equal = build_curves(RESULTS)["at_equal_flops"]
    assert [row["flops"] for row in equal] == [2.25, 2.25, 4.5, 4.5, 9.0, 9.0]
    dear = [row["accuracy"] for row in equal if row["variant"] == "dear"]
    assert dear == pytest.approx([0.2 + 0.7 * flops / 30 for flops in (2.25, 4.5, 9.0)])
    assert equal[4]["accuracy"] == pytest.approx(0.7)


def test_reading_does_not_go_beyond_a_curve():
    curve = [point(0, 0.0, 0.2), point(10, 4.0, 0.4)]
    assert read_at(curve, 100.0)["accuracy"] == 0.4
    assert read_at(curve[:1], 1.0)["accuracy"] == 0.2
    assert read_at(curve, 1.0)["gold_reward"] is None


def test_files(tmp_path):
    curves = build_curves(RESULTS)
    names = write_curves(tmp_path / "study", curves, "3 problems <held out>")
    assert {file.name for file in (tmp_path / "study").iterdir()} == set(names)
    assert json.loads((tmp_path / "study" / "curves.json").read_text()) == curves
    rows = list(csv.DictReader((tmp_path / "study" / "curves.csv").open()))
    assert [float(row["flops"]) for row in rows] == [row["flops"] for row in curves["rows"]]
    page = (tmp_path / "study" / "curves.html").read_text()
    assert "&lt;held out&gt;" in page and "<svg" in page and "At equal FLOPs" in page
