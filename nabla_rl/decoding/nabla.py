"""∇-Reasoner: gradient descent on the current completion proposes its next token; a rollout and an acceptance rule
decide.

    y, z ← rollout from x, with its logits
    repeat   skip positions that the selector does not pick (they keep their token)
             z̃ ← DTO(x, z) over the rest of the completion;  ỹ_1 ~ softmax(z̃_1 / τ_resample)
             if ỹ_1 ≠ y_1:  ỹ ← rollout from (x, ỹ_1);  if it is accepted:  y, z ← ỹ and its logits
             commit y_1
    until    the completion ends, or max_rollouts are used (the rest is committed as it stands)

Published is one sweep over the completion; with `sweeps` > 1 the loop starts again at the first token while rollouts
are left.

(∇-Reasoner, arXiv 2603.04948, Algorithms 1 and 3.) Many problems advance side by side, one position of each at a
time, and each is independent of the others. What is known is never computed again: the prefix grows without being
re-encoded, an unchanged or rejected token keeps its rollout and logits, and the gradient at the current completion
serves every position until the completion changes (the gradient of token i does not depend on where the prefix is
said to end).

Where this differs from the released code: DTO starts at the sampled rollout and not at the argmax of its logits (a
constant offset makes the sampled token the largest); current and proposed completion are scored alike; the
acceptance rate is over proposals; every model call is booked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl import dto
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.acceptance import RULES, Acceptance, Standing
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Decoded,
    Edit,
    Setting,
    draw_rollouts,
    prefill,
    require_reward,
    score_rollouts,
)
from nabla_rl.decoding.probing import Relaxed, Walk, objective_of, probe, start_at
from nabla_rl.dto import DTOConfig
from nabla_rl.functional.kl import reverse_kl
from nabla_rl.functional.logps import categorical_from_uniform, selective_log_softmax, top_p_filter
from nabla_rl.functional.relaxation import sample_gumbel
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.backbone import Prefix, Track
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.types import UserError

ONE_STEP = DTOConfig(
    num_steps=1,
    step_size=0.3,
    final_step_size=0.03,
    schedule="constant",
    optimizer="sgd",
    weight_decay=0.0,
)
"""One plain gradient step, chosen on validation; DTOConfig's own defaults are the published settings."""


