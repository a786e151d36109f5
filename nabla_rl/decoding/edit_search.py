"""Edit search: change one token of the current completion, roll the rest out afresh, keep what is better.

    y ← greedy rollout from x
    repeat   score edits (i, v):  s = log π(v | x, y_<i) - log π(y_i | x, y_<i) + w ΔV_i(v) / β
             ỹ ← rollout from (x, y_<i, v) for the best edit not tried yet;  the reward model reads it
             y ← ỹ if it is accepted
    until    no edit promises a gain, or the budget is used up
    answer   the completion of lowest energy of all that were tried

An edit leaves what stands before it alone and gives up what stands after it. Its effect is therefore the change of the
tilted policy's log-odds at token i with the value V of the *prefix*, ΔV_i(v) = V(y_<i, v) - V(y_≤i), which no suffix
enters. The argument `proposals` says where ΔV comes from:

    value       exact, from one pass of the reward model over the alternatives under a tree attention mask
    gradient    to first order, g_i[v] - g_i[y_i] with the own-token gradients g_i = ∂V_i/∂y_i of one backward
    policy      no ΔV at all: the policy's own alternatives, likeliest first (the same search without values)

The reward model also says where the first error probably is. With q_i = min_{j≤i} σ(V(y_≤j)), the chance that all is
right up to token i, q_{i-1} - q_i is the chance that the first error is token i, and `min_drop` leaves out positions
where that is small. This costs nothing, because the values come with the scoring of the completion.

Many problems advance side by side, each independent of the others; their reward passes and rollouts share batches.
What is known is never computed again: prefixes are cut out of what was encoded, and the scores of edits hold until an
earlier token changes.

Source: the loop is ∇-Reasoner's (arXiv 2603.04948, Algorithm 3) with the whole completion in view instead of one token
after the other; exact and first-order values of prefixes are this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Decoded,
    Edit,
    Setting,
    draw_rollouts,
    prefill,
    prefill_reward,
    require_process_reward,
)
from nabla_rl.decoding.search import Completion, Search
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.base import AbstractProcessReward

Proposals = Literal["value", "gradient", "policy"]
EditAcceptance = Literal["energy", "prefix"]


@dataclass
class Valued(Completion):
    """A completion with the values of its prefixes and its possible edits."""

    values: Tensor  # (length,), V(y_≤i)
    alternatives: Tensor  # (length, k), the policy's likeliest tokens
    odds: Tensor  # (length, k), log π(v) - log π(y_i) of those
    changes: Tensor  # (length, k), ΔV_i(v); NaN where it is not known yet
    done: set[tuple[int, int]] = field(default_factory=set)
    """Edits (i, v) that were tried, with the prefixes before them as they are."""

    def drops(self) -> Tensor:
        """q_{i-1} - q_i, the chance that the first error is token i, (length,)."""
        right = torch.cat([self.values.new_ones(1), self.values.sigmoid()]).cummin(0).values
        return right[:-1] - right[1:]

    def prefix_energy(self, length: int, beta: float) -> float:
        """-V(y_≤i)/β - log π(y_≤i) of the first `length` tokens."""
        return float(-self.values[length - 1] / beta - self.logps[:length].double().sum())


@dataclass
class EditState(Search[Valued]):
    """A search whose answer is the completion of lowest energy."""

    energies: list[float] = field(default_factory=list)

    def add(self, completion: Valued, policy: Policy, beta: float) -> None:
        """Write a completion down, and choose it where its energy is the lowest so far."""
        self.note(completion, policy)
        self.energies.append(completion.energy(beta))
        if self.energies[-1] < self.energies[self.chosen]:
            self.chosen = len(self.tried) - 1


@dataclass(frozen=True)
class Proposed:
    """An edit that is being tried."""

    search: EditState
    position: int
    token: int
    score: float


@dataclass(frozen=True)
class EditSearch(AbstractDecoder):
    """Edits of the current completion, ranked by the change of the tilted policy's log-odds."""

    proposals: Proposals = "value"
    """Source of ΔV: value (exact), gradient (first order), or policy (none)."""
    weight: float = 1.0
    """Weight w of ΔV in the score; below 1 for a gradient that is not exact."""
    alternatives: int = 8
    """Number of the policy's likeliest tokens considered at each position."""
    max_rollouts: int = 16
    """Maximum number of rollouts for each problem, the first included."""
    min_entropy: float = 0.0
    """Least entropy in nats of a position that is edited."""
    min_drop: float = 0.05
    """Least probability of holding the first error, of a position that is edited."""
    min_score: float | None = None
    """Least score of an edit that is tried; null is 0 for exact values and no limit otherwise."""
    acceptance: EditAcceptance = "prefix"
    """Energy that must fall: that of the prefix up to the edit, or of the whole completion."""
    temperature: float = 0.0
    """Sampling temperature of this search's rollouts, in place of the shared one."""

    name: ClassVar[str] = "edit_search"

    def __post_init__(self) -> None:
        """Check the values."""
        self.check(alternatives=1, max_rollouts=1, min_entropy=0, min_drop=0, temperature=0)

    def is_deterministic(self, sampling: Sampling) -> bool:
        return self.temperature == 0

    @property
    def least_score(self) -> float:
        """`min_score`, with what null means."""
        if self.min_score is not None:
            return self.min_score
        return 0.0 if self.proposals == "value" else -math.inf

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        reward = require_process_reward(self.name, setting.reward)
        setting = setting.at_temperature(self.temperature)
        searches = self._start(problems, setting, reward)
        active = searches
        while active := [s for s in active if len(s.tried) < self.max_rollouts and setting.budget.allows(s.curve[-1])]:
            self._look(active, setting, reward)
            edits = {search.account: self._choose(search, setting) for search in active}
            self._try([edit for edit in edits.values() if edit is not None], setting, reward)
            for search in active:
                search.mark(setting.ledger)
            active = [search for search in active if edits[search.account] is not None]
        return [search.answer() for search in searches]

    def _keep_top(self, policy: Policy) -> int:
        return min(self.alternatives, policy.vocab_size)

    def _start(self, problems: Sequence[Problem], setting: Setting, reward: AbstractProcessReward) -> list[EditState]:
        """Each problem's first completion."""
        policy, ledger = setting.policy, setting.ledger
        rollout = draw_rollouts(
            problems, setting, prefill(problems, setting), keep_states=True, keep_top=self._keep_top(policy)
        )
        judged = prefill_reward(problems, reward, ledger)
        with ledger.phase("score"):
            firsts = read(rollout, reward, judged, [0] * len(problems))
        searches = []
        for account, (problem, first) in enumerate(zip(problems, firsts, strict=True)):
            search = EditState(problem, account, first)
            search.add(first, policy, setting.beta)
            search.mark(ledger)
            searches.append(search)
        return searches

    def _open(self, completion: Valued) -> Tensor:
        """The positions at which edits are considered, (length,)."""
        return (completion.entropy >= self.min_entropy) & (completion.drops() >= self.min_drop)

    def _look(self, searches: Sequence[EditState], setting: Setting, reward: AbstractProcessReward) -> None:
        """Fill in ΔV where it is wanted and not known, by one pass of the reward model (and one back) for all
        problems."""
        if self.proposals == "policy":
            return
        wanted = [(self._open(s.current) & s.current.changes[:, 0].isnan()).nonzero().squeeze(-1) for s in searches]
        asking = [(s, s.current, at) for s, at in zip(searches, wanted, strict=True) if len(at)]
        if not asking:
            return
        tracks = [known.reward_track for _, known, _ in asking]
        positions = pad_sequence([at for *_, at in asking], batch_first=True)
        mask = pad_sequence([torch.ones_like(at, dtype=torch.bool) for *_, at in asking], batch_first=True)
        current = pad_sequence([known.ids[at] for _, known, at in asking], batch_first=True)
        others = pad_sequence([known.alternatives[at] for _, known, at in asking], batch_first=True)
        with setting.ledger.phase("probe"):
            if self.proposals == "value":
                k = others.shape[-1]
                values = reward.fork_values(
                    tracks, positions.repeat_interleave(k, 1), others.flatten(1), mask.repeat_interleave(k, 1)
                ).view_as(others)
                before = pad_sequence([known.values[at] for _, known, at in asking], batch_first=True)
                changes = values - before[..., None]
            else:
                changes = reward.fork_changes(tracks, positions, current, mask, others)
        for row, (search, known, at) in enumerate(asking):
            known.changes[at] = self._found(changes[row, : len(at)].to(known.changes), search, setting)
            search.counts["probes"] += 1
            search.counts["probed_positions"] += len(at)

    def _found(self, changes: Tensor, search: EditState, setting: Setting) -> Tensor:
        """The changes of the value as they are used, (positions, k): a control of a study may deal them otherwise."""
        return changes

    def _gains(self, search: EditState, setting: Setting) -> Tensor:
        """s of every edit of the current completion, (length, k)."""
        known = search.current
        return known.odds if self.proposals == "policy" else known.odds + self.weight / setting.beta * known.changes

    def _choose(self, search: EditState, setting: Setting) -> Proposed | None:
        """The best edit that was not tried yet; None means that the search has converged."""
        known, scores = search.current, self._gains(search, setting)
        out = (known.alternatives == known.ids[:, None]) | ~self._open(known)[:, None]
        scores = scores.masked_fill(out, -torch.inf).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        for position, token in known.done:
            scores[position] = scores[position].masked_fill(known.alternatives[position] == token, -torch.inf)
        scores = scores.masked_fill(scores < self.least_score, -torch.inf)
        flat = int(scores.flatten().argsort(descending=True, stable=True)[0])
        position, choice = divmod(flat, scores.shape[1])
        score = float(scores[position, choice])
        if score == -math.inf:
            return None
        return Proposed(search, position, int(known.alternatives[position, choice]), score)

    def _try(self, edits: list[Proposed], setting: Setting, reward: AbstractProcessReward) -> None:
        """Roll out from each edit, let the reward model read what is new, and keep it where it is accepted."""
        if not edits:
            return
        policy, longest = setting.policy, setting.sampling.length
        starts = [edit.position for edit in edits]
        rollout = policy.rollout(
            Prefix.cat([edit.search.current.policy_track.prefix_at(edit.position) for edit in edits]),
            setting.sampling,
            [
                seeded_generator(
                    setting.seed, e.search.problem.id, "rollout", len(e.search.tried), e.position, e.token
                )
                for e in edits
            ],
            lengths=torch.tensor([longest - start for start in starts]),
            first_tokens=torch.tensor([edit.token for edit in edits], device=policy.device),
            keep_states=True,
            keep_top=self._keep_top(policy),
        )
        judged = Prefix.cat([edit.search.current.reward_track.prefix_at(edit.position) for edit in edits])
        with setting.ledger.phase("accept"):
            tails = read(rollout, reward, judged, starts)
        for edit, tail in zip(edits, tails, strict=True):
            search = edit.search
            candidate = spliced(search.current, edit.position, tail)
            accepted = self._accept(edit, candidate, setting.beta)
            search.trace.append(self._traced(edit, candidate, accepted, setting))
            search.add(candidate, policy, setting.beta)
            search.current.done.add((edit.position, edit.token))
            if accepted:
                search.current = follow(search.current, edit.position, candidate)

    def _accept(self, edit: Proposed, candidate: Valued, beta: float) -> bool:
        current = edit.search.current
        if self.acceptance == "energy":
            return candidate.energy(beta) < current.energy(beta)
        length = edit.position + 1
        return candidate.prefix_energy(length, beta) < current.prefix_energy(length, beta)

    def _traced(self, edit: Proposed, candidate: Valued, accepted: bool, setting: Setting) -> Edit:
        current, at, policy, beta = edit.search.current, edit.position, setting.policy, setting.beta
        return Edit(
            at, policy.decode([int(current.ids[at])]), policy.decode([edit.token]), current.reward, candidate.reward,
            current.energy(beta), candidate.energy(beta), accepted, 0.0, float(current.entropy[at]), edit.score,
        )  # fmt: skip


