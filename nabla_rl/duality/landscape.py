r"""A policy, a reward and their token gradients at every sequence of a space: what samplers and decoders walk on.

At one-hot tokens :math:`y` the gradient :math:`\partial L / \partial y` is a function of the sequence alone. So on a
listed space the models are asked once for each sequence, and any number of chains then run on what they said. Two
kinds of gradient:

* of a table, extended to soft tokens multilinearly: its first-order change *is* the true change of every single-token
  substitution;
* of networks, through their embeddings: what real decoding has, right to first order in a direction that is not small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.duality.exact import Law, gibbs_policy
from nabla_rl.duality.space import Space, conditionals
from nabla_rl.types import UserError


@dataclass(frozen=True)
class Landscape:
    """Policy and reward on a space.

    Attributes:
        space: the sequences.
        logps: log π, normalised, (size,) float64.
        rewards: r, (size,) float64.
        logps_gradient: ∂ log π/∂y at each sequence, (size, length, vocab), up to a constant for each position; None:
            the exact changes of a table.
        rewards_gradient: ∂r/∂y likewise.
    """

    space: Space
    logps: Law
    rewards: Law
    logps_gradient: Tensor | None = None
    rewards_gradient: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the law is one."""
        size = self.space.size
        for name in ("logps", "rewards"):
            found = getattr(self, name)
            if tuple(found.shape) != (size,) or found.dtype != torch.float64:
                raise UserError(f"{name}", f"float64 of shape ({size},)", f"{found.dtype} {list(found.shape)}")
        if not bool(self.rewards.isfinite().all()):
            raise UserError("rewards", "finite", "NaN or infinity")
        total = float(self.logps.logsumexp(0))
        if not abs(total) < 1e-6:
            raise UserError("logps", "normalised", f"a total of exp({total:.3g})", "Subtract its logsumexp.")

    @cached_property
    def conditionals(self) -> list[Float[Tensor, "prefixes vocab"]]:
        """The policy's autoregressive factors."""
        return conditionals(self.logps, self.space)

    def with_policy(self, logps: Law) -> Landscape:
        """The same reward under another policy, a table."""
        return replace(self, logps=logps, logps_gradient=None)

    def tilted(self, beta: float) -> Law:
        """The tilted policy."""
        return gibbs_policy(self.logps, self.rewards, beta)

    def energy(self, beta: float) -> Law:
        """The energy -r/β - log π of every sequence."""
        return -self.rewards / beta - self.logps

    def next_log_probs(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch length vocab"]:
        r""":math:`\log \pi(\cdot \mid y_{<i})` at every position of these sequences."""
        space = self.space
        prefixes = [index // space.vocab ** (space.length - i) for i in range(space.length)]
        return torch.stack([table[p] for table, p in zip(self.conditionals, prefixes, strict=True)], 1)

    def gradients(
        self, index: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch length vocab"], Float[Tensor, "batch length vocab"]]:
        """∂ log π/∂y and ∂r/∂y at these sequences, the first up to a constant for each position."""
        neighbours = self.space.substitutions(index) if self.logps_gradient is None else None
        if self.rewards_gradient is None and neighbours is None:
            neighbours = self.space.substitutions(index)
        of_logps = self.logps[neighbours] if self.logps_gradient is None else self.logps_gradient[index]
        of_rewards = self.rewards[neighbours] if self.rewards_gradient is None else self.rewards_gradient[index]
        return of_logps, of_rewards

    def energy_gradient(self, index: Int[Tensor, " batch"], beta: float) -> Float[Tensor, "batch length vocab"]:
        """∂L/∂y at these sequences, up to a constant for each position."""
        of_logps, of_rewards = self.gradients(index)
        return -of_logps - of_rewards / beta

    def log_probs_fn(self, tokens: F.SoftTokens, rows: Tensor) -> Tensor:
        """The policy as `nabla_rl.dto` and the samplers see it, at one-hot tokens: a `LogProbsFn`.

        The gradient of later tokens is carried by the last position as a summand of value zero.
        """
        del rows
        index = self.space.index(tokens.hard())
        log_probs = self.next_log_probs(index)
        if not tokens.probs.requires_grad or not torch.is_grad_enabled():
            return log_probs
        postfix = self.gradients(index)[0] - log_probs
        change = ((tokens.probs - tokens.probs.detach()) * postfix).sum((1, 2))
        return torch.cat([log_probs[:, :-1], log_probs[:, -1:] + change[:, None, None]], 1)

    def reward_fn(self, tokens: F.SoftTokens, rows: Tensor) -> Tensor:
        """The reward likewise: a `RewardFn`."""
        del rows
        index = self.space.index(tokens.hard())
        if not tokens.probs.requires_grad or not torch.is_grad_enabled():
            return self.rewards[index]
        change = ((tokens.probs - tokens.probs.detach()) * self.gradients(index)[1]).sum((1, 2))
        return self.rewards[index] + change


def random_landscape(
    vocab: int, length: int, *, seed: int = 0, policy_scale: float = 1.0, reward_scale: float = 1.0
) -> Landscape:
    """A table: independent normal logits after every prefix; a reward of single tokens and neighbouring pairs, with
    standard deviation `reward_scale` under the uniform law."""
    space, generator = Space(vocab, length), F.seeded_generator("landscape", vocab, length, seed)
    logps = torch.zeros(1, dtype=torch.float64)
    for position in range(length):
        table = policy_scale * torch.randn(vocab**position, vocab, generator=generator, dtype=torch.float64)
        logps = (logps[:, None] + table.log_softmax(-1)).flatten()
    tokens = space.tokens()
    single = torch.randn(length, vocab, generator=generator, dtype=torch.float64)
    rewards = single[torch.arange(length), tokens].sum(-1)
    if length > 1:
        pairs = torch.randn(length - 1, vocab, vocab, generator=generator, dtype=torch.float64)
        rewards = rewards + pairs[torch.arange(length - 1), tokens[:, :-1], tokens[:, 1:]].sum(-1)
    rewards = (rewards - rewards.mean()) / rewards.std() * reward_scale
    return Landscape(space, logps - logps.logsumexp(0), rewards)
