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

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl import dto
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.acceptance import RULES, Acceptance, Standing
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Candidate,
    Decoded,
    Edit,
    Sampling,
    draw_rollouts,
    prefill,
    require_reward,
    score_rollouts,
)
from nabla_rl.decoding.budget import Budget
from nabla_rl.decoding.probing import Search, objective_of, probe, start_at
from nabla_rl.dto import DTOConfig
from nabla_rl.functional.kl import reverse_kl
from nabla_rl.functional.logps import categorical_from_uniform, selective_log_softmax, top_p_filter
from nabla_rl.functional.relaxation import sample_gumbel
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.types import UserError


@dataclass(frozen=True)
class Nabla(AbstractDecoder):
    """∇-Reasoner. Defaults are one published sweep, accepted by energy; see configs/decode/ for what runs."""

    dto: DTOConfig = field(default_factory=DTOConfig)
    beta: float = 1.0
    acceptance: Acceptance = "energy"
    max_rollouts: int = 8
    sweeps: int = 1
    min_entropy: float = 0.25
    min_gradient_norm: float = 0.0
    resample_temperature: float = 1.0
    resample_top_p: float = 1.0
    support: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    """Ends the search beside `max_rollouts`; a step is a position visited, with its probe and its rollout."""
    name: str = "nabla"

    def __post_init__(self) -> None:
        """Check the values in the spelling of the command line."""
        for name, low in (
            ("max_rollouts", 1),
            ("sweeps", 1),
            ("min_entropy", 0),
            ("min_gradient_norm", 0),
            ("resample_temperature", 0),
        ):
            if self.__dict__[name] < low:
                raise UserError(f"nabla.{name}: expected at least {low}, found {self.__dict__[name]}.")
        if self.dto.fresh_noise:
            raise UserError(
                "nabla.dto.fresh_noise: expected false, found true. Decoding draws its noise once a position."
            )
        if self.dto.hidden_states and self.support is not None:
            raise UserError(
                f"nabla.support: expected null with nabla.dto.hidden_states, found {self.support}. Hidden states move "
                "the logits of all tokens."
            )
        if self.support is not None and self.support < 2:
            raise UserError(f"nabla.support: expected at least 2 tokens, or null for all, found {self.support}.")

    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        reward = require_reward(self.name, reward)
        searches = self._start(problems, policy, reward, ledger)
        active = searches
        while active:
            active = [
                search
                for search in active
                if len(search.tried) < self.max_rollouts
                and self.budget.allows(search.curve[-1])
                and self._next(search)
            ]
            unknown = [search for search in active if search.gradient is None]
            if unknown and self._needs_gradient:
                # no position before the first that is picked is ever visited, in this sweep or a later one
                starts = [s.position if s.sweep + 1 == self.sweeps else self._first(s) for s in unknown]
                with ledger.phase("probe"):
                    probe(
                        unknown, starts, policy, reward, self._config(), self.support if self._lean(policy) else None
                    )
            # a gradient that was not known before may rule the position out: the next round goes on from there
            ready = [search for search in active if self._picked(search)[search.position]]
            if ready:
                self._advance(ready, policy, reward, ledger)
            for search in active:
                search.mark(ledger)
        return [_finish(search) for search in searches]

    @property
    def _needs_gradient(self) -> bool:
        """Without DTO steps and without a threshold on its norm, the gradient would go unused."""
        return self.dto.num_steps > 0 or self.min_gradient_norm > 0

    def _lean(self, policy: Policy) -> bool:
        """Whether logits are kept on the support alone."""
        return self.support is not None and self.support < policy.vocab_size

    def _start(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward, ledger: Ledger
    ) -> list[Search]:
        prefix = prefill(problems, policy, ledger, self.sampling.max_new_tokens)
        rollout = draw_rollouts(
            problems, policy, prefix, self.sampling, n=1, seed=self.seed, keep_logits=not self._lean(policy),
            keep_encoded=True, keep_entropy=True,
        )  # fmt: skip
        rewards, reward_tracks = score_rollouts(problems, reward, rollout.ids, rollout.mask, ledger)
        assert rollout.encoded is not None
        policy_tracks = rollout.encoded.tracks([0] * len(problems))
        searches = []
        for row, problem in enumerate(problems):
            ids, logps, sampling_logps, logits, entropy = _row(rollout, row)
            search = Search(
                problem, row, ids, logps, sampling_logps, logits, entropy, bool(rollout.finished[row]),
                float(rewards[row]), policy_tracks[row], reward_tracks[row],
            )  # fmt: skip
            search.tried.append(_candidate(policy, search))
            search.mark(ledger)
            searches.append(search)
        return searches

    def _next(self, search: Search) -> bool:
        """Go to the next picked position, in the next sweep where this one has none left; False when all sweeps are
        done."""
        while not self._select(search):
            search.sweep += 1
            if search.sweep >= self.sweeps:
                return False
            search.position = 0
        return True

    def _select(self, search: Search) -> bool:
        """Commit tokens up to the next position that the selector picks; False where there is none left."""
        later = self._picked(search)[search.position :].nonzero()
        skipped = int(later[0]) if len(later) else len(search.ids) - search.position
        search.counts["skipped"] += skipped
        search.position += skipped
        return len(later) > 0

    def _first(self, search: Search) -> int:
        """The first position that a search can visit while its completion stays as it is."""
        return int(self._picked(search).nonzero()[0])

    def _picked(self, search: Search) -> Tensor:
        """Which positions the selector picks, (length,), as far as is known."""
        picked = search.entropy > self.min_entropy
        if search.gradient is not None and self.min_gradient_norm > 0:
            norms = search.gradient.norm(dim=-1)
            picked[search.gradient_from :] &= norms > self.min_gradient_norm
        return picked

    def _config(self) -> DTOConfig:
        return replace(self.dto, beta=self.beta)

    def _advance(self, searches: list[Search], policy: Policy, reward: AbstractReward, ledger: Ledger) -> None:
        """DTO at each search's position, a new token for it, a rollout where the token changed, and the decision."""
        z_first, supports, norms = self._optimise(searches, policy, reward, ledger)
        own_first = [self._own_logits(s, z) for s, z in zip(searches, z_first, strict=True)]
        changed, tokens, first_logps = [], [], []
        for search, z, own, support, norm in zip(searches, z_first, own_first, supports, norms, strict=True):
            search.counts["visited"] += 1
            current = int(search.ids[search.position])
            key = (search.problem.id, "resample", search.sweep, search.position, len(search.tried))
            generator = seeded_generator(self.seed, *key)
            if self.resample_temperature == 0:
                index, logps = z.argmax(), torch.zeros_like(z)
                law = torch.full_like(z, -math.inf).index_fill_(0, index, 0.0)
            else:
                filtered = top_p_filter(z[None] / self.resample_temperature, self.resample_top_p)
                index = categorical_from_uniform(filtered, torch.rand(1, generator=generator).to(z.device))[0]
                logps = law = filtered[0].log_softmax(-1)
            search.proposal_kl += float(reverse_kl(law, own.log_softmax(-1)))
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
            self._propose(changed, tokens, first_logps, policy, reward, ledger)

    def _optimise(
        self, searches: list[Search], policy: Policy, reward: AbstractReward, ledger: Ledger
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """The optimised logits z̃_1 of each search's position, their token ids, and ‖∂L/∂y_1‖."""
        config = self._config()
        if config.num_steps == 0:
            norms = [
                s.gradient[s.position - s.gradient_from].norm() if s.gradient is not None else torch.zeros(())
                for s in searches
            ]
            return [self._first_logits(s, policy) for s in searches], [None] * len(searches), norms
        gradients, supports, rows = [], [], []
        for search in searches:
            assert search.gradient is not None
            done = search.position - search.gradient_from
            gradients.append(search.gradient[done:])
            supports.append(None if search.support is None else search.support[done:])
            rows.append(
                search.logits[search.position :] if search.support_logits is None else search.support_logits[done:]
            )
        gradient = pad_sequence(gradients, batch_first=True)
        ids = pad_sequence([s.ids[s.position :] for s in searches], batch_first=True)
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
                torch.tensor(x).to(state.logits) for x in zip(*(s.standing for s in searches), strict=True)
            )
            state = state._replace(
                gradient=gradient, energy=energy, reward=value, logps=logps, stale=torch.zeros_like(state.stale)
            )
        elif state.noise is not None:
            keys = [(self.seed, s.problem.id, "noise", s.sweep, s.position, len(s.tried)) for s in searches]
            drawn = [
                sample_gumbel(noise.shape, seeded_generator(*key))
                for noise, key in zip(state.noise, keys, strict=True)
            ]
            noise = torch.stack(drawn).to(logits)
            state = state._replace(noise=noise, tokens=(state.logits + noise).argmax(-1))
        unembedding = policy.head_weight if config.hidden_states else None
        with ledger.phase("dto"):
            for _ in range(config.num_steps):
                state, info = dto.step(
                    state, objective.log_probs, objective.rewards, config, donate=True, unembedding=unembedding
                )
                if config.hidden_states:  # the head is applied twice, to hidden states and back
                    policy.backbone.record_head(objective.policy_prefix, 2 * objective.mask.sum(-1))
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

    def _own_logits(self, search: Search, optimised: Tensor) -> Tensor:
        """The policy's logits of the tokens that `optimised` is about, at a search's position."""
        if self.dto.num_steps == 0:
            return optimised
        if search.support_logits is None:
            return search.logits[search.position]
        return search.support_logits[search.position - search.gradient_from]

    def _first_logits(self, search: Search, policy: Policy) -> Tensor:
        """The policy's logits at a search's position, (vocab,)."""
        if not self._lean(policy):
            return search.logits[search.position]
        prefix = search.policy_track.prefix_at(search.position)
        policy.backbone.record_head(prefix, torch.ones(1, dtype=torch.int64))
        with torch.no_grad():
            return policy.next_logits(prefix)[0]

    def _propose(
        self,
        changed: list[tuple[Search, float]],
        tokens: list[int],
        first_logps: list[tuple[float, float]],
        policy: Policy,
        reward: AbstractReward,
        ledger: Ledger,
    ) -> None:
        """Roll out from the changed tokens, score the whole completions, accept or keep what is there, and commit."""
        searches = [search for search, _ in changed]
        heads = [s.position for s in searches]
        prefix = Prefix.cat([s.policy_track.prefix_at(s.position) for s in searches])
        new = torch.tensor(tokens, device=policy.device)
        generators = [seeded_generator(self.seed, s.problem.id, "rollout", len(s.tried)) for s in searches]
        budgets = torch.tensor([self.sampling.max_new_tokens - head for head in heads])
        rollout = policy.rollout(
            prefix, generators=generators, max_new_tokens=int(budgets.max()), temperature=self.sampling.temperature,
            top_p=self.sampling.top_p, keep_logits=not self._lean(policy), keep_encoded=True, keep_entropy=True,
            first_tokens=new, budgets=budgets,
        )  # fmt: skip
        assert rollout.encoded is not None
        reward_prefix = Prefix.cat([s.reward_track.prefix_at(s.position) for s in searches])
        with ledger.phase("accept"):
            scored = reward.score(reward_prefix, rollout.ids, rollout.mask)
        policy_tracks, reward_tracks = rollout.encoded.tracks(heads), scored.encoded.tracks(heads)
        for row, (search, norm) in enumerate(changed):
            ids, logps, sampling_logps, logits, entropy = _row(rollout, row)
            if self.sampling.temperature > 0:
                # for an edit before it, in a later sweep, the new token is one that the rollout would have drawn
                first = self._first_logits(search, policy)[None] if self._lean(policy) else logits[:1]
                law = top_p_filter(first / self.sampling.temperature, self.sampling.top_p)
                sampling_logps[:1] = selective_log_softmax(law, ids[:1])
            at, value = search.position, float(scored.reward[row])
            candidate = replace(
                search,
                ids=torch.cat([search.ids[:at], ids]),
                logps=torch.cat([search.logps[:at], logps]),
                sampling_logps=torch.cat([search.sampling_logps[:at], sampling_logps]),
                logits=torch.cat([search.logits[:at], logits]),
                entropy=torch.cat([search.entropy[:at], entropy]),
                finished=bool(rollout.finished[row]),
                reward=value,
                policy_track=search.policy_track.spliced(policy_tracks[row]),
                reward_track=search.reward_track.spliced(reward_tracks[row]),
                gradient=None,
                gradient_from=-1,
            )
            proposed_first, current_first = first_logps[row]
            suffixes = (float(s.sampling_logps[at + 1 :].sum()) for s in (search, candidate))
            current = Standing(search.reward, search.energy(self.beta), current_first + next(suffixes))
            proposed = Standing(value, candidate.energy(self.beta), proposed_first + next(suffixes))
            generator = seeded_generator(self.seed, search.problem.id, "accept", len(search.tried))
            accepted = RULES[self.acceptance](current, proposed, float(torch.rand(1, generator=generator)))
            search.trace.append(
                Edit(
                    at,
                    policy.decode([int(search.ids[at])]),
                    policy.decode([tokens[row]]),
                    current.reward,
                    proposed.reward,
                    current.energy,
                    proposed.energy,
                    accepted,
                    norm,
                    float(search.entropy[at]),
                )  # fmt: skip
            )
            search.tried.append(_candidate(policy, candidate))
            if accepted:
                search.chosen = len(search.tried) - 1
                for name in _REPLACED:
                    setattr(search, name, getattr(candidate, name))
            search.position += 1


