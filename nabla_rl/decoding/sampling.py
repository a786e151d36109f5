"""Greedy decoding and plain sampling: one rollout a problem, no reward model.

Their one rollout is their one step, so a budget has nothing to cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nabla_rl.budget import spent
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import AbstractDecoder, Decoded, Setting, candidates, decoded, draw_rollouts, prefill
from nabla_rl.models.sampling import Sampling


@dataclass(frozen=True)
class Sample(AbstractDecoder):
    """One sample of the policy."""

    name: ClassVar[str] = "sample"
    needs_reward: ClassVar[bool] = False

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        rollout = draw_rollouts(problems, setting, prefill(problems, setting))
        tried, finished = candidates(setting.policy, rollout, None), rollout.finished.tolist()
        curves = [[spent(setting.ledger, account, rollouts=1, chosen=0)] for account in range(len(problems))]
        return [decoded(p, 0, [c], f, curve) for p, c, f, curve in zip(problems, tried, finished, curves, strict=True)]


@dataclass(frozen=True)
class Greedy(AbstractDecoder):
    """The policy's likeliest token at every position."""

    name: ClassVar[str] = "greedy"
    needs_reward: ClassVar[bool] = False

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        return Sample().decode(problems, setting.at_temperature(0.0))

    def is_deterministic(self, sampling: Sampling) -> bool:
        return True
