"""Edit search: change one token of the current completion, roll the rest out afresh, keep what is better.

    y ← rollout from x
    repeat   score edits (i, v):  s = log π(v | x, y_<i) - log π(y_i | x, y_<i) + w ΔV_i(v) / β
             ỹ ← rollout from (x, y_<i, v) for the best edits not tried yet;  the judge reads it
             y ← the best accepted ỹ
    until    no edit promises a gain, or the budget is used up;  the answer is the completion of lowest energy tried

An edit leaves what stands before it alone and gives up what stands after it. What it is worth is therefore the change
of the tilted policy's log-odds at token i with the value V of the *prefix*, ΔV_i(v) = V(y_<i, v) - V(y_≤i), which no
suffix enters. Where ΔV comes from is the one argument `proposals`:

    policy      no ΔV at all: the policy's own alternatives, likeliest first (the gradient-free twin)
    value       exact, from one pass of the judge over the alternatives under a tree attention mask
    gradient    to first order, g_i[v] - g_i[y_i] with the own-token gradients g_i = ∂V_i/∂y_i of one backward
    random      random edits among the same alternatives; and `random_gradient`, a random direction for g_i

The judge says where the first error probably is, too: with q_i = min_{j≤i} σ(V(y_≤j)) the chance that all is right up
to token i, q_{i-1} - q_i is the chance that the first error is token i, and `min_drop` leaves out positions where that
is small. It costs nothing: the values come with the scoring of the completion.

Many problems go on side by side, each independent of the others; their judge passes and rollouts share batches. What
is known is never computed again: prefixes are cut out of what was encoded, and the scores of edits hold until an
earlier token changes.

Source: the loop is ∇-Reasoner's (arXiv 2603.04948, Algorithm 3) with the whole completion in view instead of one token
after the other; exact and first-order values of prefixes are this project's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Candidate,
    Decoded,
    Edit,
    Sampling,
    draw_rollouts,
    prefill,
    require_process_reward,
)
from nabla_rl.decoding.budget import Budget, Point, spent
from nabla_rl.functional.energy import compute_energy
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix, Track
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.rewards.base import AbstractProcessReward, AbstractReward
from nabla_rl.types import UserError

Proposals = Literal["policy", "value", "gradient", "random", "random_gradient"]
EditAcceptance = Literal["energy", "prefix"]
JUDGED: tuple[Proposals, ...] = ("value", "gradient", "random_gradient")
"""Proposals that a model call of the judge goes into."""


@dataclass
class _Search:
    """One problem on its way: the current completion and what is known about it, position by position."""

    problem: Problem
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
    index: int = 0  # of the current completion among those tried
    best: int = 0  # of the lowest energy among those tried
    converged: bool = False
    done: set[tuple[int, int]] = field(default_factory=set)  # edits of the current prefixes that were tried
    tried: list[Candidate] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    trace: list[Edit] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def drops(self) -> Tensor:
        """q_{i-1} - q_i, the chance that the first error is token i, (length,)."""
        right = torch.cat([self.values.new_ones(1), self.values.sigmoid()]).cummin(0).values
        return right[:-1] - right[1:]


@dataclass(frozen=True)
class _Proposed:
    """An edit that is being tried."""

    search: _Search
    position: int
    token: int
    score: float


@dataclass(frozen=True)
class EditSearch(AbstractDecoder):
    """Edits of the current completion, ranked by their worth to the tilted policy; see the module's text."""

    proposals: Proposals = "policy"
    """Where the change of the value comes from: policy (none: the twin), value (exact), gradient, or a control."""
    beta: float = 1.0
    """KL coefficient β = 1/λ of the energy -r/β - log π."""
    weight: float = 1.0
    """w, how far ΔV is trusted: 1 for exact values, less for a gradient that is not exact."""
    alternatives: int = 8
    """k, the policy's likeliest tokens that are considered at each position."""
    width: int = 1
    """Edits tried in one round, side by side."""
    max_rollouts: int = 16
    """Rollouts at most for each problem, the first one included."""
    min_entropy: float = 0.0
    """Positions at which the policy has less entropy (nats) are left alone."""
    min_drop: float = 0.0
    """Positions that hold the first error with a smaller probability, as the judge sees it, are left alone."""
    min_score: float | None = None
    """Edits that promise less are not tried; None: every edit is."""
    acceptance: EditAcceptance = "energy"
    """energy: the whole completion's energy must fall; prefix: that of the tokens up to and including the edit."""
    budget: Budget = field(default_factory=Budget)
    """When to stop at the latest."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    """How completions are drawn; greedy by default, as each prefix is rolled out once."""
    seed: int = 0
    """Of every random number."""
    name: str = "edit_search"

    def __post_init__(self) -> None:
        """Check the values in the spelling of the command line."""
        for name, low in (("alternatives", 1), ("width", 1), ("max_rollouts", 1), ("min_entropy", 0), ("min_drop", 0)):
            if self.__dict__[name] < low:
                raise UserError(f"{self.name}.{name}: expected at least {low}, found {self.__dict__[name]}.")

    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        judge = require_process_reward(self.name, reward)
        searches = self._start(problems, policy, judge, ledger)
        active = searches
        while active := [s for s in active if self._goes_on(s)]:
            self._look(active, judge, ledger)
            edits = [edit for search in active for edit in self._choose(search)]
            if edits:
                self._try(edits, policy, judge, ledger)
        return [self._finish(search, ledger, account) for account, search in enumerate(searches)]

    def _start(
        self, problems: Sequence[Problem], policy: Policy, judge: AbstractProcessReward, ledger: Ledger
    ) -> list[_Search]:
        prefix = prefill(problems, policy, ledger, self.sampling.max_new_tokens)
        rollout = draw_rollouts(
            problems, policy, prefix, self.sampling, n=1, seed=self.seed, keep_encoded=True, keep_entropy=True,
            keep_top=min(self.alternatives, policy.vocab_size),
        )  # fmt: skip
        judged = judge.prefill([p.problem for p in problems], torch.arange(len(problems)), ledger)
        with ledger.phase("score"):
            rewards, values, tracks = read(judge, judged, rollout.ids, rollout.mask, [0] * len(problems))
        assert rollout.encoded is not None
        searches = []
        for row, (problem, track) in enumerate(
            zip(problems, rollout.encoded.tracks([0] * len(problems)), strict=True)
        ):
            parts = per_token(rollout, row)
            search = _Search(
                problem, *parts[:3], values[row], *parts[3:], torch.full_like(parts[4], torch.nan),
                bool(rollout.finished[row]), float(rewards[row]), track, tracks[row],
            )  # fmt: skip
            self._note(search, search, policy)
            search.curve.append(spent(ledger, row, rollouts=1, chosen=0))
            searches.append(search)
        return searches

    def _goes_on(self, search: _Search) -> bool:
        return not search.converged and len(search.tried) < self.max_rollouts and self.budget.allows(search.curve[-1])

    def _open(self, search: _Search) -> Tensor:
        """The positions at which edits are considered, (length,)."""
        return (search.entropy >= self.min_entropy) & (search.drops() >= self.min_drop)

    def _look(self, searches: Sequence[_Search], judge: AbstractProcessReward, ledger: Ledger) -> None:
        """Fill in ΔV where it is wanted and not known: one pass of the judge (and one back) for all problems."""
        if self.proposals not in JUDGED:
            return
        wanted = [(self._open(s) & s.changes[:, 0].isnan()).nonzero().squeeze(-1) for s in searches]
        asking = [(s, at) for s, at in zip(searches, wanted, strict=True) if len(at)]
        if not asking:
            return
        tracks = [s.reward_track for s, _ in asking]
        positions = pad_sequence([at for _, at in asking], batch_first=True)
        mask = pad_sequence([torch.ones_like(at, dtype=torch.bool) for _, at in asking], batch_first=True)
        current = pad_sequence([s.ids[at] for s, at in asking], batch_first=True)
        others = pad_sequence([s.alternatives[at] for s, at in asking], batch_first=True)
        with ledger.phase("probe"):
            if self.proposals == "value":
                k = others.shape[-1]
                values = judge.fork_values(
                    tracks, positions.repeat_interleave(k, 1), others.flatten(1), mask.repeat_interleave(k, 1)
                ).view_as(others)
                before = pad_sequence([s.values[at] for s, at in asking], batch_first=True)
                changes = values - before[..., None]
            else:
                changes = judge.fork_changes(tracks, positions, current, mask, others)
        for row, (search, at) in enumerate(asking):
            found = changes[row, : len(at)].to(search.changes)
            if self.proposals == "random_gradient":
                found = shuffled(found, seeded_generator(self.seed, search.problem.id, "shuffle", len(search.tried)))
            search.changes[at] = found
            search.counts["probes"] += 1
            search.counts["probed_positions"] += len(at)

    def _scores(self, search: _Search) -> Tensor:
        """s of every edit, (length, k); -inf where it is not considered."""
        if self.proposals == "random":
            generator = seeded_generator(self.seed, search.problem.id, "edits", len(search.tried))
            scores = torch.rand(search.odds.shape, generator=generator).to(search.odds)
        elif self.proposals == "policy":
            scores = search.odds
        else:
            scores = search.odds + self.weight / self.beta * search.changes
        out = (search.alternatives == search.ids[:, None]) | ~self._open(search)[:, None]
        return scores.masked_fill(out, -torch.inf).nan_to_num(nan=-torch.inf, neginf=-torch.inf)

    def _choose(self, search: _Search) -> list[_Proposed]:
        """The best edits that were not tried yet; none means that the search has converged."""
        scores = self._scores(search)
        for position, token in search.done:
            scores[position] = scores[position].masked_fill(search.alternatives[position] == token, -torch.inf)
        k, chosen = scores.shape[1], []
        for flat in scores.flatten().argsort(descending=True, stable=True)[: self.width].tolist():
            score = float(scores.view(-1)[flat])
            if score == -torch.inf or (self.min_score is not None and score < self.min_score):
                break
            position = flat // k
            chosen.append(_Proposed(search, position, int(search.alternatives[position, flat % k]), score))
        search.converged = not chosen
        return chosen

    def _try(self, edits: list[_Proposed], policy: Policy, judge: AbstractProcessReward, ledger: Ledger) -> None:
        """Roll out from each edit, let the judge read what is new, and keep the best of what is accepted."""
        starts = [edit.position for edit in edits]
        rollout = policy.rollout(
            Prefix.cat([edit.search.policy_track.prefix_at(edit.position) for edit in edits]),
            generators=[self._generator(edit) for edit in edits],
            max_new_tokens=self.sampling.max_new_tokens - min(starts),
            temperature=self.sampling.temperature, top_p=self.sampling.top_p, keep_encoded=True, keep_entropy=True,
            keep_top=edits[0].search.alternatives.shape[1],
            first_tokens=torch.tensor([edit.token for edit in edits], device=policy.device),
            budgets=torch.tensor([self.sampling.max_new_tokens - start for start in starts]),
        )  # fmt: skip
        judged = Prefix.cat([edit.search.reward_track.prefix_at(edit.position) for edit in edits])
        with ledger.phase("accept"):
            rewards, values, tracks = read(judge, judged, rollout.ids, rollout.mask, starts)
        assert rollout.encoded is not None
        policy_tracks, results = rollout.encoded.tracks(starts), {}
        for row, edit in enumerate(edits):
            candidate = spliced(edit, rollout, row, values[row], float(rewards[row]), policy_tracks[row], tracks[row])
            accepted = self._accept(edit, candidate)
            self._note(edit.search, candidate, policy)
            edit.search.done.add((edit.position, edit.token))
            edit.search.trace.append(self._traced(edit, candidate, accepted, policy))
            known, mine = results.get(edit.search.problem.id), (edit, candidate) if accepted else None
            if known is None or (mine is not None and (known[1] is None or self._beats(candidate, known[1][1]))):
                results[edit.search.problem.id] = (edit.search, mine)
        for search, chosen in results.values():
            if chosen is not None:
                replace_current(search, *chosen)
            account = search.policy_track.problem
            search.curve.append(spent(ledger, account, rollouts=len(search.tried), chosen=search.best))

    def _generator(self, edit: _Proposed) -> torch.Generator:
        return seeded_generator(
            self.seed, edit.search.problem.id, "rollout", len(edit.search.tried), edit.position, edit.token
        )

    def _energy(self, search: _Search) -> float:
        return float(compute_energy(search.logps.double().sum(), torch.tensor(search.reward).double(), self.beta))

    def _prefix_energy(self, search: _Search, length: int) -> float:
        """-V(y_≤i)/β - log π(y_≤i) of the first `length` tokens."""
        return float(-search.values[length - 1] / self.beta - search.logps[:length].double().sum())

    def _accept(self, edit: _Proposed, candidate: _Search) -> bool:
        if self.acceptance == "energy":
            return self._energy(candidate) < self._energy(edit.search)
        length = edit.position + 1
        return self._prefix_energy(candidate, length) < self._prefix_energy(edit.search, length)

    def _beats(self, candidate: _Search, other: _Search) -> bool:
        """Of several accepted edits of a round, the completion of lowest energy is kept."""
        return self._energy(candidate) < self._energy(other)

    def _note(self, search: _Search, candidate: _Search, policy: Policy) -> None:
        """Write a completion down among those tried."""
        ids, energy = tuple(candidate.ids.tolist()), self._energy(candidate)
        candidate.index = len(search.tried)
        search.tried.append(
            Candidate(policy.decode(ids), ids, float(candidate.logps.double().sum()), candidate.reward)
        )
        search.energies.append(energy)
        search.ended.append(candidate.finished)
        if energy < search.energies[search.best]:
            search.best = candidate.index

    def _traced(self, edit: _Proposed, candidate: _Search, accepted: bool, policy: Policy) -> Edit:
        search, at = edit.search, edit.position
        return Edit(
            at, policy.decode([int(search.ids[at])]), policy.decode([edit.token]), search.reward, candidate.reward,
            self._energy(search), self._energy(candidate), accepted, 0.0, float(search.entropy[at]), edit.score,
        )  # fmt: skip

    def _finish(self, search: _Search, ledger: Ledger, account: int) -> Decoded:
        best = search.tried[search.best]
        end = spent(ledger, account, rollouts=len(search.tried), chosen=search.best)
        if end.flops > search.curve[-1].flops:  # a last look that led to nothing costs, too
            search.curve.append(end)
        return Decoded(
            search.problem.id, best.text, best.ids, search.ended[search.best], best.logps, best.reward, search.tried,
            search.trace, len(search.trace), sum(edit.accepted for edit in search.trace), dict(search.counts),
            search.curve,
        )  # fmt: skip


def read(
    judge: AbstractProcessReward, prefix: Prefix, ids: Tensor, mask: Tensor, starts: Sequence[int]
) -> tuple[Tensor, list[Tensor], list[Track]]:
    """What one pass of the judge says of completions: rewards (batch,), values and encodings of each without
    padding."""
    scored = judge.score(prefix, ids, mask)
    values = judge.encoded_values(scored.encoded)
    return scored.reward, [v[m] for v, m in zip(values, mask, strict=True)], scored.encoded.tracks(starts)


def per_token(rollout: Rollout, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, log π, entropy, the likeliest tokens and their log-odds against the token that stands there."""
    real = rollout.mask[row]
    assert rollout.entropy is not None and rollout.top_ids is not None and rollout.top_logps is not None
    logps = rollout.logps[row, real]
    odds = rollout.top_logps[row, real] - logps[:, None]
    return rollout.ids[row, real], logps, rollout.entropy[row, real], rollout.top_ids[row, real], odds


