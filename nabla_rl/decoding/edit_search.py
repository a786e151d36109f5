"""Edit search: change one token of the current completion, roll the rest out afresh, keep what is better.

    y ← rollout from x, or the best of several
    repeat   score edits (i, v):  s = log π(v | x, y_<i) - log π(y_i | x, y_<i) + w ΔV_i(v) / β
             ỹ ← rollout from (x, y_<i, v) for the best edits not tried yet;  the judge reads it
             y ← the best accepted ỹ, or a fresh rollout from x where no edit promises a gain and restarts are left
    until    no edit promises a gain, the judge is sure, or the budget is used up
    answer   the completion of lowest energy of all that were tried

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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Decoded,
    Edit,
    Sampling,
    draw_rollouts,
    prefill,
    require_process_reward,
)
from nabla_rl.decoding.budget import Budget
from nabla_rl.decoding.edit_state import Completion, Search, follow, read, spliced
from nabla_rl.functional.relaxation import sample_gumbel
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractProcessReward, AbstractReward
from nabla_rl.types import UserError

Proposals = Literal["policy", "value", "gradient", "random", "random_gradient"]
EditAcceptance = Literal["energy", "prefix"]
JUDGED: tuple[Proposals, ...] = ("value", "gradient", "random_gradient")
"""Proposals that a model call of the judge goes into."""


@dataclass(frozen=True)
class _Proposed:
    """An edit that is being tried."""

    search: Search
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
    starts: int = 1
    """Completions drawn before the first edit; the search begins from the one of lowest energy."""
    restarts: int = 0
    """How often at most a search that has converged begins anew, from as many completions as the first time."""
    start_temperature: float = 1.0
    """Of the completions drawn for that, but for the very first, which is drawn like every other rollout."""
    stop_at: float | None = None
    """No further step once the judge gives the answer this probability of being right; None: no such stop."""
    edit_temperature: float = 0.0
    """T of edits drawn with probability ∝ exp(s/T), in place of the best ones, which are its limit 0."""
    budget: Budget = field(default_factory=Budget)
    """When to stop at the latest."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    """How completions are drawn; greedy by default, as each prefix is rolled out once."""
    seed: int = 0
    """Of every random number."""
    name: str = "edit_search"

    def __post_init__(self) -> None:
        """Check the values in the spelling of the command line."""
        least = {"alternatives": 1, "width": 1, "max_rollouts": 1, "min_entropy": 0, "min_drop": 0, "starts": 1,
                 "restarts": 0, "edit_temperature": 0}  # fmt: skip
        for name, low in least.items():
            if not self.__dict__[name] >= low:
                raise UserError(f"{self.name}.{name}: expected at least {low}, found {self.__dict__[name]}.")
        if not self.start_temperature > 0:
            raise UserError(
                f"{self.name}.start_temperature: expected a positive number, found {self.start_temperature}: all "
                "starts would be the same one. Use 1."
            )
        if self.stop_at is not None and not 0 < self.stop_at <= 1:
            raise UserError(
                f"{self.name}.stop_at: expected a probability in (0, 1], or null for no such stop, found "
                f"{self.stop_at}."
            )

    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        judge = require_process_reward(self.name, reward)
        searches = self._start(problems, policy, judge, ledger)
        active = searches
        while active := [s for s in active if self._goes_on(s)]:
            waiting, editing = [s for s in active if s.fresh], [s for s in active if not s.fresh]
            if waiting:
                self._begin(waiting, policy, judge, ledger)
            self._look(editing, judge, ledger)
            edits = [edit for search in editing for edit in self._choose(search)]
            if edits:
                self._try(edits, policy, judge, ledger)
            for search in active:
                search.mark(ledger)
        return [search.answer() for search in searches]

    def _start(
        self, problems: Sequence[Problem], policy: Policy, judge: AbstractProcessReward, ledger: Ledger
    ) -> list[Search]:
        """Each problem's first completion; further starts are a step of their own."""
        prefix = prefill(problems, policy, ledger, self.sampling.max_new_tokens)
        rollout = draw_rollouts(
            problems, policy, prefix, self.sampling, n=1, seed=self.seed, keep_encoded=True, keep_entropy=True,
            keep_top=min(self.alternatives, policy.vocab_size),
        )  # fmt: skip
        judged = judge.prefill([p.problem for p in problems], torch.arange(len(problems)), ledger)
        with ledger.phase("score"):
            firsts = read(rollout, judge, judged, [0] * len(problems))
        searches = []
        for account, (problem, first) in enumerate(zip(problems, firsts, strict=True)):
            search = Search(problem, account, first, fresh=self.starts - 1)
            search.note(first, policy, self.beta)
            search.mark(ledger)
            searches.append(search)
        return searches

    def _goes_on(self, search: Search) -> bool:
        sure = self.stop_at is not None and search.chances[search.best] >= self.stop_at
        return (
            not sure
            and (search.fresh > 0 or not search.converged)
            and len(search.tried) < self.max_rollouts
            and self.budget.allows(search.curve[-1])
        )

    def _begin(self, searches: Sequence[Search], policy: Policy, judge: AbstractProcessReward, ledger: Ledger) -> None:
        """Draw the completions that searches wait for, side by side; each goes on from the one of lowest energy, the
        current one among them unless it has converged."""
        fresh = [min(s.fresh, self.max_rollouts - len(s.tried)) for s in searches]
        draws = [(s, len(s.tried) + j) for s, n in zip(searches, fresh, strict=True) for j in range(n)]
        rollout = policy.rollout(
            Prefix.cat([s.current.policy_track.prefix_at(0) for s, _ in draws]),
            generators=[seeded_generator(self.seed, s.problem.id, "rollout", number) for s, number in draws],
            max_new_tokens=self.sampling.max_new_tokens, temperature=self.start_temperature,
            top_p=self.sampling.top_p, keep_encoded=True, keep_entropy=True,
            keep_top=min(self.alternatives, policy.vocab_size),
        )  # fmt: skip
        judged = Prefix.cat([s.current.reward_track.prefix_at(0) for s, _ in draws])
        with ledger.phase("score"):
            completions = read(rollout, judge, judged, [0] * len(draws))
        for (search, _), completion in zip(draws, completions, strict=True):
            search.note(completion, policy, self.beta)
            search.counts["fresh_rollouts"] += 1
            if search.converged or completion.energy(self.beta) < search.current.energy(self.beta):
                search.current, search.converged = completion, False
        for search in searches:
            search.fresh = 0

    def _open(self, completion: Completion) -> Tensor:
        """The positions at which edits are considered, (length,)."""
        return (completion.entropy >= self.min_entropy) & (completion.drops() >= self.min_drop)

    def _look(self, searches: Sequence[Search], judge: AbstractProcessReward, ledger: Ledger) -> None:
        """Fill in ΔV where it is wanted and not known: one pass of the judge (and one back) for all problems."""
        if self.proposals not in JUDGED:
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
        with ledger.phase("probe"):
            if self.proposals == "value":
                k = others.shape[-1]
                values = judge.fork_values(
                    tracks, positions.repeat_interleave(k, 1), others.flatten(1), mask.repeat_interleave(k, 1)
                ).view_as(others)
                before = pad_sequence([known.values[at] for _, known, at in asking], batch_first=True)
                changes = values - before[..., None]
            else:
                changes = judge.fork_changes(tracks, positions, current, mask, others)
        for row, (search, known, at) in enumerate(asking):
            found = changes[row, : len(at)].to(known.changes)
            if self.proposals == "random_gradient":
                found = shuffled(found, seeded_generator(self.seed, search.problem.id, "shuffle", len(search.tried)))
            known.changes[at] = found
            search.counts["probes"] += 1
            search.counts["probed_positions"] += len(at)

    def _scores(self, search: Search) -> Tensor:
        """s of every edit, (length, k); -inf where it is not considered."""
        known = search.current
        if self.proposals == "random":
            generator = seeded_generator(self.seed, search.problem.id, "edits", len(search.tried))
            scores = torch.rand(known.odds.shape, generator=generator).to(known.odds)
        elif self.proposals == "policy":
            scores = known.odds
        else:
            scores = known.odds + self.weight / self.beta * known.changes
        out = (known.alternatives == known.ids[:, None]) | ~self._open(known)[:, None]
        scores = scores.masked_fill(out, -torch.inf).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        for position, token in known.done:
            scores[position] = scores[position].masked_fill(known.alternatives[position] == token, -torch.inf)
        return scores if self.min_score is None else scores.masked_fill(scores < self.min_score, -torch.inf)

    def _choose(self, search: Search) -> list[_Proposed]:
        """Edits that were not tried yet, the best ones or drawn; none means that the search has converged, and begins
        anew where it may."""
        scores = self._scores(search)
        ranks = scores.flatten()
        if self.edit_temperature > 0:
            # the largest of s/T + Gumbel noise are draws from softmax(s/T) without replacement
            generator = seeded_generator(self.seed, search.problem.id, "gibbs", len(search.tried))
            ranks = ranks / self.edit_temperature + sample_gumbel(ranks.shape, generator).to(ranks)
        room = min(self.width, self.max_rollouts - len(search.tried))
        chosen = []
        for flat in ranks.argsort(descending=True, stable=True)[:room].tolist():
            position, choice = divmod(flat, scores.shape[1])
            score = float(scores[position, choice])
            if score == -torch.inf:
                break
            token = int(search.current.alternatives[position, choice])
            chosen.append(_Proposed(search, position, token, score))
        search.converged = not chosen
        if search.converged and search.counts["restarts"] < self.restarts:
            search.counts["restarts"] += 1
            search.fresh = self.starts
        return chosen

    def _try(self, edits: list[_Proposed], policy: Policy, judge: AbstractProcessReward, ledger: Ledger) -> None:
        """Roll out from each edit, let the judge read what is new, and keep the best of what is accepted."""
        starts = [edit.position for edit in edits]
        rollout = policy.rollout(
            Prefix.cat([edit.search.current.policy_track.prefix_at(edit.position) for edit in edits]),
            generators=[self._generator(edit) for edit in edits],
            max_new_tokens=self.sampling.max_new_tokens - min(starts),
            temperature=self.sampling.temperature, top_p=self.sampling.top_p, keep_encoded=True, keep_entropy=True,
            keep_top=min(self.alternatives, policy.vocab_size),
            first_tokens=torch.tensor([edit.token for edit in edits], device=policy.device),
            budgets=torch.tensor([self.sampling.max_new_tokens - start for start in starts]),
        )  # fmt: skip
        judged = Prefix.cat([edit.search.current.reward_track.prefix_at(edit.position) for edit in edits])
        with ledger.phase("accept"):
            tails = read(rollout, judge, judged, starts)
        kept: dict[int, tuple[_Proposed, Completion]] = {}
        for edit, tail in zip(edits, tails, strict=True):
            search = edit.search
            candidate = spliced(search.current, edit.position, tail)
            accepted = self._accept(edit, candidate)
            search.trace.append(self._traced(edit, candidate, accepted, policy))
            search.note(candidate, policy, self.beta)
            search.current.done.add((edit.position, edit.token))
            rival = kept.get(search.account)
            if accepted and (rival is None or candidate.energy(self.beta) < rival[1].energy(self.beta)):
                kept[search.account] = (edit, candidate)
        for edit, candidate in kept.values():
            edit.search.current = follow(edit.search.current, edit.position, candidate)

    def _generator(self, edit: _Proposed) -> torch.Generator:
        return seeded_generator(
            self.seed, edit.search.problem.id, "rollout", len(edit.search.tried), edit.position, edit.token
        )

    def _accept(self, edit: _Proposed, candidate: Completion) -> bool:
        current = edit.search.current
        if self.acceptance == "energy":
            return candidate.energy(self.beta) < current.energy(self.beta)
        length = edit.position + 1
        return candidate.prefix_energy(length, self.beta) < current.prefix_energy(length, self.beta)

    def _traced(self, edit: _Proposed, candidate: Completion, accepted: bool, policy: Policy) -> Edit:
        current, at = edit.search.current, edit.position
        return Edit(
            at, policy.decode([int(current.ids[at])]), policy.decode([edit.token]), current.reward, candidate.reward,
            current.energy(self.beta), candidate.energy(self.beta), accepted, 0.0, float(current.entropy[at]),
            edit.score,
        )  # fmt: skip


def shuffled(changes: Tensor, generator: torch.Generator) -> Tensor:
    """The same changes at the same positions with their tokens at random: a control of direction, not of size."""
    order = torch.rand(changes.shape, generator=generator).argsort(-1).to(changes.device)
    return changes.gather(-1, order)
