"""What a search knows: its current completion, and all that was tried for one problem."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nabla_rl.budget import Point, spent
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import Candidate, Decoded, Edit
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Track
from nabla_rl.models.policy import Policy


@dataclass
class Completion:
    """A completion that the policy wrote and the reward model read, or the part of one from some position on."""

    ids: Tensor  # (length,)
    logps: Tensor  # (length,), log π of the tokens
    entropy: Tensor  # (length,)
    finished: bool
    reward: float
    policy_track: Track
    reward_track: Track

    def energy(self, beta: float) -> float:
        """-r/β - log π of the whole."""
        return float(compute_energy(self.logps.double().sum(), torch.tensor(self.reward).double(), beta))

    def candidate(self, policy: Policy) -> Candidate:
        """The completion as plain values."""
        ids = tuple(self.ids.tolist())
        return Candidate(policy.decode(ids), ids, float(self.logps.double().sum()), self.reward)


C = TypeVar("C", bound=Completion)


@dataclass
class Search(Generic[C]):
    """One problem on its way: the current completion, and all that was tried.

    Attributes:
        problem: What is asked.
        account: Its account in the ledger.
        current: The completion that the next proposal starts from.
        chosen: Index of the answer among those tried.
        tried: Every completion so far.
        ended: Whether each of them ended by itself.
        trace: The edits proposed.
        curve: What had been spent after each step.
        counts: Further counts of the decoder's own.
    """

    problem: Problem
    account: int
    current: C
    chosen: int = 0
    tried: list[Candidate] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    trace: list[Edit] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def note(self, completion: Completion, policy: Policy) -> None:
        """Write a completion down among those tried."""
        self.tried.append(completion.candidate(policy))
        self.ended.append(completion.finished)

    def mark(self, ledger: Ledger) -> None:
        """Add the point that the search has come to, where anything was spent since the last one."""
        point = spent(ledger, self.account, rollouts=len(self.tried), chosen=self.chosen)
        if not self.curve or point.flops > self.curve[-1].flops:
            self.curve.append(point)

    def answer(self) -> Decoded:
        """The chosen completion."""
        best = self.tried[self.chosen]
        return Decoded(
            self.problem.id, best.text, best.ids, self.ended[self.chosen], best.logps, best.reward, self.tried,
            self.trace, len(self.trace), sum(edit.accepted for edit in self.trace), dict(self.counts), self.curve,
        )  # fmt: skip
