r"""The tilted policy and its neighbours, exactly: laws are log-probabilities (size,) in float64.

With policy :math:`\pi`, reward :math:`r` and KL coefficient :math:`\beta = 1/\lambda`:

.. math:: \rho^*(y) = \pi(y) e^{r(y)/\beta} / Z, \qquad J_\beta(\rho) = E_\rho[r] - \beta \, KL(\rho \| \pi)
    = \beta \log Z - \beta \, KL(\rho \| \rho^*)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nabla_rl.types import UserError

Law = Float[Tensor, " size"]


def gibbs_policy(logps: Law, rewards: Law, beta: float) -> Law:
    r"""The tilted policy :math:`\log \rho^* = \log \pi + r / \beta - \log Z`; `beta=inf` gives the policy back."""
    _check_beta(beta)
    return torch.log_softmax(logps.double() + rewards.double() / beta, dim=0)


def log_partition(logps: Law, rewards: Law, beta: float) -> float:
    r""":math:`\log Z = \log \sum_y \pi(y) e^{r(y) / \beta}`; :math:`\beta \log Z` is the objective's best value."""
    _check_beta(beta)
    return float((logps.double() + rewards.double() / beta).logsumexp(0))


def objective(law: Law, logps: Law, rewards: Law, beta: float) -> Tensor:
    r""":math:`J_\beta(\rho) = E_\rho[r] - \beta KL(\rho \| \pi)`, differentiable in the law."""
    return expected_reward(law, rewards) - beta * kl_divergence(law, logps)


def kl_divergence(law: Law, other: Law) -> Tensor:
    r""":math:`KL(\rho \| \mu) = \sum_y \rho(y) [\log \rho(y) - \log \mu(y)]` in nats; infinite where :math:`\mu`
    misses what :math:`\rho` has."""
    difference = (law - other).masked_fill(law.isneginf(), 0.0)
    return (law.exp() * difference).sum()


def total_variation(law: Law, other: Law) -> float:
    r""":math:`\frac12 \sum_y |\rho(y) - \mu(y)|`, between 0 and 1."""
    return float((law.exp() - other.exp()).abs().sum() / 2)


def expected_reward(law: Law, rewards: Law) -> Tensor:
    r""":math:`E_\rho[r]`."""
    return (law.exp() * rewards).sum()


def entropy(law: Law) -> float:
    r""":math:`-\sum_y \rho(y) \log \rho(y)` in nats."""
    return float(-(law.exp() * law.masked_fill(law.isneginf(), 0.0)).sum())


def empirical_law(index: Int[Tensor, " samples"], size: int) -> Law:
    """The law of a set of samples, given by their numbers; minus infinity for what was not drawn."""
    return (torch.bincount(index, minlength=size).double() / len(index)).log()


def expected_iid_tv(law: Law, samples: int) -> float:
    r"""Mean total variation between a law and the empirical law of that many independent draws.

    It is exact, by de Moivre's formula for the mean absolute deviation of a binomial :math:`X`,

    .. math:: E|X - np| = 2 (k + 1) \binom{n}{k + 1} p^{k + 1} (1 - p)^{n - k}, \qquad k = \lfloor np \rfloor

    References: Diaconis and Zabell, 1991, Theorem 1.
    """
    p, n = law.exp().double(), float(samples)
    k = (n * p).floor().clamp(max=n - 1)
    log_choose = math.lgamma(n + 1) - torch.lgamma(k + 2) - torch.lgamma(n - k)
    inside = log_choose + (k + 1) * p.log() + (n - k) * torch.log1p(-p.clamp(max=1 - 1e-16))
    deviation = (2 * (k + 1) * inside.exp()).masked_fill(p == 0, 0.0)
    return float(deviation.sum() / (2 * n))


def iid_tv_spread(law: Law, samples: int, generator: torch.Generator | None = None, repeats: int = 64) -> float:
    """Standard deviation of that total variation, from repeated draws."""
    probs = law.exp()
    drawn = torch.multinomial(probs, samples * repeats, replacement=True, generator=generator).view(repeats, samples)
    return float(torch.tensor([total_variation(empirical_law(one, len(law)), law) for one in drawn]).std())


