r"""One step of a sampler as a matrix on a listed space: the law of a chain after every step, without a random number.

`Kernel.apply` maps the law before a step to the law after it. Matrices are dense, so spaces up to a few thousand
sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nabla_rl.duality.exact import Law, kl_divergence, total_variation
from nabla_rl.duality.landscape import Landscape
from nabla_rl.samplers import discrete_langevin, gibbs_with_gradients
from nabla_rl.types import UserError

MAX_DENSE = 8192
"""Sequences at most of a dense matrix (half a gigabyte)."""
RESOLUTION = 64
"""Looks at a law between one doubling of the steps and the next, at least."""


@dataclass(frozen=True)
class Kernel:
    """A transition matrix, row = from, and how many gradients a step from each sequence needs in expectation."""

    matrix: Float[Tensor, "size size"]
    evaluations: Float[Tensor, " size"]

    def apply(self, probs: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """The law after a step, from the law before it; both as probabilities."""
        return probs @ self.matrix


def gibbs_with_gradients_kernel(landscape: Landscape, beta: float, temperature: float = 2.0) -> Kernel:
    """The exact transition matrix of `samplers.gibbs_with_gradients`."""
    space, every = landscape.space, _every(landscape)
    mask = torch.ones(space.size, space.length, dtype=torch.bool)
    gradient = landscape.energy_gradient(every, beta)
    log_q = gibbs_with_gradients.proposal_log_probs(gradient, space.tokens(), mask, temperature).flatten(1)
    dense = torch.full((space.size, space.size), -math.inf, dtype=torch.float64)
    # the substitutions that change nothing have probability zero, and must not overwrite one another
    dense.scatter_(1, space.substitutions(every).flatten(1), log_q)
    return _corrected(dense, landscape.energy(beta))


def discrete_langevin_kernel(landscape: Landscape, beta: float, step_size: float, *, corrected: bool = True) -> Kernel:
    """The exact transition matrix of `samplers.discrete_langevin`."""
    space, every = landscape.space, _every(landscape)
    gradient, tokens = landscape.energy_gradient(every, beta), space.tokens()
    log_q = discrete_langevin.proposal_log_probs(gradient, tokens, step_size)
    dense = torch.zeros(space.size, space.size, dtype=torch.float64)
    for position in range(space.length):
        dense += log_q[:, position, tokens[:, position]]
    return _corrected(dense, landscape.energy(beta), corrected=corrected)


def independence_kernel(landscape: Landscape, beta: float) -> Kernel:
    r"""Metropolis-Hastings with proposals from the policy: accept with :math:`\min(1, e^{(r(y') - r(y))/\beta})`.

    The sampler without a gradient. A step costs a rollout and a reward; `evaluations` counts it as one.
    """
    _every(landscape)
    dense = landscape.logps.expand(landscape.space.size, -1).clone()
    return _corrected(dense, landscape.energy(beta), counted_always=True)


def alternate(first: Kernel, second: Kernel) -> Kernel:
    """Each of the two with probability one half: what both leave alone stays, and each crosses what stops the
    other."""
    return Kernel((first.matrix + second.matrix) / 2, (first.evaluations + second.evaluations) / 2)


def _every(landscape: Landscape) -> Tensor:
    size = landscape.space.size
    if size > MAX_DENSE:
        raise UserError("landscape", f"at most {MAX_DENSE:,} sequences for a matrix", f"{size:,}")
    return torch.arange(size)


def _corrected(log_q: Tensor, energy: Law, *, corrected: bool = True, counted_always: bool = False) -> Kernel:
    """Proposals, tested: what is rejected stays."""
    moves = log_q.exp()
    stays = moves.diagonal().clone()
    if corrected:
        log_ratio = (energy[:, None] - energy[None]) + (log_q.T - log_q)
        moves = moves * log_ratio.clamp(max=0.0).nan_to_num(nan=-math.inf).exp()
    moves.fill_diagonal_(0.0)
    moves.diagonal().copy_((1.0 - moves.sum(1)).clamp(min=0.0))
    return Kernel(moves, torch.ones_like(stays) if counted_always else 1.0 - stays)


@dataclass(frozen=True)
class Convergence:
    """The law of a chain along its steps, against a target."""

    steps: list[int]
    """When the law was looked at: at first after every step, later about every hundredth of the way."""
    evaluations: list[float]
    """Gradients (or rollouts) that one chain has needed so far, in expectation; the start's own included."""
    kl: list[float]
    """KL(law‖target)."""
    tv: list[float]
    law: Law
    """After the last step."""

    def steps_to_tv(self, tv: float) -> int | None:
        """The first step after which the law was seen to be that near; None if it never was."""
        return next((step for step, value in zip(self.steps, self.tv, strict=True) if value <= tv), None)

    def evaluations_to_tv(self, tv: float) -> float | None:
        """What that took."""
        return next((spent for spent, value in zip(self.evaluations, self.tv, strict=True) if value <= tv), None)


def converge(
    kernel: Kernel, start: Law, target: Law, *, max_steps: int, kl: float = 1e-9, start_cost: float = 1.0
) -> Convergence:
    """Follow the law of a chain from `start` until KL(law‖target) is small or the steps are used up.

    Late steps are taken many at a time, by squares of the matrix, so that a chain that mixes in a million steps costs
    little more than one that mixes in a thousand. The last stride may go beyond `max_steps`.
    """
    probs, spent, step, stride = start.exp(), start_cost, 0, 1
    power, cost = kernel.matrix, kernel.evaluations  # of a whole stride
    steps, evaluations = [0], [spent]
    kls, tvs = [float(kl_divergence(start, target))], [total_variation(start, target)]
    while step < max_steps and not kls[-1] < kl:
        if step >= 2 * RESOLUTION * stride:
            power, cost, stride = power @ power, cost + power @ cost, 2 * stride
        spent += float(probs @ cost)
        probs = probs @ power
        step += stride
        law = probs.log()
        steps.append(step)
        evaluations.append(spent)
        kls.append(float(kl_divergence(law, target)))
        tvs.append(total_variation(law, target))
    return Convergence(steps, evaluations, kls, tvs, probs.log())


def law_after(kernel: Kernel, start: Law, steps: int) -> Law:
    """The law of a chain after exactly so many steps."""
    probs = start.exp()
    for _ in range(steps):
        probs = kernel.apply(probs)
    return probs.log()
