"""Edit search: one loop whose proposals are the policy's, exact values, first-order values, or at random."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from nabla_rl.decoding import Sampling
from nabla_rl.decoding.budget import Budget, point_at
from nabla_rl.decoding.edit_search import EditSearch, shuffled
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.types import UserError
from tests import toys_hf as toys

SAMPLING = Sampling(temperature=0.0, max_new_tokens=8)
BASE = EditSearch(sampling=SAMPLING, alternatives=4, budget=Budget(rollouts=6), seed=2)
VARIANTS = {
    "policy": BASE,
    "value": replace(BASE, proposals="value"),
    "value-prefix": replace(BASE, proposals="value", acceptance="prefix", min_score=0.0),
    "gradient": replace(BASE, proposals="gradient", weight=0.5, width=2),
    "random": replace(BASE, proposals="random", min_entropy=0.5),
    "random_gradient": replace(BASE, proposals="random_gradient", min_drop=0.01),
    "sampled": replace(BASE, proposals="value", sampling=Sampling(0.8, 0.95, 8), width=3),
}


def run(decoder: EditSearch, problems, reward=None):
    ledger = Ledger(len(problems))
    return decoder.decode(problems, toys.policy(), reward or toys.reward(), ledger), ledger


def energy(candidate, beta: float = 1.0) -> float:
    return float(compute_energy(torch.tensor(candidate.logps).double(), torch.tensor(candidate.reward).double(), beta))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_answer_has_the_lowest_energy_of_all_that_was_tried(name):
    for result in run(VARIANTS[name], toys.problems(8))[0]:
        energies = [energy(candidate) for candidate in result.rollouts]
        assert energy(next(c for c in result.rollouts if c.ids == result.ids)) == pytest.approx(min(energies))
        held = [energies[point.chosen] for point in result.curve]
        assert held == sorted(held, reverse=True)


@pytest.mark.parametrize("name", ["policy", "value", "gradient"])
def test_energy_acceptance_never_raises_the_energy(name):
    accepted = 0
    for result in run(VARIANTS[name], toys.problems(12))[0]:
        for edit in result.trace:
            assert edit.accepted is not True or edit.energy_after < edit.energy_before
            accepted += edit.accepted
    assert accepted > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_equals_each_problem_alone_in_any_order(name):
    problems = toys.problems(7)
    together, _ = run(VARIANTS[name], problems)
    alone = [run(VARIANTS[name], [problem])[0][0] for problem in reversed(problems)][::-1]
    for found, expected in zip(together, alone, strict=True):
        assert [c.ids for c in found.rollouts] == [c.ids for c in expected.rollouts]
        assert found.ids == expected.ids
        assert [e.accepted for e in found.trace] == [e.accepted for e in expected.trace]
        assert [p.sequential_calls for p in found.curve] == [p.sequential_calls for p in expected.curve]
        assert [p.flops for p in found.curve] == pytest.approx([p.flops for p in expected.curve], rel=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_it_says_of_its_completions_is_what_a_fresh_pass_says(name):
    """log π and r of everything tried, though prefixes were cut out of what was encoded before."""
    problems, policy, judge = toys.problems(5), toys.policy(), toys.reward()
    for problem, result in zip(problems, run(VARIANTS[name], problems)[0], strict=True):
        for candidate in result.rollouts:
            ids = torch.tensor([candidate.ids])
            mask, account = torch.ones_like(ids).bool(), torch.zeros(1, dtype=torch.int64)
            logps = policy.completion_logps(
                policy.prefill([policy.encode_prompt(problem.problem)], account, Ledger(1)), ids, mask
            )
            reward = judge.score(judge.prefill([problem.problem], account, Ledger(1)), ids, mask).reward
            assert candidate.logps == pytest.approx(float(logps.sum()), abs=1e-4)
            assert candidate.reward == pytest.approx(float(reward), abs=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("budget", [Budget(rollouts=1), Budget(rollouts=3), Budget(rollouts=6, flops=4e5)])
def test_a_smaller_budget_gives_what_the_curve_says(name, budget):
    problems = toys.problems(6)
    full, ledger = run(VARIANTS[name], problems)
    less, spent = run(replace(VARIANTS[name], budget=budget), problems)
    for index, (whole, part) in enumerate(zip(full, less, strict=True)):
        point = point_at(whole.curve, budget)
        assert whole.rollouts[point.chosen].ids == part.ids
        if len(part.curve) < len(whole.curve):
            assert point.flops == pytest.approx(spent.cost(index).flops, rel=1e-9)
        assert whole.curve[-1].flops == pytest.approx(ledger.cost(index).flops, rel=1e-9)
        # nothing was begun when it was used up
        assert all(budget.allows(earlier) for earlier in part.curve[:-2])


def test_exact_values_rank_edits_as_the_tilted_policy_does():
    """The first edit tried is the one of largest log-odds and change of value, found by reading every prefix."""
    problems, policy, judge = toys.problems(5), toys.policy(), toys.reward()
    results, _ = run(replace(VARIANTS["value"], budget=Budget(rollouts=2)), problems)
    for problem, result in zip(problems, results, strict=True):
        first, zero = list(result.rollouts[0].ids), torch.zeros(1, dtype=torch.int64)
        log_probs = policy.completion_log_probs(
            policy.prefill([policy.encode_prompt(problem.problem)], zero, Ledger(1)),
            toys.one_hot(torch.tensor([first])), torch.ones(1, len(first)).bool(),
        )[0]  # fmt: skip

        def value(ids):
            ids = torch.tensor([ids])
            return float(judge.values(judge.prefill([problem.problem], zero, Ledger(1)), ids, ids > -1)[0, -1])  # noqa: B023

        best = -float("inf")
        for at, token in itertools.product(range(len(first)), range(log_probs.shape[-1])):
            if token in log_probs[at].topk(4).indices and token != first[at]:
                odds = float(log_probs[at, token] - log_probs[at, first[at]])
                best = max(best, odds + value([*first[:at], token]) - value(first[: at + 1]))
        assert result.trace[0].score == pytest.approx(best, abs=1e-3)


def test_a_likelihood_judge_has_exact_first_order_values():
    """Its gradient and its exact values propose the same edits."""
    judge = LikelihoodReward(Policy(toys.build_llama(seed=5), toys.tokenizer()))
    problems = toys.problems(6)
    exact, _ = run(VARIANTS["value"], problems, judge)
    first_order, _ = run(replace(VARIANTS["value"], proposals="gradient"), problems, judge)
    assert [[c.ids for c in r.rollouts] for r in exact] == [[c.ids for c in r.rollouts] for r in first_order]


def test_the_twin_asks_the_judge_for_nothing_but_scores():
    _, ledger = run(VARIANTS["policy"], toys.problems(4))
    assert not any(phase == "probe" or direction == "backward" for phase, _, direction in ledger.rows)
    _, ledger = run(VARIANTS["gradient"], toys.problems(4))
    assert any(phase == "probe" and direction == "backward" for phase, _, direction in ledger.rows)


def test_positions_that_surely_hold_no_error_are_left_alone():
    """With the threshold at 1 no position is open, so nothing is tried but the first rollout."""
    for result in run(replace(BASE, min_drop=1.0), toys.problems(5))[0]:
        assert len(result.rollouts) == 1 and not result.trace


def test_an_edit_is_not_tried_twice_from_the_same_prefix():
    for result in run(replace(VARIANTS["policy"], budget=Budget(rollouts=40)), toys.problems(6))[0]:
        assert len({c.ids for c in result.rollouts}) == len(result.rollouts)


def test_shuffled_changes_are_the_same_numbers_elsewhere():
    changes = torch.arange(12.0).view(3, 4)
    mixed = shuffled(changes, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(-1).values, changes) and not torch.equal(mixed, changes)


def test_settings_and_rewards_that_cannot_be_used_are_refused():
    with pytest.raises(UserError, match=r"edit_search.width: expected at least 1, found 0"):
        EditSearch(width=0)
    with pytest.raises(UserError, match="expected a reward model"):
        EditSearch().decode(toys.problems(1), toys.policy(), None, Ledger(1))
