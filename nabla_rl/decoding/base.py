"""What a decoder is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import ClassVar

import torch
from torch import Tensor

from nabla_rl.budget import Budget, Point
from nabla_rl.data.problems import Extract, Problem, extract_boxed
from nabla_rl.functional.energy import compute_energy
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Cost, Ledger
from nabla_rl.models.backbone import Prefix, Track
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.base import AbstractProcessReward, AbstractReward
from nabla_rl.types import UserError


@dataclass(frozen=True)
class Setting:
    """Everything that all decoders share: the models, the objective, how to sample, what may be spent.

    Attributes:
        policy: The language model that is decoded.
        reward: The reward model r(x, y); None where no decoder needs one.
        ledger: The account that every pass is booked on; account i belongs to problem i.
        beta: KL coefficient β = 1/λ of the energy L(y) = -r(x, y)/β - log π(y|x).
        sampling: How rollouts are drawn.
        seed: Random seed; a draw depends on (seed, problem id, draw number) alone.
        budget: The most that one problem may cost.
        extract: Reads the answer that a vote counts out of a completion.
    """

    policy: Policy
    reward: AbstractReward | None
    ledger: Ledger
    beta: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    extract: Extract = extract_boxed

    def __post_init__(self) -> None:
        """Check β, and take the model's own maximum length where none is given."""
        check_beta(self.beta)
        if self.sampling.max_new_tokens is None:
            object.__setattr__(self, "sampling", replace(self.sampling, max_new_tokens=self.policy.max_new_tokens))

    def at_temperature(self, temperature: float) -> Setting:
        """The same setting with another sampling temperature."""
        return replace(self, sampling=replace(self.sampling, temperature=temperature))


def check_beta(beta: float) -> None:
    """Refuse a β that defines no tilted policy."""
    if not beta > 0:
        raise UserError("beta", "a positive number", str(beta), "Use infinity (.inf) to leave the reward out.")


@dataclass(frozen=True)
class Candidate:
    """One complete rollout that a decoder tried."""

    text: str
    ids: tuple[int, ...]
    logps: float
    reward: float | None = None


@dataclass(frozen=True)
class Edit:
    """One proposed change of a completion."""

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
        problem_id: The problem's id.
        text: The chosen completion.
        ids: Its tokens.
        finished: True where it ended by itself, rather than at the maximum length.
        logps: log π(y|x) at temperature 1.
        reward: r(x, y); None for a decoder that never asked the reward model.
        rollouts: Every rollout tried, in order.
        trace: The edits proposed, for decoders that edit.
        proposals: Edits that were rolled out.
        accepted: Edits that were kept.
        counts: Further counts of the decoder's own (positions visited, gradients served from the cache, …).
        curve: After each step, what had been spent and which rollout would have been the answer. The last point is
            this answer at its whole cost.
        proposal_kl: KL(proposal ‖ policy) at the positions that ∇-Reasoner visited, mean in nats; None elsewhere.
        cost: What the policy and the reward model spent on this problem; None until the answer is complete.
        problem: The problem itself, where `nabla_rl.decode` gave the answer.
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
    cost: Cost | None = None
    problem: Problem | None = None

    def __repr__(self) -> str:
        words = [f"Decoded({self.problem_id!r}, {self.text!r}"]
        if self.reward is not None:
            words.append(f"reward={self.reward:.3f}")
        words.append(f"logps={self.logps:.2f}")
        words.append("1 rollout" if len(self.rollouts) == 1 else f"{len(self.rollouts)} rollouts")
        if self.proposals:
            words.append(f"{self.accepted} of {self.proposals} edits kept")
        if self.cost is not None:
            words.append(f"{self.cost.flops:.2e} FLOPs")
        return ", ".join(words) + ")"

    def _repr_html_(self) -> str:
        """The answer and its edits, for a notebook."""
        head = "" if self.problem is None else f"<p>{escape(self.problem.problem)}</p>"
        facts = [] if self.reward is None else [f"reward {self.reward:.3f}"]
        facts += [f"log π {self.logps:.2f}"] + ([] if self.cost is None else [f"{self.cost.flops:.2e} FLOPs"])
        rows = "".join(
            f"<tr><td>{edit.position}</td><td><del>{escape(edit.old_token)}</del></td>"
            f"<td><ins>{escape(edit.new_token)}</ins></td>"
            f"<td>{edit.reward_before:.2f} → {edit.reward_after:.2f}</td>"
            f"<td>{'kept' if edit.accepted else 'rejected'}</td></tr>"
            for edit in self.trace
        )
        titles = "".join(f"<th>{name}</th>" for name in ("position", "token", "edit", "reward", ""))
        table = f"<table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
        return f"<div>{head}<pre>{escape(self.text)}</pre><p>{' · '.join(facts)}</p>{table}</div>"


