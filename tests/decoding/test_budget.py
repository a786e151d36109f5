"""One budget for every decoder: obeyed on the ledger, and read off a run without one."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from nabla_rl.budget import point_at
from nabla_rl.data.problems import Problem, extract_line
from nabla_rl.decoding import (
    MCTS,
    AbstractDecoder,
    BeamSearch,
    BestOfN,
    Budget,
    Decoded,
    EditSearch,
    Greedy,
    Nabla,
    Point,
    Sample,
    Sampling,
    SelfConsistency,
)
from nabla_rl.dto import DTOConfig
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError
from tests import toys_hf as toys
from tests.test_ledger import hooked

SAMPLING = Sampling(1.0, max_new_tokens=8)
NABLA = Nabla(DTOConfig(num_steps=4, step_size=1.0, final_step_size=1.0), max_rollouts=6, min_entropy=0.5, sweeps=2)
EDITS = EditSearch(alternatives=3, max_rollouts=9, min_drop=0.0, min_score=-math.inf, acceptance="energy")


def first_letter(text: str) -> str | None:
    """An answer that completions share often enough for a vote to turn."""
    return text[:1] or None


DECODERS: dict[str, AbstractDecoder] = {
    "greedy": Greedy(),
    "sample": Sample(),
    "self_consistency": SelfConsistency(n=9),
    "best_of_n": BestOfN(n=9),
    "best_of_n-reward": BestOfN(n=9, choose_by="reward"),
    "best_of_n-vote": BestOfN(n=9, choose_by="weighted_vote"),
    "beam-token": BeamSearch(width=3, expand=3, step="token"),
    "beam-line": BeamSearch(width=4, expand=2, step_tokens=3),
    "mcts": MCTS(iterations=8, branching=2, step="segment", step_tokens=2),
    "nabla": NABLA,
    "nabla-support": replace(NABLA, support=5, min_gradient_norm=2.0),
    "edit_search": EDITS,
    "edit_search-prefix": replace(EDITS, min_score=0.0, acceptance="prefix"),
}
GIVEN = {
    "sample": {"seed": 3},
    "self_consistency": {"extract": first_letter},
    "best_of_n-vote": {"extract": extract_line},
} | {name: {"seed": 1} for name in ("nabla", "nabla-support", "edit_search", "edit_search-prefix")}
DRAWS = ["self_consistency", "best_of_n", "best_of_n-reward", "best_of_n-vote"]
SEARCHES = [name for name in DECODERS if name not in ("greedy", "sample")]
on_every_decoder = pytest.mark.parametrize("name", DECODERS)


def decode(name: str, problems: list[Problem], reward=None, *, options=None, **limits) -> tuple[list[Decoded], Ledger]:
    """What the decoder of that name answers within limits."""
    decoder = replace(DECODERS[name], **(options or {}))  # pyright: ignore
    given = {"sampling": SAMPLING, **GIVEN.get(name, {}), "budget": Budget(**limits)}
    return toys.decode(decoder, problems, reward=reward, **given)


def fractions(result: Decoded) -> list[float]:
    """Limits on operations: before the first point, at points, between them, and beyond the last."""
    first, last = result.curve[0].flops, result.curve[-1].flops
    middle = result.curve[len(result.curve) // 2].flops
    return [first / 2, first, middle, *((1 - t) * first + t * last for t in (0.15, 0.4, 0.77)), last, 2 * last]


@on_every_decoder
def test_a_curve_ends_at_the_answer_and_its_whole_cost(name: str):
    """The last point is the ledger's total and the answer; on the way there nothing falls."""
    results, ledger = decode(name, toys.problems(5))
    for account, result in enumerate(results):
        end, cost = result.curve[-1], ledger.cost(account)
        assert end.flops == pytest.approx(cost.flops, rel=1e-9)
        assert end.seconds == pytest.approx(cost.seconds, rel=1e-9)
        assert (end.sequential_calls, end.rollouts) == (cost.sequential, len(result.rollouts))
        assert result.rollouts[end.chosen].ids == result.ids
        for before, after in pairwise(result.curve):
            assert before.flops < after.flops or before.seconds < after.seconds
            assert before.rollouts <= after.rollouts and before.sequential_calls <= after.sequential_calls
            assert before.chosen < before.rollouts