def read(rollout: Rollout, reward: AbstractProcessReward, prefix: Prefix, starts: Sequence[int]) -> list[Valued]:
    """What was rolled out after `starts` completion tokens, as one pass of the reward model on top of `prefix` sees
    it."""
    scored = reward.score(prefix, rollout.ids, rollout.mask)
    values = reward.encoded_values(scored.encoded)
    assert rollout.encoded is not None
    assert rollout.entropy is not None and rollout.top_ids is not None and rollout.top_logps is not None
    tracks = zip(rollout.encoded.tracks(starts), scored.encoded.tracks(starts), strict=True)
    completions = []
    for row, (policy_track, reward_track) in enumerate(tracks):
        real = rollout.mask[row]
        logps = rollout.logps[row, real]
        odds = rollout.top_logps[row, real] - logps[:, None]
        completions.append(
            Valued(
                ids=rollout.ids[row, real],
                logps=logps,
                entropy=rollout.entropy[row, real],
                finished=bool(rollout.finished[row]),
                reward=float(scored.reward[row]),
                policy_track=policy_track,
                reward_track=reward_track,
                values=values[row, real],
                alternatives=rollout.top_ids[row, real],
                odds=odds,
                changes=torch.full_like(odds, torch.nan),
            )
        )
    return completions


def spliced(head: Valued, at: int, tail: Valued) -> Valued:
    """The completion that an edit at position `at` has led to, with what stays known of its beginning."""
    # at the edit itself the alternatives are the same ones, seen from another token
    tail.changes[0] = head.changes[at] + head.values[at] - tail.values[0]
    return Valued(
        ids=torch.cat([head.ids[:at], tail.ids]),
        logps=torch.cat([head.logps[:at], tail.logps]),
        entropy=torch.cat([head.entropy[:at], tail.entropy]),
        finished=tail.finished,
        reward=tail.reward,
        policy_track=head.policy_track.spliced(tail.policy_track),
        reward_track=head.reward_track.spliced(tail.reward_track),
        values=torch.cat([head.values[:at], tail.values]),
        alternatives=torch.cat([head.alternatives[:at], tail.alternatives]),
        odds=torch.cat([head.odds[:at], tail.odds]),
        changes=torch.cat([head.changes[:at], tail.changes]),
    )


def follow(old: Valued, at: int, new: Valued) -> Valued:
    """The completion to continue from after an accepted edit: edits of what has not changed stay tried."""
    new.done = {(i, v) for i, v in old.done if i <= at} | {(at, int(old.ids[at]))}
    return new
