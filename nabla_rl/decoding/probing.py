"""What ∇-Reasoner knows of a completion: models' states, energy, and the gradient at it, taken once and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl import dto
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import Candidate, Edit
from nabla_rl.decoding.budget import Point, spent
from nabla_rl.decoding.objective import HeadLogits, Objective, choose_support, gradient_candidates
from nabla_rl.dto import DTOConfig, DTOState
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix, Track
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward

GRADIENT_CANDIDATES = 8
"""Tokens of each position that enter a top-k support because the first gradient likes them."""


@dataclass
class Search:
    """One problem on its way: the current completion, what is committed of it, and what is known about it."""

    problem: Problem
    account: int
    ids: Tensor  # (length,)
    logps: Tensor  # (length,)
    sampling_logps: Tensor  # (length,)
    logits: Tensor  # (length, vocab); (length, 0) with a support, where `policy_track` has what they are computed from
    entropy: Tensor  # (length,)
    finished: bool
    reward: float
    policy_track: Track
    reward_track: Track
    position: int = 0
    sweep: int = 0
    gradient_from: int = -1  # the gradient below covers positions from here on; -1: there is none
    gradient: Tensor | None = None  # (length - gradient_from, support), ∂L/∂y at the current completion
    support: Tensor | None = None  # (length - gradient_from, support)
    support_logits: Tensor | None = None  # (length - gradient_from, support)
    standing: tuple[float, float, float] = (0.0, 0.0, 0.0)  # energy, reward, logps of the suffix, as DTO saw them
    tried: list[Candidate] = field(default_factory=list)
    chosen: int = 0  # which of them is the current completion
    curve: list[Point] = field(default_factory=list)
    trace: list[Edit] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    proposal_kl: float = 0.0  # Σ over the positions visited, KL(law the new token is drawn from ‖ policy)

    def mark(self, ledger: Ledger) -> None:
        """Add the point that the search has come to, where it moved."""
        point = spent(ledger, self.account, rollouts=len(self.tried), chosen=self.chosen)
        if not self.curve or point != self.curve[-1]:
            self.curve.append(point)

    def energy(self, beta: float) -> float:
        return float(compute_energy(self.logps.double().sum(), torch.tensor(self.reward).double(), beta))


def objective_of(
    searches: Sequence[Search],
    starts: Sequence[int],
    policy: Policy,
    reward: AbstractReward,
    support: Tensor | None,
    *,
    hard: bool,
) -> Objective:
    """The energy of the current completions as functions of their tokens from `starts` on (see `Objective`)."""
    lengths = torch.tensor([len(s.ids) - at for s, at in zip(searches, starts, strict=True)], device=policy.device)
    mask = torch.arange(int(lengths.max()), device=policy.device) < lengths[:, None]
    return Objective(
        policy,
        reward,
        Prefix.cat([s.policy_track.prefix_at(at) for s, at in zip(searches, starts, strict=True)]),
        Prefix.cat([s.reward_track.prefix_at(at) for s, at in zip(searches, starts, strict=True)]),
        mask,
        support,
        hard=hard,
    )


def probe(
    searches: Sequence[Search],
    starts: Sequence[int],
    policy: Policy,
    reward: AbstractReward,
    config: DTOConfig,
    support_size: int | None,
) -> None:
    """Take ∂L/∂y at the current completions, from `starts` on, and choose the tokens to work with.

    Sets `gradient`, `support`, `support_logits` and `standing` of each search.

    Args:
        searches: whose gradients.
        starts: the first position that each search will visit.
        policy: the language model.
        reward: the judge.
        config: how DTO will go on from here.
        support_size: tokens of each position; None: the whole vocabulary, with the logits that the searches have.
    """
    ids = pad_sequence([s.ids[at:] for s, at in zip(searches, starts, strict=True)], batch_first=True)
    support = None
    objective = objective_of(searches, starts, policy, reward, None, hard=config.relaxation != "softmax")
    if support_size is None:
        logits = pad_sequence([s.logits[at:] for s, at in zip(searches, starts, strict=True)], batch_first=True)
    else:
        hidden = [s.policy_track.hidden[at : len(s.ids)] for s, at in zip(searches, starts, strict=True)]
        every = HeadLogits(policy, pad_sequence(hidden, batch_first=True))
        num = min(GRADIENT_CANDIDATES, support_size - 1)
        candidates = gradient_candidates(objective, ids, every, config.beta, num) if num else None
        objective.support = support = choose_support(every, ids, support_size, candidates)
        logits = every.gather(support)
        policy.backbone.record_head(objective.policy_prefix, (3 if num else 2) * objective.mask.sum(-1))
    state = dto.init(logits, objective.mask, config)
    state = start_at(state, ids if support is None else (support == ids[..., None]).int().argmax(-1))
    # one update is made and thrown away: what is wanted is the gradient that it evaluates
    plain = replace(config, trust_region=None, hidden_states=False)
    state, _ = dto.step(state, objective.log_probs, objective.rewards, plain)
    assert state.gradient is not None
    for row, search in enumerate(searches):
        real = objective.mask[row]
        search.gradient, search.gradient_from = state.gradient[row, real], starts[row]
        search.support = None if support is None else support[row, real]
        search.support_logits = None if support is None else logits[row, real]
        search.standing = (float(state.energy[row]), float(state.reward[row]), float(state.logps[row]))
        search.counts["probes"] += 1


def start_at(state: DTOState, tokens: Tensor) -> DTOState:
    """The state whose hard tokens are `tokens`: a constant offset lifts each of them to its position's maximum.

    The logits themselves, which proposals are drawn from, stay the policy's. A token flips when another one
    overtakes it.
    """
    highest = state.logits.amax(-1, keepdim=True)
    lift = highest - state.logits.gather(-1, tokens[..., None]) + 1e-5 * highest.abs().clamp(min=1.0)
    lift = lift.masked_fill(state.logits.argmax(-1, keepdim=True) == tokens[..., None], 0.0)
    noise = torch.zeros_like(state.logits).scatter(-1, tokens[..., None], lift)
    return state._replace(noise=noise, tokens=(state.logits + noise).argmax(-1))
