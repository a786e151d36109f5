"""What a decoder is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla_rl.data.problems import Problem
from nabla_rl.decoding.budget import Point
from nabla_rl.functional.energy import compute_energy
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix, Track
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.rewards.base import AbstractProcessReward, AbstractReward
from nabla_rl.types import UserError


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn from the policy."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass; 1 keeps the whole distribution, so that samples follow the policy itself."""
    max_new_tokens: int = 88
    """Tokens at most in one completion."""

    def __post_init__(self) -> None:
        """Check the values in the spelling of the command line."""
        if self.temperature < 0:
            raise UserError(f"sampling.temperature: expected at least 0, found {self.temperature}. Use 0 for greedy.")
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"sampling.top_p: expected a number in (0, 1], found {self.top_p}. Use 1 to switch it off."
            )
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens: expected at least 1, found {self.max_new_tokens}.")


@dataclass(frozen=True)
class Candidate:
    """One complete rollout that a decoder tried."""

    text: str
    ids: tuple[int, ...]
    logps: float
    reward: float | None = None


@dataclass(frozen=True)
class Edit:
    """One proposed change of a completion by ∇-Reasoner."""

    position: int
    old_token: str
    new_token: str
    reward_before: float
    reward_after: float
    energy_before: float
    energy_after: float
    accepted: bool
    gradient_norm: float
    entropy: float
    score: float | None = None
    """What the edit promised: the change of the tilted policy's log-odds, for edit search."""


@dataclass
class Decoded:
    """The answer of a decoder to one problem.

    Attributes:
        problem_id: whose answer it is.
        text: the chosen completion.
        ids: its tokens.
        finished: it ended by itself, rather than at the maximum length.
        logps: log π(y|x) at temperature 1.
        reward: r(x, y), None for a decoder that never asked the reward model.
        rollouts: every rollout tried, in order.
        trace: for ∇-Reasoner, the edits proposed.
        proposals, accepted: edits that were rolled out, and how many of them were kept.
        counts: further counts of the decoder's own (positions visited, gradients served from the cache, …).
        curve: after each step, what had been spent and which rollout would have been the answer; the last point is
            this answer and its whole cost.
        proposal_kl: for the published loop, KL(law ‖ policy) of the law that a position's new token is drawn from,
            mean over the positions visited; None where there were none.
    """

    problem_id: str
    text: str
    ids: tuple[int, ...]
    finished: bool
    logps: float
    reward: float | None
    rollouts: list[Candidate]
    trace: list[Edit] = field(default_factory=list)
    proposals: int = 0
    accepted: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    proposal_kl: float | None = None


class AbstractDecoder(ABC):
    """A way to get one completion for each problem, many problems at once and each independent of the others."""

    name: str

    @abstractmethod
    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        """Answer the problems; account i of the ledger is problem i's."""


def require_reward(decoder: str, reward: AbstractReward | None) -> AbstractReward:
    """The reward, or one line that says who needs it."""
    if reward is None:
        raise UserError(
            f"{decoder}: expected a reward model, found none. Pass --model.reward.name, or leave it out of "
            f"--model.decoders."
        )
    return reward


def require_process_reward(decoder: str, reward: AbstractReward | None) -> AbstractProcessReward:
    """The reward, where it judges partial completions, or one line that says who needs it."""
    judge = require_reward(decoder, reward)
    if not isinstance(judge, AbstractProcessReward):
        raise UserError(
            f"{decoder}: expected a reward that judges prefixes, found {type(judge).__name__}. Take a process reward."
        )
    return judge


def prefill(problems: Sequence[Problem], policy: Policy, ledger: Ledger, max_new_tokens: int) -> Prefix:
    """Encode the prompts, after checking that prompt and completion fit the context together."""
    prompts = [policy.encode_prompt(problem.problem) for problem in problems]
    limit = policy.backbone.context_length
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"problem {problem.id!r}: expected prompt and completion to fit the model's context of "
                f"{limit} tokens, found "
                f"{len(prompt)} + {max_new_tokens}. Shorten the problem or lower --model.sampling.max_new_tokens."
            )
    return policy.prefill(prompts, torch.arange(len(problems)), ledger)


def draw_rollouts(
    problems: Sequence[Problem],
    policy: Policy,
    prefix: Prefix,
    sampling: Sampling,
    *,
    n: int,
    seed: int,
    keep_logits: bool = False,
    keep_encoded: bool = False,
    keep_entropy: bool = False,
    keep_top: int = 0,
) -> Rollout:
    """`n` rollouts of each problem, rows n·i … n·i + n - 1 being problem i's; draw j depends on (seed, problem id,
    j)."""
    generators = [seeded_generator(seed, p.id, "rollout", j) for p in problems for j in range(n)]
    rows = prefix if n == 1 else prefix.select(torch.arange(len(problems), device=policy.device).repeat_interleave(n))
    return policy.rollout(
        rows,
        generators=generators,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        keep_logits=keep_logits,
        keep_encoded=keep_encoded,
        keep_entropy=keep_entropy,
        keep_top=keep_top,
    )


def score_rollouts(
    problems: Sequence[Problem],
    reward: AbstractReward,
    ids: Tensor,
    mask: Tensor,
    ledger: Ledger,
    *,
    phase: str = "score",
) -> tuple[Tensor, list[Track]]:
    """Rewards of n completions of each problem (rows n·i … are problem i's), and their encodings by the reward
    model."""
    n = len(ids) // len(problems)
    prefix = reward.prefill([p.problem for p in problems], torch.arange(len(problems)), ledger)
    if n > 1:
        prefix = prefix.select(torch.arange(len(problems), device=ids.device).repeat_interleave(n))
    with ledger.phase(phase):
        scored = reward.score(prefix, ids, mask)
    return scored.reward, scored.encoded.tracks([0] * len(ids)) if n == 1 else []


def candidates(policy: Policy, rollout: Rollout, rewards: Tensor | None) -> list[Candidate]:
    """The rows of a batch of rollouts as plain values."""
    logps = rollout.logps.sum(-1).tolist()
    values = rewards.tolist() if rewards is not None else [None] * len(logps)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]
    return [
        Candidate(policy.decode(row), row, logp, value) for row, logp, value in zip(rows, logps, values, strict=True)
    ]


def energies(tried: Sequence[Candidate], beta: float) -> Tensor:
    """The energy -r/β - log π of each candidate, float64."""
    logps = torch.tensor([c.logps for c in tried], dtype=torch.float64)
    rewards = None if tried[0].reward is None else torch.tensor([c.reward for c in tried], dtype=torch.float64)
    return compute_energy(logps, rewards, beta)


def decoded(
    problem: Problem, chosen: int, tried: list[Candidate], finished: bool, curve: Sequence[Point] = ()
) -> Decoded:
    """The result of a decoder that picks one of its rollouts."""
    best = tried[chosen]
    return Decoded(problem.id, best.text, best.ids, finished, best.logps, best.reward, tried, curve=list(curve))
