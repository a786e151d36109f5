"""Edit search: one loop whose proposals are the policy's, exact values, first-order values, or at random."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from nabla_rl.data.problems import Problem
from nabla_rl.decoding import AbstractDecoder, BestOfN, Sampling
from nabla_rl.budget import Budget, point_at
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
    "starts": replace(BASE, proposals="value", starts=3, start_temperature=0.7, width=2),
    "restarts": replace(BASE, proposals="value", acceptance="prefix", min_score=0.0, restarts=3),
    "gibbs": replace(BASE, proposals="gradient", edit_temperature=1.0, width=2),
}


def run(decoder: AbstractDecoder, problems, reward=None):
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


# Several starts, restarts, and the stop where the judge is sure


def drawn(problems, sampling: Sampling, *, seed: int, n: int) -> list[list[tuple[int, ...]]]:
    """The first n independent draws of each problem, as best-of-n has them."""
    return [[c.ids for c in r.rollouts] for r in run(BestOfN(n, sampling=sampling, seed=seed), problems)[0]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_search_begins_from_the_best_of_its_starts(temperature):
    problems = toys.problems(10)
    decoder = replace(BASE, starts=4, start_temperature=temperature)
    draws = drawn(problems, Sampling(temperature, max_new_tokens=8), seed=2, n=4)
    greedy, later = run(BASE, problems)[0], 0
    for draw, first, result in zip(draws, greedy, run(decoder, problems)[0], strict=True):
        assert [c.ids for c in result.rollouts[:4]] == [first.rollouts[0].ids, *draw[1:]]
        energies = [energy(c) for c in result.rollouts[:4]]
        assert result.trace[0].energy_before == pytest.approx(min(energies))
        assert [point.rollouts for point in result.curve[:3]] == [1, 4, 5]
        later += energies[0] > min(energies)
    assert later > 2


def test_a_search_begins_anew_where_it_has_converged_and_nowhere_else():
    """Up to there it is the search without restarts; fresh completions follow, and never more than allowed."""
    problems = toys.problems(10)
    once_only = replace(VARIANTS["restarts"], restarts=0, budget=Budget())
    draws = drawn(problems, Sampling(1.0, max_new_tokens=8), seed=2, n=16)
    better = 0
    for starts, times in ((1, 1), (1, 3), (2, 2)):
        again = replace(once_only, restarts=times, starts=starts, max_rollouts=16)
        alone = run(replace(again, restarts=0), problems)[0]
        for draw, short, long in zip(draws, alone, run(again, problems)[0], strict=True):
            length = len(short.rollouts)
            assert length < 16 and [c.ids for c in long.rollouts[:length]] == [c.ids for c in short.rollouts]
            tried = [[(e.position, e.new_token, e.accepted) for e in result.trace] for result in (short, long)]
            assert tried[1][: len(tried[0])] == tried[0]
            assert [c.ids for c in long.rollouts[length : length + starts]] == draw[length : length + starts]
            fresh = len(long.rollouts) - len(long.trace) - 1
            assert long.counts["fresh_rollouts"] == fresh <= starts * (times + 1) - 1
            assert long.counts["restarts"] == times or len(long.rollouts) == 16
            assert energy(long.rollouts[long.curve[-1].chosen]) == min(energy(c) for c in long.rollouts)
            better += long.ids != short.ids
    assert better > 0


def chance(problem, ids) -> float:
    """The judge's smallest probability over all prefixes, by a fresh reading."""
    judge, ids = toys.reward(), torch.tensor([ids])
    prefix = judge.prefill([problem.problem], torch.zeros(1, dtype=torch.int64), Ledger(1))
    return float(judge.values(prefix, ids, torch.ones_like(ids).bool()).sigmoid().min())


@pytest.mark.parametrize("name", ["policy", "restarts", "starts"])
def test_nothing_more_is_tried_once_the_judge_is_sure_of_the_answer(name):
    problems, threshold = toys.problems(12), 0.2
    free = run(VARIANTS[name], problems)[0]
    stopped = run(replace(VARIANTS[name], stop_at=threshold), problems)[0]
    fewer = 0
    for problem, short, long in zip(problems, stopped, free, strict=True):
        held = [chance(problem, long.rollouts[point.chosen].ids) >= threshold for point in long.curve]
        points = held.index(True) + 1 if any(held) else len(held)
        assert len(short.curve) == points
        assert [c.ids for c in short.rollouts] == [c.ids for c in long.rollouts[: long.curve[points - 1].rollouts]]
        assert short.ids == long.rollouts[long.curve[points - 1].chosen].ids
        fewer += points < len(held)
    assert 0 < fewer < len(problems)


@pytest.mark.parametrize("options", [{"width": 4}, {"starts": 9}, {"starts": 3, "restarts": 9, "min_score": 0.0}])
def test_rollouts_in_all_are_at_most_what_is_allowed(options):
    results = run(replace(BASE, proposals="value", max_rollouts=7, budget=Budget(), **options), toys.problems(4))[0]
    assert max(len(result.rollouts) for result in results) == 7


# Edits drawn from the first-order Gibbs conditional


