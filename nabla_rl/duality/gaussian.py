r"""The continuous case in closed form: :math:`\pi = N(0, I)`, :math:`r(y) = a^\top y`, so :math:`\rho^* = N(a/\beta,
I)`.

Here the theorem can be followed by hand. With noise, discretised by steps :math:`h`,

.. math:: y' = y - h (y - a / \beta) + \sqrt{2h} \, \xi

keeps a Gaussian Gaussian, so its law is known after every step; it ends at mean :math:`a/\beta` and variance
:math:`1/(1 - h/2)`, which is 1 only for small steps. Without noise every sample ends at the mode.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nabla_rl.types import UserError


class GaussianLaw(NamedTuple):
    """Independent coordinates of equal variance."""

    mean: Float[Tensor, " dim"]
    variance: float


def target_law(direction: Float[Tensor, " dim"], beta: float) -> GaussianLaw:
    """The tilted law: the policy, moved by a/β."""
    return GaussianLaw(direction / beta, 1.0)


def stationary_variance(step_size: float) -> float:
    """Variance of the unadjusted chain, 1 / (1 - h/2); it has none for h ≥ 2."""
    if not 0 < step_size < 2:
        raise UserError("step_size", "in (0, 2)", str(step_size), "Beyond, the chain has no law.")
    return 1 / (1 - step_size / 2)


def langevin_law(
    direction: Float[Tensor, " dim"], beta: float, *, step_size: float, steps: int, noise: bool = True
) -> GaussianLaw:
    r"""The law of the chain after `steps` steps from the policy: mean :math:`(1 - (1-h)^t) a/\beta`, variance
    :math:`(1-h)^{2t} + v (1 - (1-h)^{2t})` with the stationary :math:`v`, or :math:`(1-h)^{2t}` without noise."""
    kept = (1 - step_size) ** steps
    variance = kept**2 + (stationary_variance(step_size) * (1 - kept**2) if noise else 0.0)
    return GaussianLaw((1 - kept) * direction / beta, variance)


def gaussian_kl(law: GaussianLaw, other: GaussianLaw) -> float:
    """KL(law‖other) in nats; infinite for a law without variance."""
    if law.variance == 0:
        return math.inf
    ratio, dim = law.variance / other.variance, law.mean.numel()
    shift = float((law.mean - other.mean).square().sum()) / other.variance
    return 0.5 * (shift + dim * (ratio - 1 - math.log(ratio)))


def simulate(
    direction: Float[Tensor, " dim"],
    beta: float,
    *,
    step_size: float,
    steps: int,
    chains: int,
    generator: torch.Generator | None = None,
    noise: bool = True,
) -> Float[Tensor, "chains dim"]:
    """The same chain run on samples, float64."""
    goal = direction.double() / beta
    samples = torch.randn(chains, len(goal), dtype=torch.float64, generator=generator)
    for _ in range(steps):
        samples = samples + step_size * (goal - samples)
        if noise:
            shake = torch.randn(samples.shape, dtype=torch.float64, generator=generator)
            samples = samples + math.sqrt(2 * step_size) * shake
    return samples