@on_every_decoder
def test_a_budget_is_overrun_by_less_than_a_step(name: str):
    """Whatever the limit, the ledger says that it was not used up when the last step began."""
    (free,), _ = decode(name, toys.problems(1))
    for limits in [{"flops": f} for f in fractions(free)] + [{"rollouts": n} for n in (1, 2, 5, 99)]:
        (result,), ledger = decode(name, toys.problems(1), **limits)
        assert result.curve[-1].flops == pytest.approx(ledger.cost(0).flops, rel=1e-9)
        assert result.curve[-1].sequential_calls == ledger.cost(0).sequential
        assert all(Budget(**limits).allows(point) for point in result.curve[:-1])
        if Budget(**limits).allows(result.curve[-1]):
            assert len(result.rollouts) == len(free.rollouts)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_run_without_a_budget_says_what_one_with_it_answers(name: str):
    """The point read off the whole curve names answer, rollouts and operations of a run that stops there."""
    problems = toys.problems(4)
    whole, _ = decode(name, problems)
    assert any(len({point.chosen for point in result.curve}) > 1 for result in whole)
    for problem, free in zip(problems, whole, strict=True):
        for limits in [{"flops": f} for f in fractions(free)] + [{"rollouts": n} for n in (1, 2, 3, 5)]:
            (result,), ledger = decode(name, [problem], **limits)
            point = point_at(free.curve, Budget(**limits))
            assert result.ids == free.rollouts[point.chosen].ids
            assert [c.ids for c in result.rollouts] == [c.ids for c in free.rollouts[: point.rollouts]]
            assert ledger.cost(0).flops == pytest.approx(point.flops, rel=1e-9)
            if name not in DRAWS:  # which wait longer where they draw fewer at a time
                assert ledger.cost(0).sequential == point.sequential_calls


@pytest.mark.parametrize("kind", ["classifier", "template", "likelihood"])
@pytest.mark.parametrize("name", DRAWS)
def test_a_point_is_what_so_many_draws_cost(name: str, kind: str):
    """Point j of best-of-n and of self-consistency is the cost and the answer of a run with n = j."""
    tokenizer = toys.chat_tokenizer() if kind == "template" else toys.tokenizer()
    reward = SequenceClassifierReward(toys.build_classifier(), tokenizer)
    if kind == "likelihood":
        reward = LikelihoodReward(Policy(toys.build_llama(seed=5), tokenizer))
    problems = toys.problems(3)
    whole, _ = decode(name, problems, reward)
    for n in (1, 2, 4, 9):
        results, ledger = decode(name, problems, reward, options={"n": n})
        for account, (result, free) in enumerate(zip(results, whole, strict=True)):
            point, cost = free.curve[n - 1], ledger.cost(account)
            assert point.flops == pytest.approx(cost.flops, rel=1e-12)
            assert (point.sequential_calls, point.rollouts) == (cost.sequential, n)
            assert free.rollouts[point.chosen].ids == result.ids


@pytest.mark.parametrize("limit", ["flops", "seconds"])
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_at_a_time_changes_no_answer(name: str, limit: str):
    """A limit beyond reach draws in several batches: the same rollouts and operations, more waiting."""
    problems = toys.problems(4)
    whole, ledger = decode(name, problems)
    limits = {"seconds": 1e6} if limit == "seconds" else {"flops": 1.01 * max(r.curve[-1].flops for r in whole)}
    parts, costs = decode(name, problems, **limits)
    for account, (part, free) in enumerate(zip(parts, whole, strict=True)):
        assert [c.ids for c in part.rollouts] == [c.ids for c in free.rollouts] and part.ids == free.ids
        found, expected = costs.cost(account), ledger.cost(account)
        assert (found.calls, found.tokens) == (expected.calls, expected.tokens)
        assert found.flops == pytest.approx(expected.flops, rel=1e-12)
        assert found.sequential > expected.sequential


