"""Greedy decoding and plain sampling: one rollout a problem, no reward model.

Their one rollout is their one step: a budget, which every decoder takes, has nothing to cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import AbstractDecoder, Decoded, Sampling, candidates, decoded, draw_rollouts, prefill
from nabla_rl.decoding.budget import Budget, spent
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward


@dataclass(frozen=True)
class Sample(AbstractDecoder):
    """One sample of the policy."""

    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    name: str = "sample"

    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        prefix = prefill(problems, policy, ledger, self.sampling.max_new_tokens)
        rollout = draw_rollouts(problems, policy, prefix, self.sampling, n=1, seed=self.seed)
        tried, finished = candidates(policy, rollout, None), rollout.finished.tolist()
        curves = [[spent(ledger, account, rollouts=1, chosen=0)] for account in range(len(problems))]
        return [decoded(p, 0, [c], f, curve) for p, c, f, curve in zip(problems, tried, finished, curves, strict=True)]


@dataclass(frozen=True)
class Greedy(AbstractDecoder):
    """The policy's likeliest token at every position."""

    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)
    name: str = "greedy"

    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        return Sample(replace(self.sampling, temperature=0.0)).decode(problems, policy, reward, ledger)
