"""Beam search guided by a process reward: what Tree-of-Thought does with a value model in the place of its prompts.

    B ← {the empty completion}
    repeat   C ← the extensions of each y in B by one step (a token, or a line)
             B ← the `width` of C with the lowest  -log π(y_≤i | x) - V(x, y_≤i)/β;  those that have ended leave B
    until    `width` completions have ended;  the answer is the one of lowest energy -log π(y|x) - r(x, y)/β

(Yao et al., 2023, arXiv 2305.10601, Algorithm 2; Xie et al., 2023, arXiv 2305.00633, for the weighing of likelihood
and judge.) V is the judge's value of what has been written so far. At the end it is r, so the score of a partial
completion is the energy that it would have if it ended there.

A step of one token: each beam proposes its likeliest tokens. A step of a line: each beam samples continuations up to
the line break, and equal ones count once. The beams of all problems advance side by side. Keys and values of both
models are extended by what is new and cut where beams part; no token is read twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.budget import Point, spent
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Candidate,
    Decoded,
    Setting,
    decoded,
    prefill,
    prefill_reward,
    require_process_reward,
)
from nabla_rl.decoding.steps import line_ends
from nabla_rl.functional.energy import compute_energy
from nabla_rl.functional.logps import log_softmax
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.base import AbstractProcessReward, last_valid

Score = Literal["energy", "reward"]
BeamStep = Literal["token", "line"]


@dataclass
class _Found:
    """The completions of one problem that have ended."""

    problem: Problem
    tried: list[Candidate] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    @property
    def chosen(self) -> int:
        return min(range(len(self.scores)), key=self.scores.__getitem__)


@dataclass
class _Beam:
    """A partial completion of problem `account`."""

    account: int
    ids: tuple[int, ...]
    logps: float


@dataclass
class _Beams:
    """The live beams of all problems, best first within each, and what the models have read of them."""

    rows: list[_Beam]
    policy: Prefix
    judge: Prefix


@dataclass
class _Extensions:
    """Beams that are one step longer.

    Attributes:
        parents: which beam each goes on from.
        rows: the longer beams.
        read: the policy's prefix of each without its last token, at row `at[i]` for extension i.
        at: see `read`.
    """

    parents: list[int]
    rows: list[_Beam]
    read: Prefix
    at: list[int]


@dataclass(frozen=True)
class BeamSearch(AbstractDecoder):
    """Beam search by log π(y_≤i) + V(y_≤i)/β.

    A step of the budget is one step of all of a problem's beams; what comes before the first completion has ended
    counts as one step, as there is no answer before it.
    """

    width: int = 4
    """Number of beams kept, and of completions at the end."""
    expand: int = 4
    """Number of candidates that each beam proposes."""
    step: BeamStep = "line"
    """Unit of a step: line (sampled up to a line break) or token (the likeliest next ones)."""
    step_tokens: int = 24
    """Maximum tokens of a line."""
    score: Score = "energy"
    """What ranks beams: energy (-log π - V/β) or reward (the prefix value alone)."""

    name: ClassVar[str] = "beam"

    def __post_init__(self) -> None:
        """Check the values."""
        self.check(width=1, expand=1, step_tokens=1)

    def is_deterministic(self, sampling: Sampling) -> bool:
        return self.step == "token" or sampling.temperature == 0

    @torch.no_grad()
    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        judge, policy = require_process_reward(self.name, setting.reward), setting.policy
        prefix, judged = prefill(problems, setting), prefill_reward(problems, judge, setting.ledger)
        found = [_Found(problem) for problem in problems]
        beams, depth = _Beams([_Beam(account, (), 0.0) for account in range(len(problems))], prefix, judged), 0
        while beams.rows:
            extensions = (
                self._tokens(beams, policy) if self.step == "token" else self._lines(beams, setting, found, depth)
            )
            beams = self._advance(beams, extensions, setting, judge, found)
            depth += 1
        results = []
        for one in found:
            result = decoded(one.problem, one.chosen, one.tried, one.finished[one.chosen], one.curve)
            result.counts = dict(one.counts)
            results.append(result)
        return results

    def _tokens(self, beams: _Beams, policy: Policy) -> _Extensions:
        """Each beam with each of its likeliest next tokens."""
        log_probs = log_softmax(policy.next_logits(beams.policy))
        policy.backbone.record_head(beams.policy, torch.ones(len(beams.rows), dtype=torch.int64))
        best = log_probs.topk(min(self.expand, log_probs.shape[-1]))
        parents, rows = [], []
        for index, (beam, tokens, logps) in enumerate(
            zip(beams.rows, best.indices.tolist(), best.values.tolist(), strict=True)
        ):
            for token, logp in zip(tokens, logps, strict=True):
                parents.append(index)
                rows.append(_Beam(beam.account, (*beam.ids, token), beam.logps + logp))
        return _Extensions(parents, rows, beams.policy, parents)

    def _lines(self, beams: _Beams, setting: Setting, found: list[_Found], depth: int) -> _Extensions:
        """Each beam with each of its sampled next lines, equal ones once."""
        policy, longest = setting.policy, setting.sampling.length
        parents = [index for index in range(len(beams.rows)) for _ in range(self.expand)]
        first = {beam.account: index for index, beam in reversed(list(enumerate(beams.rows)))}
        generators = []
        for draw, index in enumerate(parents):
            account = beams.rows[index].account
            key = (found[account].problem.id, "beam", depth, index - first[account], draw % self.expand)
            generators.append(seeded_generator(setting.seed, *key))
        room = torch.tensor([longest - len(beams.rows[index].ids) for index in parents])
        room = room.clamp(max=self.step_tokens)
        rollout = policy.rollout(
            beams.policy.select(torch.tensor(parents, device=policy.device)), setting.sampling, generators,
            lengths=room, keep_states=True,
            stops=torch.tensor(sorted(line_ends(policy.tokenizer)), dtype=torch.int64, device=policy.device),
        )  # fmt: skip
        assert rollout.encoded is not None
        rows, kept, seen = [], [], set()
        for draw, (index, logp) in enumerate(zip(parents, rollout.logps.double().sum(-1).tolist(), strict=True)):
            beam, line = beams.rows[index], tuple(rollout.ids[draw, rollout.mask[draw]].tolist())
            longer = _Beam(beam.account, beam.ids + line, beam.logps + logp)
            if (longer.account, longer.ids) not in seen:
                seen.add((longer.account, longer.ids))
                rows.append(longer)
                kept.append(draw)
        return _Extensions(
            [parents[draw] for draw in kept], rows, rollout.encoded.prefix_at(rollout.mask.sum(-1) - 1), kept
        )

    def _advance(
        self,
        beams: _Beams,
        extensions: _Extensions,
        setting: Setting,
        judge: AbstractProcessReward,
        found: list[_Found],
    ) -> _Beams:
        """Judge the extensions, keep the best of each problem, and put what has ended aside."""
        policy, ledger, longest = setting.policy, setting.ledger, setting.sampling.length
        device, rows = policy.device, extensions.rows
        parents = [beams.rows[index] for index in extensions.parents]
        steps = [
            torch.tensor(row.ids[len(parent.ids) :], device=device) for row, parent in zip(rows, parents, strict=True)
        ]
        lengths = torch.tensor([len(step) for step in steps], device=device)
        ids = pad_sequence(steps, batch_first=True)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        with ledger.phase("score"):
            before = beams.judge.select(torch.tensor(extensions.parents, device=device))
            encoded = judge.read(before, ids, mask)
            values = judge.encoded_values(encoded).gather(-1, last_valid(mask)[:, None]).squeeze(-1)
        after = encoded.prefix_at(lengths)
        scores = self._scores(rows, values, setting.beta)
        accounts = sorted({row.account for row in rows})
        kept: list[int] = []
        for account in accounts:
            mine = [index for index, row in enumerate(rows) if row.account == account]
            found[account].counts["judged"] += len(mine)
            found[account].counts["steps"] += 1
            mine.sort(key=scores.__getitem__)
            kept += mine[: self.width - len(found[account].tried)]
        ends = set(policy.get_buffer("eos_ids").tolist())
        over = [i for i in kept if rows[i].ids[-1] in ends or len(rows[i].ids) == longest]
        if over:
            self._finish(
                [rows[i] for i in over], after.select(torch.tensor(over, device=device)), setting, judge, found, ends
            )
        for account in accounts:
            one = found[account]
            if one.tried:
                one.curve.append(spent(ledger, account, rollouts=len(one.tried), chosen=one.chosen))
        used_up = {a for a in accounts if found[a].tried and not setting.budget.allows(found[a].curve[-1])}
        live = [i for i in kept if i not in set(over) and rows[i].account not in used_up]
        if not live:
            return _Beams([], after, after)
        read = extensions.read.select(torch.tensor([extensions.at[i] for i in live], device=device))
        last = torch.tensor([[rows[i].ids[-1]] for i in live], device=device)
        fed = policy.backbone.encode(read, last, torch.ones_like(last, dtype=torch.bool))
        whole = fed.prefix_at(torch.ones_like(last[:, 0]))
        return _Beams([rows[i] for i in live], whole, after.select(torch.tensor(live, device=device)))

    def _finish(
        self,
        rows: list[_Beam],
        read: Prefix,
        setting: Setting,
        judge: AbstractProcessReward,
        found: list[_Found],
        ends: set[int],
    ) -> None:
        """The outcome reward of beams that have ended, on top of what the judge has read of them."""
        policy = setting.policy
        nothing = torch.zeros(len(rows), 0, dtype=torch.int64, device=policy.device)
        with read.ledger.phase("score"):
            rewards = judge.score(read, nothing, nothing.bool()).reward
        for beam, reward, score in zip(rows, rewards.tolist(), self._scores(rows, rewards, setting.beta), strict=True):
            one = found[beam.account]
            one.tried.append(Candidate(policy.decode(beam.ids), beam.ids, beam.logps, reward))
            one.finished.append(beam.ids[-1] in ends)
            one.scores.append(score)

    def _scores(self, rows: Sequence[_Beam], values: Tensor, beta: float) -> list[float]:
        """What decides between beams: lower is better."""
        if self.score == "reward":
            return (-values.double()).tolist()
        logps = torch.tensor([row.logps for row in rows], dtype=torch.float64, device=values.device)
        return compute_energy(logps, values.double(), beta).tolist()
