"""Edit search: one search whose proposals are exact values, first-order values, or the policy's own."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from nabla_rl.budget import Budget, point_at
from nabla_rl.decoding import EditSearch, Sampling, Setting
from nabla_rl.functional import SoftTokens
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.types import UserError
from tests import toys_hf as toys

GIVEN = {"sampling": Sampling(0.3, 0.95, 8), "budget": Budget(rollouts=6), "seed": 2}
BASE = EditSearch("policy", alternatives=4, min_drop=0.0, acceptance="energy")
VALUE = replace(BASE, proposals="value", min_score=-math.inf)
VARIANTS = {
    "policy": BASE,
    "policy-entropy": replace(BASE, min_entropy=0.5),
    "policy-located": replace(BASE, min_drop=0.01, acceptance="prefix"),
    "value": VALUE,
    "value-prefix": replace(VALUE, acceptance="prefix", min_score=None),
    "gradient": replace(BASE, proposals="gradient", weight=0.5),
    "gradient-located": replace(BASE, proposals="gradient", min_drop=0.01),
    "sampled": replace(VALUE, temperature=0.8),
}


def run(decoder: EditSearch, problems, reward=None, **changes):
    return toys.decode(decoder, problems, reward=reward, **{**GIVEN, **changes})


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
    less, spent = run(VARIANTS[name], problems, budget=budget)
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
    results, _ = run(VARIANTS["value"], problems, budget=Budget(rollouts=2))
    for problem, result in zip(problems, results, strict=True):
        first, zero = list(result.rollouts[0].ids), torch.zeros(1, dtype=torch.int64)
        log_probs = policy.completion_log_probs(
            policy.prefill([policy.encode_prompt(problem.problem)], zero, Ledger(1)),
            SoftTokens(toys.one_hot(torch.tensor([first]))), torch.ones(1, len(first)).bool(),
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
    first_order, _ = run(replace(VALUE, proposals="gradient"), problems, judge)
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
    for result in run(replace(BASE, max_rollouts=40), toys.problems(6), budget=Budget())[0]:
        assert len({c.ids for c in result.rollouts}) == len(result.rollouts)


def test_rollouts_in_all_are_at_most_what_is_allowed():
    results, _ = run(replace(VALUE, max_rollouts=7), toys.problems(4), budget=Budget())
    assert max(len(result.rollouts) for result in results) == 7


def test_the_temperature_is_the_searchs_own():
    """At 0 the shared temperature changes nothing, and the first completion is the policy's likeliest one."""
    problems, policy = toys.problems(6), toys.policy()
    one, two = (run(VALUE, problems, sampling=Sampling(t, 0.95, 8))[0] for t in (0.0, 1.5))
    assert [r.rollouts for r in one] == [r.rollouts for r in two]
    for problem, result in zip(problems, one, strict=True):
        first = toys.greedy(policy, toys.prefill(policy, [policy.encode_prompt(problem.problem)]), 8)
        assert list(result.rollouts[0].ids) == first.ids[0, first.mask[0]].tolist()
    warm, again, other = (run(VARIANTS["sampled"], problems, seed=seed)[0] for seed in (2, 2, 3))
    assert [r.rollouts for r in warm] == [r.rollouts for r in again] != [r.rollouts for r in other]


@pytest.mark.parametrize(
    ("decoder", "least"),
    [(EditSearch(), 0.0), (EditSearch("gradient"), -math.inf), (EditSearch("policy"), -math.inf),
     (EditSearch(min_score=0.5), 0.5), (EditSearch("policy", min_score=0.0), 0.0)],
)  # fmt: skip
def test_no_least_score_is_zero_for_exact_values_and_no_limit_otherwise(decoder: EditSearch, least: float):
    assert decoder.least_score == least
    results, _ = run(replace(decoder, min_drop=0.0), toys.problems(8), budget=Budget())
    scores = [edit.score for result in results for edit in result.trace]
    assert all(score >= least for score in scores)
    assert any(score < 0 for score in scores) == (least < 0)


# The sharpened control


class SharpenedProposals(Policy):
    """A policy whose alternatives are those of softmax(logits/T): the control that proposes from a sharper policy.

    Completions and their log-probabilities stay the policy's own.
    """

    temperature = 1.0

    def rollout(self, prefix, sampling, generators=None, **options):
        rolled = super().rollout(prefix, sampling, generators, **{**options, "keep_logits": True})
        assert rolled.logits is not None
        log_probs = (rolled.logits / self.temperature).log_softmax(-1)
        top = log_probs.topk(options["keep_top"], -1)
        odds = top.values - log_probs.gather(-1, rolled.ids[..., None])
        return replace(rolled, logits=None, top_ids=top.indices, top_logps=rolled.logps[..., None] + odds)


def sharpened(temperature: float) -> SharpenedProposals:
    policy = SharpenedProposals(toys.build_llama(), toys.tokenizer())
    policy.temperature = temperature
    return policy


def run_with(policy: Policy, decoder: EditSearch):
    sampling = Sampling(0.3, 1.0, 8)
    return toys.decode(decoder, toys.problems(8), policy, sampling=sampling, budget=Budget(rollouts=12), seed=2)[0]


SHARPENED = {
    "everywhere": BASE,
    "located, by prefix": replace(BASE, acceptance="prefix", min_drop=0.02),
    "sampled": replace(BASE, temperature=0.8),
    "only promised gains": replace(BASE, min_score=0.0, temperature=1.0),
}


@pytest.mark.parametrize("temperature", [0.2, 0.6, 3.0])
@pytest.mark.parametrize("name", SHARPENED)
def test_the_sharpened_control_is_the_twin(name, temperature):
    """Proposals of the policy at another temperature: the same edits in the same order, the same answers."""
    twin, control = (run_with(sharpened(t), SHARPENED[name]) for t in (1.0, temperature))
    assert any(result.trace for result in twin)
    for one, other in zip(twin, control, strict=True):
        assert [c.ids for c in one.rollouts] == [c.ids for c in other.rollouts] and one.ids == other.ids
        assert [e.accepted for e in one.trace] == [e.accepted for e in other.trace]
        assert [e.score for e in other.trace] == pytest.approx([e.score / temperature for e in one.trace], abs=1e-4)


@pytest.mark.parametrize("options", [{"proposals": "value", "min_score": -math.inf}, {"min_score": -2.0}])
def test_where_the_sharpened_control_would_not_be_the_twin(options):
    """With a value beside the odds, or another bar than 0, a temperature does change the search."""
    one, other = (run_with(sharpened(t), replace(BASE, **options)) for t in (1.0, 0.2))
    assert [[c.ids for c in r.rollouts] for r in one] != [[c.ids for c in r.rollouts] for r in other]


@pytest.mark.parametrize(
    ("name", "least"),
    [("alternatives", 1), ("max_rollouts", 1), ("min_entropy", 0), ("min_drop", 0), ("temperature", 0)],
)
def test_bad_settings_are_refused_by_name(name: str, least: int):
    with pytest.raises(UserError, match=f"^edit_search.{name}: expected at least {least}, found {least - 1}"):
        EditSearch(**{name: least - 1})


def test_a_search_without_a_reward_is_refused():
    with pytest.raises(UserError, match="reward.name: expected a reward model for edit_search, found none"):
        EditSearch().decode(toys.problems(1), Setting(toys.policy(), None, Ledger(1)))