class AbstractDecoder(ABC):
    """A way to get one completion for each problem, many problems at once and each independent of the others.

    A subclass is a frozen dataclass whose fields are its options; what all decoders share comes with the `Setting`.

    Attributes:
        name: What the decoder is called, in Python, on the command line and in every table.
        needs_reward: Whether it asks a reward model.
    """

    name: ClassVar[str]
    needs_reward: ClassVar[bool] = True

    @abstractmethod
    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        """Answer the problems; account i of the setting's ledger is problem i's."""

    def is_deterministic(self, sampling: Sampling) -> bool:
        """Whether the answer is the same for every seed."""
        return sampling.temperature == 0

    def check(self, **least: float) -> None:
        """Refuse options below their least value."""
        for option, low in least.items():
            value = getattr(self, option)
            if not value >= low:
                raise UserError(f"{self.name}.{option}", f"at least {low}", str(value))


def require_reward(decoder: str, reward: AbstractReward | None) -> AbstractReward:
    """The reward, or one line that says who needs it."""
    if reward is None:
        raise UserError(
            "reward.name",
            f"a reward model for {decoder}",
            "none",
            f"Name one, or leave {decoder} out of {{decoders}}.",
        )
    return reward


def require_process_reward(decoder: str, reward: AbstractReward | None) -> AbstractProcessReward:
    """The reward, where it judges partial completions, or one line that says who needs it."""
    found = require_reward(decoder, reward)
    if not isinstance(found, AbstractProcessReward):
        raise UserError(
            "reward.kind", f"a reward with values of prefixes for {decoder}", type(found).__name__,
            "Use a process reward, such as a classifier that was trained on prefixes.",
        )  # fmt: skip
    return found


def prefill(problems: Sequence[Problem], setting: Setting) -> Prefix:
    """Encode the prompts, after checking that prompt and completion fit the context together."""
    policy, longest = setting.policy, setting.sampling.length
    prompts = [policy.encode_prompt(problem.problem) for problem in problems]
    limit = policy.backbone.context_length
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + longest > limit:
            raise UserError(
                f"problem {problem.id!r}",
                f"prompt and completion to fit the policy's context of {limit} tokens",
                f"{len(prompt)} + {longest}",
                "Shorten the problem or lower {sampling.max_new_tokens}.",
            )
    return policy.prefill(prompts, torch.arange(len(problems)), setting.ledger)


def prefill_reward(problems: Sequence[Problem], reward: AbstractReward, ledger: Ledger) -> Prefix:
    """Encode the prompts as the reward model's own template writes them."""
    return reward.prefill([problem.problem for problem in problems], torch.arange(len(problems)), ledger)


def draw_rollouts(
    problems: Sequence[Problem],
    setting: Setting,
    prefix: Prefix,
    *,
    n: int = 1,
    keep_states: bool = False,
    keep_logits: bool = False,
    keep_top: int = 0,
) -> Rollout:
    """`n` rollouts of each problem, rows n·i … n·i + n - 1 being problem i's; draw j depends on (seed, problem id,
    j)."""
    policy = setting.policy
    rows = prefix if n == 1 else prefix.select(torch.arange(len(problems), device=policy.device).repeat_interleave(n))
    return policy.rollout(
        rows,
        setting.sampling,
        [seeded_generator(setting.seed, p.id, "rollout", j) for p in problems for j in range(n)],
        keep_states=keep_states,
        keep_logits=keep_logits,
        keep_top=keep_top,
    )


def score_rollouts(
    problems: Sequence[Problem],
    reward: AbstractReward,
    ids: Tensor,
    mask: Tensor,
    ledger: Ledger,
) -> tuple[Tensor, list[Track]]:
    """Rewards of n completions of each problem (rows n·i … are problem i's), and their encodings by the reward
    model."""
    n = len(ids) // len(problems)
    prefix = prefill_reward(problems, reward, ledger)
    if n > 1:
        prefix = prefix.select(torch.arange(len(problems), device=ids.device).repeat_interleave(n))
    with ledger.phase("score"):
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
