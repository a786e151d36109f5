r"""KL-regularised RL on a tabular policy: the weight side of the duality, with an exact or a sampled gradient.

It maximises :math:`J_\beta(\pi_\theta) = E_{\pi_\theta}[r] - \beta KL(\pi_\theta \| \pi)` from
:math:`\pi_\theta = \pi`. As :math:`J_\beta = \beta \log Z - \beta KL(\pi_\theta \| \rho^*)`, the distance to the best
value *is* the divergence to the tilted policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nabla_rl.duality.exact import Law, kl_divergence
from nabla_rl.duality.landscape import Landscape
from nabla_rl.duality.space import TabularPolicy


@dataclass
class Training:
    """A run of RL.

    Attributes:
        evaluations: sequences whose gradient had been taken when the divergence was recorded.
        kl: KL(π_θ‖ρ*) then.
        law: log π_θ at the end.
    """

    evaluations: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    law: Law = field(default_factory=lambda: torch.zeros(0))

    def evaluations_to(self, kl: float) -> float | None:
        """What the divergence first needed to be that small (at a recorded time); None if it never was."""
        return next((spent for spent, value in zip(self.evaluations, self.kl, strict=True) if value <= kl), None)


def train_exact(
    landscape: Landscape, beta: float, *, num_steps: int = 400, learning_rate: float = 0.1, start: Law | None = None
) -> Training:
    r"""Adam on the exact objective; every step reads every sequence once. The step size falls to zero by a cosine.

    Args:
        landscape: policy and reward.
        beta: KL coefficient.
        num_steps: updates.
        learning_rate: the first step size.
        start: where the weights start; default: the policy.
    """
    policy, target = _policy(landscape, start), landscape.tilted(beta)
    optimizer, schedule = _adam(policy, learning_rate, num_steps)
    training = Training()
    for step in range(num_steps + 1):
        law = policy()
        # -J/β + log Z, in nats whatever β is
        loss = kl_divergence(law, landscape.logps) - (law.exp() * landscape.rewards).sum() / beta
        if _recorded(step, num_steps):
            _record(training, step * landscape.space.size, law, target)
        if step < num_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return training


def train_sampled(
    landscape: Landscape,
    beta: float,
    *,
    num_steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 0.05,
    generator: torch.Generator | None = None,
    start: Law | None = None,
) -> Training:
    r"""REINFORCE with the leave-one-out baseline, on samples of the current policy.

    .. math:: \nabla J \approx \frac1n \sum_k \Big(R_k - \frac{1}{n-1} \sum_{j \ne k} R_j\Big) \nabla \log
        \pi_\theta(y_k), \qquad R = r - \beta \log (\pi_\theta / \pi)

    At the optimum :math:`R` is the same for every sequence, so the noise dies out as the weights arrive.

    References: Kool et al., 2019; Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, Eq. 6.
    """
    policy, target = _policy(landscape, start), landscape.tilted(beta)
    optimizer, schedule = _adam(policy, learning_rate, num_steps)
    training = Training()
    for step in range(num_steps + 1):
        if _recorded(step, num_steps):
            with torch.no_grad():
                _record(training, step * batch_size, policy(), target)
        if step < num_steps:
            tokens = policy.sample(batch_size, generator)
            loss = leave_one_out_loss(policy, landscape, tokens, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return training


def leave_one_out_loss(policy: TabularPolicy, landscape: Landscape, tokens: Tensor, beta: float) -> Tensor:
    """A scalar whose gradient estimates that of -J/β without bias, from samples (batch, length) of the policy."""
    index, logps = landscape.space.index(tokens), policy.per_token_logps(tokens).sum(-1)
    returns = landscape.rewards[index] / beta - logps.detach() + landscape.logps[index]
    count = len(tokens)
    advantages = (returns - returns.mean()) * count / (count - 1)
    return -(advantages * logps).mean()


def natural_gradient_law(landscape: Landscape, beta: float, time: float) -> Law:
    r"""Where the natural gradient flow of the objective is at a time: :math:`\rho_t \propto \pi^{e^{-t}}
    (\rho^*)^{1 - e^{-t}}`, the tilted policy of strength :math:`\lambda (1 - e^{-t})`.

    The flow :math:`\dot\rho = -\rho \, (\log(\rho/\rho^*) - KL(\rho \| \rho^*))` (Fisher-Rao) is linear in
    :math:`\log \rho`. So weights that are trained half-way are the optimum of a weaker reward.
    """
    strength = -math.expm1(-time)
    return landscape.tilted(beta / strength) if strength > 0 else landscape.logps


def _policy(landscape: Landscape, start: Law | None) -> TabularPolicy:
    return TabularPolicy.from_logps(landscape.logps if start is None else start, landscape.space)


def _adam(policy: TabularPolicy, learning_rate: float, num_steps: int):
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(num_steps, 1))


def _recorded(step: int, num_steps: int) -> bool:
    """Steps at which the divergence is computed: all at first, then ever fewer, and the last."""
    return step < 20 or step % max(1, 10 ** int(math.log10(step) - 1)) == 0 or step == num_steps


def _record(training: Training, evaluations: int, law: Tensor, target: Law) -> None:
    training.law = law.detach()
    training.evaluations.append(float(evaluations))
    training.kl.append(float(kl_divergence(training.law, target)))
