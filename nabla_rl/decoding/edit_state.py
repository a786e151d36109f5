"""What edit search knows: a completion position by position, and one problem on its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import Candidate, Decoded, Edit
from nabla_rl.decoding.budget import Point, spent
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix, Track
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.rewards.base import AbstractProcessReward


@dataclass
class Completion:
    """A completion that the policy wrote and the judge read, or the part of one from some position on."""

    ids: Tensor  # (length,)
    logps: Tensor  # (length,), log π of the tokens
    entropy: Tensor  # (length,)
    values: Tensor  # (length,), V(y_≤i)
    alternatives: Tensor  # (length, k), the policy's likeliest tokens
    odds: Tensor  # (length, k), log π(v) - log π(y_i) of those
    changes: Tensor  # (length, k), ΔV_i(v); NaN where it is not known yet
    finished: bool
    reward: float
    policy_track: Track
    reward_track: Track
    done: set[tuple[int, int]] = field(default_factory=set)
    """Edits (i, v) that were tried, with the prefixes before them as they are."""

    def drops(self) -> Tensor:
        """q_{i-1} - q_i, the chance that the first error is token i, (length,)."""
        right = torch.cat([self.values.new_ones(1), self.values.sigmoid()]).cummin(0).values
        return right[:-1] - right[1:]

    def chance(self) -> float:
        """The last q_i = min_{j≤i} σ(V(y_≤j)): the judge's probability that all of it is right."""
        return float(self.values.sigmoid().min())

    def energy(self, beta: float) -> float:
        """-r/β - log π of the whole."""
        return float(compute_energy(self.logps.double().sum(), torch.tensor(self.reward).double(), beta))

    def prefix_energy(self, length: int, beta: float) -> float:
        """-V(y_≤i)/β - log π(y_≤i) of the first `length` tokens."""
        return float(-self.values[length - 1] / beta - self.logps[:length].double().sum())


@dataclass
class Search:
    """One problem on its way: the current completion, and all that was tried."""

    problem: Problem
    account: int  # in the ledger
    current: Completion
    fresh: int = 0  # completions of the prompt to be drawn before it goes on
    converged: bool = False
    best: int = 0  # of the lowest energy among those tried
    tried: list[Candidate] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    trace: list[Edit] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def note(self, completion: Completion, policy: Policy, beta: float) -> None:
        """Write a completion down among those tried."""
        ids = tuple(completion.ids.tolist())
        self.tried.append(
            Candidate(policy.decode(ids), ids, float(completion.logps.double().sum()), completion.reward)
        )
        self.energies.append(completion.energy(beta))
        self.chances.append(completion.chance())
        self.ended.append(completion.finished)
        if self.energies[-1] < self.energies[self.best]:
            self.best = len(self.tried) - 1

    def mark(self, ledger: Ledger) -> None:
        """Add the point that it has come to, where anything was spent since the last one."""
        point = spent(ledger, self.account, rollouts=len(self.tried), chosen=self.best)
        if not self.curve or point.flops > self.curve[-1].flops:
            self.curve.append(point)

    def answer(self) -> Decoded:
        """The completion of lowest energy."""
        best = self.tried[self.best]
        return Decoded(
            self.problem.id, best.text, best.ids, self.ended[self.best], best.logps, best.reward, self.tried,
            self.trace, len(self.trace), sum(edit.accepted for edit in self.trace), dict(self.counts), self.curve,
        )  # fmt: skip


def read(rollout: Rollout, judge: AbstractProcessReward, prefix: Prefix, starts: Sequence[int]) -> list[Completion]:
    """What was rolled out after `starts` completion tokens, as one pass of the judge on top of `prefix` sees it."""
    scored = judge.score(prefix, rollout.ids, rollout.mask)
    values = judge.encoded_values(scored.encoded)
    assert rollout.encoded is not None
    assert rollout.entropy is not None and rollout.top_ids is not None and rollout.top_logps is not None
    tracks = zip(rollout.encoded.tracks(starts), scored.encoded.tracks(starts), strict=True)
    completions = []
    for row, (policy_track, reward_track) in enumerate(tracks):
        real = rollout.mask[row]
        logps = rollout.logps[row, real]
        odds = rollout.top_logps[row, real] - logps[:, None]
        completions.append(
            Completion(
                rollout.ids[row, real],
                logps,
                rollout.entropy[row, real],
                values[row, real],
                rollout.top_ids[row, real],
                odds,
                torch.full_like(odds, torch.nan),
                bool(rollout.finished[row]),
                float(scored.reward[row]),
                policy_track,
                reward_track,
            )  # fmt: skip
        )
    return completions


def spliced(head: Completion, at: int, tail: Completion) -> Completion:
    """The completion that an edit at position `at` has led to, with what stays known of its beginning."""
    # at the edit itself the alternatives are the same ones, seen from another token
    tail.changes[0] = head.changes[at] + head.values[at] - tail.values[0]
    return Completion(
        ids=torch.cat([head.ids[:at], tail.ids]),
        logps=torch.cat([head.logps[:at], tail.logps]),
        entropy=torch.cat([head.entropy[:at], tail.entropy]),
        values=torch.cat([head.values[:at], tail.values]),
        alternatives=torch.cat([head.alternatives[:at], tail.alternatives]),
        odds=torch.cat([head.odds[:at], tail.odds]),
        changes=torch.cat([head.changes[:at], tail.changes]),
        finished=tail.finished,
        reward=tail.reward,
        policy_track=head.policy_track.spliced(tail.policy_track),
        reward_track=head.reward_track.spliced(tail.reward_track),
    )


def follow(old: Completion, at: int, new: Completion) -> Completion:
    """The completion to go on from after an accepted edit: edits of what has not changed stay tried."""
    new.done = {(i, v) for i, v in old.done if i <= at} | {(at, int(old.ids[at]))}
    return new