@pytest.mark.parametrize("name", SEARCHES)
def test_one_problems_budget_is_not_anothers(name: str):
    """With a limit, each problem's rollouts, answer and account are the same alone and among others."""
    problems = toys.problems(5)
    limit = 0.6 * decode(name, problems[:1])[0][0].curve[-1].flops
    together, ledger = decode(name, problems, flops=limit)
    assert len({len(result.rollouts) for result in together}) > 1
    for account, problem in enumerate(problems):
        (alone,), costs = decode(name, [problem], flops=limit)
        assert [c.ids for c in alone.rollouts] == [c.ids for c in together[account].rollouts]
        found, expected = ledger.cost(account), costs.cost(0)
        assert (found.calls, found.sequential, found.tokens) == (expected.calls, expected.sequential, expected.tokens)
        assert found.flops == pytest.approx(expected.flops, rel=1e-12)


@on_every_decoder
def test_seconds_end_the_work(name: str):
    """A limit that the first step has used up leaves its answer."""
    (free,), _ = decode(name, toys.problems(1))
    (result,), ledger = decode(name, toys.problems(1), seconds=1e-9)
    assert len(result.curve) == 1 and result.curve[0].rollouts == free.curve[0].rollouts
    assert result.ids == free.rollouts[free.curve[0].chosen].ids
    assert result.curve[0].seconds == pytest.approx(ledger.cost(0).seconds) and ledger.cost(0).seconds > 0


@pytest.mark.parametrize("name", SEARCHES)
def test_the_ledger_of_a_limited_run_is_what_hooks_count(name: str):
    """Draws in several batches, beams and trees: sequential passes and tokens are those that torch's hooks see."""
    policy, reward = toys.policy(), toys.reward()
    for problem in toys.problems(3):
        (free,), _ = decode(name, [problem])
        with hooked(policy.backbone.base, reward.backbone.base) as (ours, theirs):
            _, ledger = decode(name, [problem], flops=0.8 * free.curve[-1].flops)
        for hook, model in ((ours, "policy"), (theirs, "reward")):
            cost = ledger.cost(0, model=model, direction="forward")
            assert cost.sequential == hook.forwards
            assert cost.tokens <= hook.positions


def test_whichever_limit_is_met_first_ends_the_work():
    """allows() is false as soon as one limit is reached; point_at() is the first such point, or the last of all."""
    curve = [Point(1, 10.0, 4, 0.5, 0), Point(2, 25.0, 8, 0.7, 0), Point(3, 30.0, 12, 1.5, 2)]
    for budget, expected in [
        (Budget(), 2), (Budget(rollouts=1), 0), (Budget(rollouts=2), 1), (Budget(flops=5), 0), (Budget(flops=10.0), 0),
        (Budget(flops=10.1), 1), (Budget(seconds=1.0), 2), (Budget(rollouts=3, flops=20, seconds=9), 1),
        (Budget(rollouts=9, flops=1e9, seconds=9), 2),
    ]:  # fmt: skip
        assert point_at(curve, budget) == curve[expected]
    assert Budget(rollouts=2, flops=11).allows(curve[0])
    assert not Budget(rollouts=2, flops=9).allows(curve[0]) and not Budget(rollouts=1, flops=11).allows(curve[0])


@pytest.mark.parametrize(("limit", "value"), [("rollouts", 0), ("flops", -1.0), ("seconds", float("nan"))])
def test_a_budget_that_allows_nothing_is_refused(limit: str, value: float):
    """Zero, negative and undefined limits name themselves."""
    with pytest.raises(UserError, match=f"budget.{limit}: expected a positive number, or null for no limit"):
        Budget(**{limit: value})  # pyright: ignore