def test_edits_are_drawn_in_proportion_to_what_they_promise():
    """First edits of many like problems against softmax(s/T) of all scores, and pairs of a round without
    replacement."""
    whole = replace(BASE, proposals="gradient", alternatives=3, width=99, max_rollouts=99, budget=Budget(rollouts=2))
    [result] = run(whole, toys.problems(1))[0]
    edits = {(e.position, e.new_token): e.score for e in result.trace}
    assert len(edits) == len(result.trace) > 10
    text, n = toys.problems(1)[0].problem, 600
    law = torch.tensor(list(edits.values())).div(3.0).softmax(-1)
    twice = replace(whole, width=2, edit_temperature=3.0)
    firsts, pairs = torch.zeros(len(edits)), 0
    for result in run(twice, [Problem(str(k), text) for k in range(n)])[0]:
        first, second = ((e.position, e.new_token) for e in result.trace)
        firsts[list(edits).index(first)] += 1
        pairs += first != second
    assert pairs == n
    assert float((firsts / n - law).abs().sum()) / 2 < 0.09 < float((1 / len(edits) - law).abs().sum()) / 2


def test_at_a_low_temperature_the_best_edits_are_drawn():
    problems = toys.problems(6)
    cold = replace(VARIANTS["value"], edit_temperature=1e-4)
    warm = replace(VARIANTS["value"], edit_temperature=2.0)
    expected, found, other = (run(d, problems)[0] for d in (VARIANTS["value"], cold, warm))
    assert [r.rollouts for r in found] == [r.rollouts for r in expected]
    assert [r.rollouts for r in other] != [r.rollouts for r in expected]


# The sharpened control


class SharpenedProposals(Policy):
    """A policy whose alternatives are those of softmax(logits/T): the control that proposes from a sharper policy.

    Completions and their log-probabilities stay the policy's own.
    """

    temperature = 1.0

    def rollout(self, prefix, **options):
        rolled = super().rollout(prefix, **{**options, "keep_logits": True})
        assert rolled.logits is not None
        log_probs = (rolled.logits / self.temperature).log_softmax(-1)
        top = log_probs.topk(options["keep_top"], -1)
        odds = top.values - log_probs.gather(-1, rolled.ids[..., None])
        return replace(rolled, logits=None, top_ids=top.indices, top_logps=rolled.logps[..., None] + odds)


def sharpened(temperature: float) -> SharpenedProposals:
    policy = SharpenedProposals(toys.build_llama(), toys.tokenizer())
    policy.temperature = temperature
    return policy


SHARPENED = {
    "everywhere": BASE,
    "located, by prefix": replace(BASE, acceptance="prefix", min_drop=0.02),
    "several a round, sampled": replace(BASE, width=3, sampling=Sampling(0.8, 1.0, 8)),
    "only promised gains": replace(BASE, min_score=0.0, sampling=Sampling(1.0, 1.0, 8)),
}


@pytest.mark.parametrize("temperature", [0.2, 0.6, 3.0])
@pytest.mark.parametrize("name", SHARPENED)
def test_the_sharpened_control_is_the_twin(name, temperature):
    """Proposals of the policy at another temperature: the same edits in the same order, the same answers."""
    problems = toys.problems(8)
    decoder = replace(SHARPENED[name], budget=Budget(rollouts=12))
    twin, control = (decoder.decode(problems, sharpened(t), toys.reward(), Ledger(8)) for t in (1.0, temperature))
    assert any(result.trace for result in twin)
    for one, other in zip(twin, control, strict=True):
        assert [c.ids for c in one.rollouts] == [c.ids for c in other.rollouts] and one.ids == other.ids
        assert [e.accepted for e in one.trace] == [e.accepted for e in other.trace]
        assert [e.score for e in other.trace] == pytest.approx([e.score / temperature for e in one.trace], abs=1e-4)


@pytest.mark.parametrize("options", [{"proposals": "value"}, {"edit_temperature": 1.0}, {"min_score": -2.0}])
def test_where_the_sharpened_control_would_not_be_the_twin(options):
    """With a value beside the odds, drawn edits, or another bar than 0, a temperature does change the search."""
    problems, decoder = toys.problems(8), replace(BASE, **options, budget=Budget(rollouts=12))
    one, other = (decoder.decode(problems, sharpened(t), toys.reward(), Ledger(8)) for t in (1.0, 0.2))
    assert [[c.ids for c in r.rollouts] for r in one] != [[c.ids for c in r.rollouts] for r in other]


def test_settings_and_rewards_that_cannot_be_used_are_refused():
    with pytest.raises(UserError, match=r"edit_search.width: expected at least 1, found 0"):
        EditSearch(width=0)
    with pytest.raises(UserError, match=r"edit_search.restarts: expected at least 0, found -1"):
        EditSearch(restarts=-1)
    with pytest.raises(UserError, match=r"edit_search.start_temperature: expected a positive number, found 0"):
        EditSearch(start_temperature=0.0)
    with pytest.raises(UserError, match=r"edit_search.stop_at: expected a probability in \(0, 1\].* found 90"):
        EditSearch(stop_at=90)
    with pytest.raises(UserError, match="expected a reward model"):
        EditSearch().decode(toys.problems(1), toys.policy(), None, Ledger(1))