def spliced(
    edit: _Proposed,
    rollout: Rollout,
    row: int,
    values: Tensor,
    reward: float,
    policy_track: Track,
    reward_track: Track,
) -> _Search:
    """The completion that an edit has led to, with what stays known of its beginning."""
    search, at = edit.search, edit.position
    ids, logps, entropy, alternatives, odds = per_token(rollout, row)
    changes = torch.full_like(odds, torch.nan)
    # at the edit itself the alternatives are the same ones, seen from another token
    changes[0] = search.changes[at] + search.values[at] - values[0]
    return replace(
        search,
        ids=torch.cat([search.ids[:at], ids]),
        logps=torch.cat([search.logps[:at], logps]),
        entropy=torch.cat([search.entropy[:at], entropy]),
        values=torch.cat([search.values[:at], values]),
        alternatives=torch.cat([search.alternatives[:at], alternatives]),
        odds=torch.cat([search.odds[:at], odds]),
        changes=torch.cat([search.changes[:at], changes]),
        finished=bool(rollout.finished[row]),
        reward=reward,
        policy_track=search.policy_track.spliced(policy_track),
        reward_track=search.reward_track.spliced(reward_track),
    )


REPLACED = (
    "ids", "logps", "entropy", "values", "alternatives", "odds", "changes", "finished", "reward", "policy_track",
    "reward_track", "index",
)  # fmt: skip
"""What an accepted edit replaces."""


def replace_current(search: _Search, edit: _Proposed, candidate: _Search) -> None:
    """Go on from the candidate; edits of what has not changed stay tried."""
    old = int(search.ids[edit.position])
    search.done = {(at, token) for at, token in search.done if at <= edit.position} | {(edit.position, old)}
    for name in REPLACED:
        setattr(search, name, getattr(candidate, name))


def shuffled(changes: Tensor, generator: torch.Generator) -> Tensor:
    """The same changes at the same positions with their tokens at random: a control of direction, not of size."""
    order = torch.rand(changes.shape, generator=generator).argsort(-1).to(changes.device)
    return changes.gather(-1, order)