@dataclass(frozen=True)
class Nabla(AbstractDecoder):
    """∇-Reasoner: DTO proposes the next token, a rollout and an acceptance rule decide."""

    dto: DTOConfig = field(default_factory=lambda: ONE_STEP)
    """The optimisation of logits (DTO); its β is the shared one."""
    acceptance: Acceptance = "energy"
    """Acceptance rule: lower energy, higher reward (as published), or a metropolis test."""
    max_rollouts: int = 8
    """Maximum number of rollouts for each problem, the first included (N_max)."""
    sweeps: int = 8
    """Maximum number of passes over the completion; published is 1."""
    min_entropy: float = 0.05
    """Least entropy in nats of a position that is visited."""
    min_gradient_norm: float = 0.0
    """Least norm of ∂L/∂y at a position that is visited; 0 switches the test off."""
    resample_temperature: float = 1.0
    """Temperature of the draw from the optimised logits; 0 takes the largest."""
    resample_top_p: float = 1.0
    """Nucleus mass of that draw; 1 keeps the whole distribution."""
    support: int | None = None
    """Number of tokens optimised at each position; null is the whole vocabulary."""

    name: ClassVar[str] = "nabla"

    def __post_init__(self) -> None:
        """Check the values."""
        self.check(max_rollouts=1, sweeps=1, min_entropy=0, min_gradient_norm=0, resample_temperature=0)
        if not 0 < self.resample_top_p <= 1:
            raise UserError(
                "nabla.resample_top_p", "a number in (0, 1]", str(self.resample_top_p), "Use 1 to switch it off."
            )
        if self.support is not None and self.support < 2:
            raise UserError("nabla.support", "at least 2 tokens, or null for all", str(self.support))

    def is_deterministic(self, sampling: Sampling) -> bool:
        return False

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        reward, policy, ledger = require_reward(self.name, setting.reward), setting.policy, setting.ledger
        config = replace(self.dto, beta=setting.beta)
        searches = self._start(problems, setting, reward)
        active = searches
        while active:
            active = [
                search
                for search in active
                if len(search.tried) < self.max_rollouts
                and setting.budget.allows(search.curve[-1])
                and self._next(search)
            ]
            unknown = [search for search in active if search.current.gradient is None]
            if unknown and self._needs_gradient:
                # no position before the first that is picked is ever visited, in this sweep or a later one
                starts = [s.position if s.sweep + 1 == self.sweeps else self._first(s) for s in unknown]
                with ledger.phase("probe"):
                    probe(unknown, starts, policy, reward, config, self.support if self._lean(policy) else None)
            # a gradient that was not known before may rule the position out: the next round goes on from there
            ready = [search for search in active if self._picked(search)[search.position]]
            if ready:
                self._advance(ready, setting, reward, config)
            for search in active:
                search.mark(ledger)
        return [_answer(search) for search in searches]

    @property
    def _needs_gradient(self) -> bool:
        """Without DTO steps and without a threshold on its norm, the gradient would go unused."""
        return self.dto.num_steps > 0 or self.min_gradient_norm > 0

    def _lean(self, policy: Policy) -> bool:
        """Whether logits are kept on the support alone."""
        return self.support is not None and self.support < policy.vocab_size

    def _start(self, problems: Sequence[Problem], setting: Setting, reward: AbstractReward) -> list[Walk]:
        policy, ledger = setting.policy, setting.ledger
        rollout = draw_rollouts(
            problems, setting, prefill(problems, setting), keep_states=True, keep_logits=not self._lean(policy)
        )
        rewards, reward_tracks = score_rollouts(problems, reward, rollout.ids, rollout.mask, ledger)
        assert rollout.encoded is not None
        policy_tracks = rollout.encoded.tracks([0] * len(problems))
        searches = []
        for row, problem in enumerate(problems):
            first = _completion(rollout, row, float(rewards[row]), policy_tracks[row], reward_tracks[row])
            search = Walk(problem, row, first)
            search.note(first, policy)
            search.mark(ledger)
            searches.append(search)
        return searches

    def _next(self, search: Walk) -> bool:
        """Go to the next picked position, in the next sweep where this one has none left; False when all sweeps are
        done."""
        while not self._select(search):
            search.sweep += 1
            if search.sweep >= self.sweeps:
                return False
            search.position = 0
        return True

    def _select(self, search: Walk) -> bool:
        """Commit tokens up to the next position that the selector picks; False where there is none left."""
        later = self._picked(search)[search.position :].nonzero()
        skipped = int(later[0]) if len(later) else len(search.current.ids) - search.position
        search.counts["skipped"] += skipped
        search.position += skipped
        return len(later) > 0

    def _first(self, search: Walk) -> int:
        """The first position that a search can visit while its completion stays as it is."""
        return int(self._picked(search).nonzero()[0])

    def _picked(self, search: Walk) -> Tensor:
        """Which positions the selector picks, (length,), as far as is known."""
        known = search.current
        picked = known.entropy > self.min_entropy
        if known.gradient is not None and self.min_gradient_norm > 0:
            norms = known.gradient.norm(dim=-1)
            picked[known.gradient_from :] &= norms > self.min_gradient_norm
        return picked

    def _advance(self, searches: list[Walk], setting: Setting, reward: AbstractReward, config: DTOConfig) -> None:
        """DTO at each search's position, a new token for it, a rollout where the token changed, and the decision."""
        z_first, supports, norms = self._optimise(searches, setting, reward, config)
        own_first = [self._own_logits(s, z) for s, z in zip(searches, z_first, strict=True)]
        changed, tokens, first_logps = [], [], []
        for search, z, own, support, norm in zip(searches, z_first, own_first, supports, norms, strict=True):
            search.counts["visited"] += 1
            current = int(search.current.ids[search.position])
            key = (search.problem.id, "resample", search.sweep, search.position, len(search.tried))
            generator = seeded_generator(setting.seed, *key)
            if self.resample_temperature == 0:
                index, logps = z.argmax(), torch.zeros_like(z)
                drawn_from = torch.full_like(z, -math.inf).index_fill_(0, index, 0.0)
            else:
                filtered = top_p_filter(z[None] / self.resample_temperature, self.resample_top_p)
                index = categorical_from_uniform(filtered, torch.rand(1, generator=generator).to(z.device))[0]
                logps = drawn_from = filtered[0].log_softmax(-1)
            search.proposal_kl += float(reverse_kl(drawn_from, own.log_softmax(-1)))
            token = int(index if support is None else support[index])
            if token == current:
                search.counts["unchanged"] += 1
                search.position += 1
                continue
            old = current if support is None else int((support == current).int().argmax())
            changed.append((search, float(norm)))
            tokens.append(token)
            first_logps.append((float(logps[index]), float(logps[old])))
        if changed:
            self._propose(changed, tokens, first_logps, setting, reward)

    def _optimise(
        self, searches: list[Walk], setting: Setting, reward: AbstractReward, config: DTOConfig
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """The optimised logits z̃_1 of each search's position, their token ids, and ‖∂L/∂y_1‖."""
        policy, ledger = setting.policy, setting.ledger
        if config.num_steps == 0:
            norms = [
                torch.zeros(())
                if s.current.gradient is None
                else s.current.gradient[s.position - s.current.gradient_from].norm()
                for s in searches
            ]
            return [self._first_logits(s, policy) for s in searches], [None] * len(searches), norms
        gradients, supports, rows = [], [], []
        for search in searches:
            known = search.current
            assert known.gradient is not None
            done = search.position - known.gradient_from
            gradients.append(known.gradient[done:])
            supports.append(None if known.support is None else known.support[done:])
            rows.append(
                known.logits[search.position :] if known.support_logits is None else known.support_logits[done:]
            )
        gradient = pad_sequence(gradients, batch_first=True)
        ids = pad_sequence([s.current.ids[s.position :] for s in searches], batch_first=True)
        logits = pad_sequence(rows, batch_first=True)
        support = None if supports[0] is None else pad_sequence(supports, batch_first=True)
        firsts = [None if s is None else s[0] for s in supports]
        objective = objective_of(
            searches, [s.position for s in searches], policy, reward, support, hard=config.relaxation != "softmax"
        )
        state = dto.init(logits, objective.mask, config)
        start = ids if support is None else (support == ids[..., None]).int().argmax(-1)
        if config.relaxation == "straight_through":
            state = start_at(state, start)
            # the gradient at the current completion is known: the first steps need no model
            energy, value, logps = (
                torch.tensor(x).to(state.logits) for x in zip(*(s.current.standing for s in searches), strict=True)
            )
            state = state._replace(
                gradient=gradient, energy=energy, reward=value, logps=logps, stale=torch.zeros_like(state.stale)
            )
        elif state.noise is not None:
            keys = [(setting.seed, s.problem.id, "noise", s.sweep, s.position, len(s.tried)) for s in searches]
            drawn = [
                sample_gumbel(noise.shape, seeded_generator(*key))
                for noise, key in zip(state.noise, keys, strict=True)
            ]
            noise = torch.stack(drawn).to(logits)
            state = state._replace(noise=noise, tokens=(state.logits + noise).argmax(-1))
        with ledger.phase("dto"):
            for _ in range(config.num_steps):
                state, info = dto.step(state, objective.log_probs, objective.rewards, config, donate=True)
                for search, evaluated, flips in zip(
                    searches, info.evaluated.tolist(), info.flips.tolist(), strict=True
                ):
                    search.counts["dto_steps"] += 1
                    search.counts["dto_evaluations"] += int(evaluated)
                    search.counts["flips"] += int(flips)
                served = [
                    s.account for s, evaluated in zip(searches, info.evaluated.tolist(), strict=True) if not evaluated
                ]
                ledger.record_cached(torch.tensor(served, dtype=torch.int64))
        return list(state.logits[:, 0]), firsts, [g[0].norm() for g in gradients]

    def _own_logits(self, search: Walk, optimised: Tensor) -> Tensor:
        """The policy's logits of the tokens that `optimised` is about, at a search's position."""
        if self.dto.num_steps == 0:
            return optimised
        known = search.current
        if known.support_logits is None:
            return known.logits[search.position]
        return known.support_logits[search.position - known.gradient_from]

    def _first_logits(self, search: Walk, policy: Policy) -> Tensor:
        """The policy's logits at a search's position, (vocab,)."""
        if not self._lean(policy):
            return search.current.logits[search.position]
        prefix = search.current.policy_track.prefix_at(search.position)
        policy.backbone.record_head(prefix, torch.ones(1, dtype=torch.int64))
        with torch.no_grad():
            return policy.next_logits(prefix)[0]

    def _propose(
        self,
        changed: list[tuple[Walk, float]],
        tokens: list[int],
        first_logps: list[tuple[float, float]],
        setting: Setting,
        reward: AbstractReward,
    ) -> None:
        """Roll out from the changed tokens, score the whole completions, accept or keep what is there, and commit."""
        policy, sampling, beta = setting.policy, setting.sampling, setting.beta
        searches = [search for search, _ in changed]
        heads = [s.position for s in searches]
        prefix = Prefix.cat([s.current.policy_track.prefix_at(s.position) for s in searches])
        new = torch.tensor(tokens, device=policy.device)
        rollout = policy.rollout(
            prefix,
            sampling,
            [seeded_generator(setting.seed, s.problem.id, "rollout", len(s.tried)) for s in searches],
            lengths=torch.tensor([sampling.length - head for head in heads]),
            first_tokens=new,
            keep_states=True,
            keep_logits=not self._lean(policy),
        )
        assert rollout.encoded is not None
        reward_prefix = Prefix.cat([s.current.reward_track.prefix_at(s.position) for s in searches])
        with setting.ledger.phase("accept"):
            scored = reward.score(reward_prefix, rollout.ids, rollout.mask)
        policy_tracks, reward_tracks = rollout.encoded.tracks(heads), scored.encoded.tracks(heads)
        for row, (search, norm) in enumerate(changed):
            known, at = search.current, search.position
            tail = _completion(rollout, row, float(scored.reward[row]), policy_tracks[row], reward_tracks[row])
            if sampling.temperature > 0:
                # for an edit before it, in a later sweep, the new token is one that the rollout would have drawn
                first = self._first_logits(search, policy)[None] if self._lean(policy) else tail.logits[:1]
                drawn_from = top_p_filter(first / sampling.temperature, sampling.top_p)
                tail.sampling_logps[:1] = selective_log_softmax(drawn_from, tail.ids[:1])
            candidate = spliced(known, at, tail)
            proposed_first, current_first = first_logps[row]
            suffixes = (float(c.sampling_logps[at + 1 :].sum()) for c in (known, candidate))
            current = Standing(known.reward, known.energy(beta), current_first + next(suffixes))
            proposed = Standing(candidate.reward, candidate.energy(beta), proposed_first + next(suffixes))
            generator = seeded_generator(setting.seed, search.problem.id, "accept", len(search.tried))
            accepted = RULES[self.acceptance](current, proposed, float(torch.rand(1, generator=generator)))
            search.trace.append(
                Edit(
                    at,
                    policy.decode([int(known.ids[at])]),
                    policy.decode([tokens[row]]),
                    current.reward,
                    proposed.reward,
                    current.energy,
                    proposed.energy,
                    accepted,
                    norm,
                    float(known.entropy[at]),
                )
            )
            search.note(candidate, policy)
            if accepted:
                search.chosen = len(search.tried) - 1
                search.current = candidate
            search.position += 1


def _completion(rollout: Rollout, row: int, reward: float, policy_track: Track, reward_track: Track) -> Relaxed:
    """A row of a batch of rollouts."""
    real = rollout.mask[row]
    assert rollout.entropy is not None
    ids, logps = rollout.ids[row, real], rollout.logps[row, real]
    return Relaxed(
        ids=ids,
        logps=logps,
        entropy=rollout.entropy[row, real],
        finished=bool(rollout.finished[row]),
        reward=reward,
        policy_track=policy_track,
        reward_track=reward_track,
        sampling_logps=rollout.sampling_logps[row, real],
        logits=logps.new_zeros(len(ids), 0) if rollout.logits is None else rollout.logits[row, real],
    )


def spliced(head: Relaxed, at: int, tail: Relaxed) -> Relaxed:
    """The completion that a new token at position `at` has led to; its gradient is not known."""
    return Relaxed(
        ids=torch.cat([head.ids[:at], tail.ids]),
        logps=torch.cat([head.logps[:at], tail.logps]),
        entropy=torch.cat([head.entropy[:at], tail.entropy]),
        finished=tail.finished,
        reward=tail.reward,
        policy_track=head.policy_track.spliced(tail.policy_track),
        reward_track=head.reward_track.spliced(tail.reward_track),
        sampling_logps=torch.cat([head.sampling_logps[:at], tail.sampling_logps]),
        logits=torch.cat([head.logits[:at], tail.logits]),
    )


def _answer(search: Walk) -> Decoded:
    visited = search.counts["visited"]
    return replace(search.answer(), proposal_kl=search.proposal_kl / visited if visited else None)