_REPLACED = (
    "ids",
    "logps",
    "sampling_logps",
    "logits",
    "entropy",
    "finished",
    "reward",
    "policy_track",
    "reward_track",
    "gradient",
    "gradient_from",
)
"""What an accepted proposal replaces."""


def _row(rollout: Rollout, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    real = rollout.mask[row]
    assert rollout.entropy is not None
    ids, logps, entropy = rollout.ids[row, real], rollout.logps[row, real], rollout.entropy[row, real]
    logits = logps.new_zeros(len(ids), 0) if rollout.logits is None else rollout.logits[row, real]
    return ids, logps, rollout.sampling_logps[row, real], logits, entropy


def _candidate(policy: Policy, search: Search) -> Candidate:
    ids = tuple(search.ids.tolist())
    return Candidate(policy.decode(ids), ids, float(search.logps.double().sum()), search.reward)


def _finish(search: Search) -> Decoded:
    final, visited = search.tried[search.chosen], search.counts["visited"]
    return Decoded(
        search.problem.id, final.text, final.ids, search.finished, final.logps, search.reward, search.tried,
        search.trace, len(search.trace), sum(edit.accepted for edit in search.trace), dict(search.counts),
        search.curve, search.proposal_kl / visited if visited else None,
    )  # fmt: skip
