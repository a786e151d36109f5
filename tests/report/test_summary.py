"""From result lines to a table's rows, by hand-made lines."""

from __future__ import annotations

import pytest

from nabla_rl.metrics import wilson_interval
from nabla_rl.report.summary import acceleration_shares, finished_by_all, mean, summarise

KEYS = (
    "decoder accuracy accuracy_low accuracy_high mean_reward gold_reward rollouts policy_calls reward_calls flops "
    "seconds acceptance_rate"
).split()


def line(key: str, decoder: str = "greedy", **changes) -> dict:
    row = {
        "id": key,
        "decoder": decoder,
        "correct": True,
        "reward": 1.0,
        "gold_reward": -1.0,
        "rollouts": [{}, {}],
        "proposals": 0,
        "accepted": 0,
        "counts": {},
        "cost": {"policy_calls": 10, "reward_calls": 4, "flops": 1e6},
        "seconds": 0.5,
    }
    return {**row, **changes}


def test_mean_is_over_what_is_there():
    assert mean([1.0, None, 3.0]) == 2.0
    assert mean([None]) is None
    assert mean([]) is None


def test_one_row_for_each_decoder_in_the_order_asked_for():
    rows = summarise([line("a"), line("a", "nabla"), line("b")], ["nabla", "greedy"])
    assert [row["decoder"] for row in rows] == ["nabla", "greedy"]
    assert all(list(row) == KEYS for row in rows)


def test_means_are_per_problem_and_the_interval_is_wilson_s():
    cost = {"policy_calls": 30, "reward_calls": 0, "flops": 3e6}
    other = line("b", correct=False, reward=3.0, gold_reward=0.0, rollouts=[{}], cost=cost, seconds=1.5)
    (row,) = summarise([line("a"), other], ["greedy"])
    low, high = (float(bound) for bound in wilson_interval(1, 2))
    assert row == {
        "decoder": "greedy",
        "accuracy": 0.5,
        "accuracy_low": pytest.approx(low),
        "accuracy_high": pytest.approx(high),
        "mean_reward": 2.0,
        "gold_reward": -0.5,
        "rollouts": 1.5,
        "policy_calls": 20,
        "reward_calls": 2,
        "flops": 2e6,
        "seconds": 1.0,
        "acceptance_rate": None,
    }
    assert all(type(row[key]) is float for key in ("accuracy", "accuracy_low", "accuracy_high"))


def test_without_answers_and_reward_models_there_is_no_accuracy_and_no_reward():
    (row,) = summarise([line("a", correct=None, reward=None, gold_reward=None)], ["greedy"])
    for key in ("accuracy", "accuracy_low", "accuracy_high", "mean_reward", "gold_reward"):
        assert row[key] is None
    assert row["flops"] == 1e6


def test_accuracy_is_over_the_problems_with_an_answer():
    (row,) = summarise([line("a"), line("b", correct=None), line("c", correct=False)], ["greedy"])
    assert row["accuracy"] == 0.5


def test_acceptance_rate_is_over_proposals_not_over_problems():
    lines = [line("a", proposals=3, accepted=3), line("b", proposals=1, accepted=0), line("c", proposals=0)]
    assert summarise(lines, ["greedy"])[0]["acceptance_rate"] == 0.75


def test_a_decoder_without_lines_has_a_row_of_nothing():
    (row,) = summarise([], ["greedy"])
    assert row == dict.fromkeys(KEYS) | {"decoder": "greedy"}


def test_only_problems_that_every_decoder_has_finished_count():
    first, second, third = line("a"), line("b", "nabla"), line("b")
    assert finished_by_all([first, second, third], ["greedy", "nabla"]) == [second, third]
    assert finished_by_all([first, second, third], ["greedy"]) == [first, second, third]
    assert finished_by_all([], ["greedy"]) == []


def test_acceleration_shares():
    counts = {"skipped": 30, "visited": 10, "unchanged": 4, "dto_steps": 100, "dto_evaluations": 9, "probes": 1}
    lines = [line("a", "nabla", counts=counts), line("b", "nabla", counts=counts), line("a", counts=counts)]
    shares = acceleration_shares(lines)
    assert shares == {
        "positions_skipped": pytest.approx(0.75),
        "tokens_unchanged": pytest.approx(0.4),
        "gradients_cached": pytest.approx(0.9),
    }


def test_acceleration_shares_without_nabla_and_without_visits():
    assert acceleration_shares([line("a")]) is None
    shares = acceleration_shares([line("a", "nabla", counts={"skipped": 5})])
    assert shares == {"positions_skipped": 1.0, "tokens_unchanged": 0.0, "gradients_cached": 0.0}
