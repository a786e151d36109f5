"""Independent draws of the policy within a budget, and what each of them cost: best-of-n and voting stand on this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nabla_rl.budget import Budget, Point
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import Candidate, Decoded, Setting, candidates, decoded, prefill, prefill_reward
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import COLUMNS, Cost, Ledger
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.base import AbstractReward

Choose = Callable[[Sequence[Candidate]], int]
"""Which of the candidates is the answer."""


@dataclass
class _Drawn:
    """What has been drawn for one problem, and what it cost."""

    problem: Problem
    total: Cost
    tried: list[Candidate] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)  # of each draw alone
    judging: list[float] = field(default_factory=list)  # operations of the reward in each
    curve: list[Point] = field(default_factory=list)


@dataclass
class _Source:
    """What is drawn from: the models, and their prefixes with a row for each problem."""

    policy: Policy
    policy_prefix: Prefix
    reward: AbstractReward | None
    reward_prefix: Prefix | None
    sampling: Sampling

    def draw(
        self, owners: Tensor, generators: list[torch.Generator], ledger: Ledger
    ) -> tuple[list[Candidate], list[bool]]:
        """A scored completion of problem `owners[i]` in each row, booked on account i of `ledger`."""

        def rows(prefix: Prefix) -> Prefix:
            chosen = prefix.select(owners.to(prefix.mask.device))
            return replace(chosen, problems=torch.arange(len(owners)), ledger=ledger)

        rollout = self.policy.rollout(rows(self.policy_prefix), self.sampling, generators)
        rewards = None
        if self.reward is not None and self.reward_prefix is not None:
            with ledger.phase("score"):
                rewards = self.reward.score(rows(self.reward_prefix), rollout.ids, rollout.mask).reward
        return candidates(self.policy, rollout, rewards), rollout.finished.tolist()

    def how_many_fit(self, row: int, one: _Drawn, budget: Budget, most: int) -> int:
        """Further draws for a problem, up to `most`, that what is left of its budget surely pays for; at least 1."""
        point, width, fit = one.curve[-1], self.sampling.length, float(most)
        longest = max(range(len(one.tried)), key=lambda index: len(one.tried[index].ids))
        length = len(one.tried[longest].ids)
        if budget.flops is not None:
            steps, formula = torch.arange(width - 1), self.policy.backbone.formula
            rolled = formula.forward(torch.ones_like(steps), int(self.policy_prefix.lengths[row]) + steps).sum()
            worst = float(rolled + formula.head(torch.tensor(width)))
            if self.reward_prefix is not None:
                # n tokens after c cost n (a + b (c + n)), and what a judge does besides grows no faster
                context = int(self.reward_prefix.lengths[row])
                worst += one.judging[longest] * width / length * (context + width) / (context + length)
            fit = min(fit, (budget.flops - point.flops) / worst)
        if budget.seconds is not None:
            slowest = max(cost.seconds / len(c.ids) for cost, c in zip(one.costs, one.tried, strict=True))
            fit = min(fit, (budget.seconds - point.seconds) / max(slowest * width, 1e-9))
        return max(1, int(fit))


def answer_by_draws(
    problems: Sequence[Problem], setting: Setting, reward: AbstractReward | None, *, most: int, choose: Choose
) -> list[Decoded]:
    """Draw completions, score them where there is a reward, and choose one.

    Without a limit on operations or seconds all draws are one batch. With one, the first draw is alone and later
    batches hold as many as surely fit what is left, were each of the greatest length, and at least one: no more is
    drawn than one at a time would have been. Draw j depends on (seed, problem id, j), and on no other problem.

    Args:
        problems: What is asked; account i of the setting's ledger is problem i's.
        setting: What is drawn from, and what may be spent.
        reward: The reward model that scores the draws, or None.
        most: Maximum number of draws for each problem.
        choose: Picks the answer among the draws so far.
    """
    ledger, budget = setting.ledger, setting.budget
    ours, theirs = prefill(problems, setting), None
    if reward is not None:
        theirs = prefill_reward(problems, reward, ledger)
    source = _Source(setting.policy, ours, reward, theirs, setting.sampling)
    drawn = [_Drawn(problem, ledger.cost(account)) for account, problem in enumerate(problems)]
    most = most if budget.rollouts is None else min(most, budget.rollouts)
    at_once = most if budget.flops is None and budget.seconds is None else 1
    counts = dict.fromkeys(range(len(problems)), at_once)
    while counts:
        owners = torch.tensor([account for account, n in counts.items() for _ in range(n)])
        generators = [
            seeded_generator(setting.seed, drawn[account].problem.id, "rollout", len(drawn[account].tried) + j)
            for account, n in counts.items()
            for j in range(n)
        ]
        parts = Ledger(len(owners))  # an account for each draw
        tried, finished = source.draw(owners, generators, parts)
        ledger.absorb(parts, owners)
        start = 0
        for account, n in counts.items():
            batch = slice(start, start + n)
            _add(drawn[account], tried[batch], finished[batch], parts, start, choose)
            start += n
        counts = {
            account: source.how_many_fit(account, drawn[account], budget, most - len(drawn[account].tried))
            for account in counts
            if len(drawn[account].tried) < most and budget.allows(drawn[account].curve[-1])
        }
    results = []
    for one in drawn:
        chosen = one.curve[-1].chosen
        results.append(decoded(one.problem, chosen, one.tried, one.finished[chosen], one.curve))
    return results


def _add(one: _Drawn, tried: list[Candidate], finished: list[bool], parts: Ledger, start: int, choose: Choose) -> None:
    """Add a batch of draws, accounts `start` and following of `parts`, with a point after each."""
    before = one.total
    for row, total in enumerate(_running_totals(parts, start, len(tried))):
        one.tried.append(tried[row])
        one.finished.append(finished[row])
        one.costs.append(parts.cost(start + row))
        one.judging.append(parts.cost(start + row, model="reward").flops)
        one.total = before + total
        one.curve.append(
            Point(len(one.tried), one.total.flops, one.total.sequential, one.total.seconds, choose(one.tried))
        )


def _running_totals(parts: Ledger, start: int, n: int) -> list[Cost]:
    """What the first, the first two, … the first n of some sequences that ran side by side cost together."""
    total = torch.zeros(n, len(COLUMNS), dtype=torch.float64)
    for account in parts.rows.values():
        part = account[start : start + n]
        running = part.cumsum(0)
        running[:, 1] = part[:, 1].cummax(0).values
        total += running
    return [
        Cost(round(calls), round(waits), round(tokens), flops, seconds)
        for calls, waits, tokens, flops, seconds in total.tolist()
    ]