class Placement(NamedTuple):
    """Where a law stands with respect to the tilted policy."""

    tv: float
    reverse_kl: float  # KL(law‖target), infinite where the target excludes what the law has
    forward_kl: float  # KL(target‖law), infinite where the law misses what the target has
    reward: float
    reward_excess: float  # reward less the target's: above 0 is over-optimised
    entropy: float
    entropy_excess: float  # entropy less the target's: below 0 is mode-seeking
    policy_kl: float  # KL(law‖policy)
    objective_gap: float  # β log Z - J(law) = β KL(law‖target)
    lambda_eff: float  # λ of the tilted law nearest in KL(law‖·): the one of equal reward; may be negative or infinite
    kl_at_lambda_eff: float
    lambda_eff_tv: float  # λ of the tilted law nearest in total variation
    tv_at_lambda_eff: float


def place(law: Law, logps: Law, rewards: Law, beta: float) -> Placement:
    """Hold a law against the tilted policy at `beta`, and find the strength at which it fits best."""
    target = gibbs_policy(logps, rewards, beta)
    reward, spread = float(expected_reward(law, rewards)), entropy(law)
    by_kl, by_tv = fit_lambda(law, logps, rewards), fit_lambda_tv(law, logps, rewards, around=1 / beta)
    reverse = float(kl_divergence(law, target))
    return Placement(
        total_variation(law, target),
        reverse,
        float(kl_divergence(target, law)),
        reward,
        reward - float(expected_reward(target, rewards)),
        spread,
        spread - entropy(target),
        float(kl_divergence(law, logps)),
        beta * reverse,
        by_kl,
        math.inf if math.isinf(by_kl) else float(kl_divergence(law, tilt(logps, rewards, by_kl))),
        by_tv,
        total_variation(law, tilt(logps, rewards, by_tv)),
    )


def tilt(logps: Law, rewards: Law, strength: float) -> Law:
    r""":math:`\log \pi + \lambda r - \log Z` for any real :math:`\lambda`, given as `strength`."""
    return torch.log_softmax(logps.double() + strength * rewards.double(), dim=0)


def fit_lambda(law: Law, logps: Law, rewards: Law, *, limit: float = 1e4) -> float:
    r"""The :math:`\lambda` that minimises :math:`KL(\rho \| \rho^*_\lambda)`: the one whose tilted law has
    :math:`\rho`'s reward.

    The divergence is convex in :math:`\lambda` with derivative :math:`E_{\rho^*_\lambda}[r] - E_\rho[r]`, so bisection
    finds it. A law whose reward is the space's best or worst, to rounding, needs an infinite one, and so does one
    beyond ±`limit`.
    """
    goal = float(expected_reward(law, rewards))
    best, worst = float(rewards.max()), float(rewards.min())
    if min(best - goal, goal - worst) <= 1e-12 * (best - worst):
        return math.inf if best - goal <= goal - worst else -math.inf

    def excess(strength: float) -> float:
        return float(expected_reward(tilt(logps, rewards, strength), rewards)) - goal

    low, high = -1.0, 1.0
    while excess(high) < 0:
        low, high = high, 2 * high
        if high > limit:
            return math.inf
    while excess(low) > 0:
        low, high = 2 * low, min(low, high)
        if low < -limit:
            return -math.inf
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def fit_lambda_tv(law: Law, logps: Law, rewards: Law, *, around: float = 1.0) -> float:
    r"""The :math:`\lambda \ge 0` that minimises the total variation to :math:`\rho^*_\lambda`: a grid, then a golden
    section. The minimum need not be unique."""

    def distance(strength: float) -> float:
        return total_variation(law, tilt(logps, rewards, strength))

    grid = [0.0, *(around * 10 ** (k / 8) for k in range(-24, 25))]
    best = min(range(len(grid)), key=lambda k: distance(grid[k]))
    return _golden_section(distance, grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])


def _golden_section(function: Callable[[float], float], low: float, high: float, rounds: int = 40) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(rounds):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (low + high) / 2


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise UserError("beta", "positive (inf leaves the reward out)", str(beta))
