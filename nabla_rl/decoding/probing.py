"""What ∇-Reasoner knows of a completion: models' states, energy, and the gradient at it, taken once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl import dto
from nabla_rl.decoding.objective import HeadLogits, Objective, choose_support, gradient_candidates
from nabla_rl.decoding.search import Completion, Search
from nabla_rl.dto import DTOConfig, DTOState
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward

GRADIENT_CANDIDATES = 8
"""Tokens of each position that enter a top-k support because the first gradient likes them."""


@dataclass
class Relaxed(Completion):
    """A completion with its logits and the gradient of its energy.

    Attributes:
        sampling_logps: (length,), log-probabilities under the distribution that the tokens were drawn from.
        logits: (length, vocab); (length, 0) with a support, where `policy_track` has what they are computed from.
        gradient_from: The gradient covers positions from here on; -1 where there is none.
        gradient: (length - gradient_from, support), ∂L/∂y at this completion.
        support: (length - gradient_from, support), the tokens that the gradient is about.
        support_logits: (length - gradient_from, support), their logits.
        standing: Energy, reward and log π of the suffix, as DTO saw them.
    """

    sampling_logps: Tensor
    logits: Tensor
    gradient_from: int = -1
    gradient: Tensor | None = None
    support: Tensor | None = None
    support_logits: Tensor | None = None
    standing: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass
class Walk(Search[Relaxed]):
    """A search that goes through its completion token by token; what stands before `position` is committed."""

    position: int = 0
    sweep: int = 0
    proposal_kl: float = 0.0  # Σ over the positions visited, KL(proposal ‖ policy)


def objective_of(
    searches: Sequence[Walk],
    starts: Sequence[int],
    policy: Policy,
    reward: AbstractReward,
    support: Tensor | None,
    *,
    hard: bool,
) -> Objective:
    """The energy of the current completions as functions of their tokens from `starts` on (see `Objective`)."""
    pairs = list(zip([search.current for search in searches], starts, strict=True))
    lengths = torch.tensor([len(known.ids) - at for known, at in pairs], device=policy.device)
    mask = torch.arange(int(lengths.max()), device=policy.device) < lengths[:, None]
    return Objective(
        policy,
        reward,
        Prefix.cat([known.policy_track.prefix_at(at) for known, at in pairs]),
        Prefix.cat([known.reward_track.prefix_at(at) for known, at in pairs]),
        mask,
        support,
        hard=hard,
    )


def probe(
    searches: Sequence[Walk],
    starts: Sequence[int],
    policy: Policy,
    reward: AbstractReward,
    config: DTOConfig,
    support_size: int | None,
) -> None:
    """Take ∂L/∂y at the current completions, from `starts` on, and choose the tokens to work with.

    Sets `gradient`, `support`, `support_logits` and `standing` of each current completion.

    Args:
        searches: The searches whose gradients are taken.
        starts: The first position that each search will visit.
        policy: The language model.
        reward: The reward model.
        config: How DTO will continue from here.
        support_size: Number of tokens at each position; None is the whole vocabulary, with the logits at hand.
    """
    pairs = list(zip([search.current for search in searches], starts, strict=True))
    ids = pad_sequence([known.ids[at:] for known, at in pairs], batch_first=True)
    support = None
    objective = objective_of(searches, starts, policy, reward, None, hard=config.relaxation != "softmax")
    if support_size is None:
        logits = pad_sequence(
            [s.current.logits[at:] for s, at in zip(searches, starts, strict=True)], batch_first=True
        )
    else:
        hidden = [
            s.current.policy_track.hidden[at : len(s.current.ids)] for s, at in zip(searches, starts, strict=True)
        ]
        every = HeadLogits(policy, pad_sequence(hidden, batch_first=True))
        num = min(GRADIENT_CANDIDATES, support_size - 1)
        candidates = gradient_candidates(objective, ids, every, config.beta, num) if num else None
        objective.support = support = choose_support(every, ids, support_size, candidates)
        logits = every.gather(support)
        policy.backbone.record_head(objective.policy_prefix, (3 if num else 2) * objective.mask.sum(-1))
    state = dto.init(logits, objective.mask, config)
    state = start_at(state, ids if support is None else (support == ids[..., None]).int().argmax(-1))
    # one update is made and thrown away: what is wanted is the gradient that it evaluates
    plain = replace(config, trust_region=None)
    state, _ = dto.step(state, objective.log_probs, objective.rewards, plain)
    assert state.gradient is not None
    for row, search in enumerate(searches):
        real = objective.mask[row]
        known = search.current
        known.gradient, known.gradient_from = state.gradient[row, real], starts[row]
        known.support = None if support is None else support[row, real]
        known.support_logits = None if support is None else logits[row, real]
        known.standing = (float(state.energy[row]), float(state.reward[row]), float(state.logps[row]))
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
