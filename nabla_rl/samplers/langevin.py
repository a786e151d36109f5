r"""Langevin dynamics on relaxed logits: DTO with the noise that makes it a sampler.

It samples logits :math:`z` (length × vocabulary) from

.. math:: p(z) \propto e^{-U(z)}, \qquad U(z) = L\big(\mathrm{onehot}(\arg\max z)\big) + \frac{\|z\|^2}{2 \sigma^2}

A Gaussian is the same for every token, so each choice of tokens has the same volume under it and the law of
:math:`\arg\max z` is *exactly* the tilted policy :math:`\rho^* \propto e^{-L}`. :math:`L` is constant between flips,
so its true gradient says nothing; the drift takes DTO's straight-through gradient instead (Gaussian pull: DTO's weight
decay):

.. math:: z' = z - h \Big(\frac{z}{\sigma^2} + \frac{1}{\tau} p \odot (g - p^\top g)\Big) + \sqrt{2h} \, \xi, \qquad
    g = \partial L / \partial y, \quad p = \mathrm{softmax}(z / \tau)

The drift is a function of :math:`z` alone, so the Metropolis-Hastings test (`corrected=True`) with the true :math:`U`
makes the law exact however biased the straight-through gradient is. Without the test the chain is the discretised flow
of the paper's theorem, with both biases. :math:`g` changes only when an argmax flips: only then are the models called.

References: Roberts and Tweedie, 1996 (Metropolis-adjusted Langevin); the flow: https://arxiv.org/abs/2603.04948,
Theorem 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.samplers.chain import (
    ChainInfo,
    ChainState,
    Generators,
    draw_normals,
    draw_uniforms,
    evaluate,
    propose,
    settle,
)
from nabla_rl.samplers.independence import independence_log_ratio
from nabla_rl.types import LogProbsFn, RewardFn, UserError


@dataclass(frozen=True)
class LangevinConfig:
    """Settings of the chain."""

    beta: float = 1.0
    """KL coefficient of the target, β = 1/λ; `inf` samples the policy."""
    step_size: float = 0.1
    """h. The drift moves by h, the noise by √(2h)."""
    scale: float = 1.0
    """σ of the Gaussian that confines the logits."""
    tau: float = 1.0
    """Temperature of the straight-through gradient (τ)."""
    corrected: bool = True
    """Whether proposals pass the Metropolis-Hastings test. Without it the law is only near the target."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("beta", "step_size", "scale", "tau"):
            if not self.__dict__[name] > 0:
                raise UserError(f"{name}", "positive", str(self.__dict__[name]))


class LangevinState(NamedTuple):
    """Logits, and the chain of their argmax with what the models say there."""

    logits: Float[Tensor, "chains length support"]
    chain: ChainState

    @property
    def tokens(self) -> Tensor:
        """The argmax, (chains, length)."""
        return self.chain.tokens


def init(
    logits: Float[Tensor, "chains length support"],
    mask: Bool[Tensor, "chains length"],
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: LangevinConfig,
) -> LangevinState:
    """Chains that start at `logits`; padded positions keep theirs for ever."""
    logits = F.upcast(logits).detach().clone()
    if logits.ndim != 3 or mask.shape != logits.shape[:2]:
        raise UserError(
            "logits",
            "(chains, length, support) and `mask` (chains, length)",
            f"{tuple(logits.shape)} and {tuple(mask.shape)}",
        )
    chain = evaluate(F.argmax(logits), mask, logits.shape[-1], log_probs_fn, reward_fn, beta=config.beta)
    return LangevinState(logits, chain)


@torch.no_grad()
def step(
    state: LangevinState,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: LangevinConfig,
    generator: Generators = None,
) -> tuple[LangevinState, ChainInfo]:
    """One noisy step of the logits of every chain, and the test of it."""
    h, mask = config.step_size, state.chain.mask[..., None]
    noise = draw_normals(generator, state.logits)
    uniform = draw_uniforms(generator, len(state.logits), 1, state.logits.device)[:, 0]
    mean = state.logits + h * _drift(state, config)
    logits = torch.where(mask, mean + (2 * h) ** 0.5 * noise, state.logits)
    chain, moved = propose(state.chain, F.argmax(logits), log_probs_fn, reward_fn, beta=config.beta)
    proposed = LangevinState(logits, chain)
    log_ratio = torch.zeros_like(uniform)
    if config.corrected:
        back = state.logits - logits - h * _drift(proposed, config)
        squares = (noise.square() * 2 * h - back.square()).masked_fill(~mask, 0.0).double().sum((1, 2))
        log_ratio = _potential(state, config) - _potential(proposed, config) + squares / (4 * h)
    return _settle(state, proposed, log_ratio, uniform, moved)


@torch.no_grad()
def jump(
    state: LangevinState,
    rollouts: Int[Tensor, "chains length"],
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: LangevinConfig,
    generator: Generators = None,
) -> tuple[LangevinState, ChainInfo]:
    r"""Test logits drawn afresh around one rollout of the policy for each chain: what crosses between modes.

    Proposed are tokens :math:`y' \sim \pi` and the Gaussian's logits given that argmax. Its density is
    :math:`\pi(y') \phi(z')` up to a constant, so the test is that of `samplers.independence`:
    :math:`\min(1, e^{(r(y') - r(y)) / \beta})`.
    """
    uniform = draw_uniforms(generator, len(state.logits), 1, state.logits.device)[:, 0]
    tokens = torch.where(state.chain.mask, rollouts, state.chain.tokens)
    fresh = logits_at(tokens, state.logits, config.scale, generator)
    logits = torch.where(state.chain.mask[..., None], fresh, state.logits)
    chain, moved = propose(state.chain, tokens, log_probs_fn, reward_fn, beta=config.beta)
    log_ratio = independence_log_ratio(state.chain, chain)
    return _settle(state, LangevinState(logits, chain), log_ratio, uniform, moved)


def logits_at(
    tokens: Int[Tensor, "chains length"],
    like: Float[Tensor, "chains length support"],
    scale: float,
    generator: Generators = None,
) -> Float[Tensor, "chains length support"]:
    """Logits from N(0, scale²) given that their argmax is `tokens`; shape and dtype are those of `like`.

    The Gaussian treats all tokens alike, so exchanging the largest entry of each position with the token's leaves the
    law of the rest as it is.
    """
    logits = scale * draw_normals(generator, like)
    best, wanted = logits.argmax(-1, keepdim=True), tokens[..., None]
    high, low = logits.gather(-1, best), logits.gather(-1, wanted)
    return logits.scatter(-1, best, low).scatter(-1, wanted, high)


def _settle(
    state: LangevinState, proposed: LangevinState, log_ratio: Tensor, uniform: Tensor, moved: Tensor
) -> tuple[LangevinState, ChainInfo]:
    chain, info = settle(state.chain, proposed.chain, log_ratio, uniform, moved)
    return LangevinState(torch.where(info.accepted[:, None, None], proposed.logits, state.logits), chain), info


def _drift(state: LangevinState, config: LangevinConfig) -> Tensor:
    gradient = state.chain.gradient.to(state.logits.dtype)
    return -state.logits / config.scale**2 - F.straight_through_vjp(state.logits, gradient, config.tau)


def _potential(state: LangevinState, config: LangevinConfig) -> Tensor:
    squares = state.logits.square().masked_fill(~state.chain.mask[..., None], 0.0).double().sum((1, 2))
    return state.chain.energy.double() + squares / (2 * config.scale**2)
