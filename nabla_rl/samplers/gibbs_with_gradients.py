r"""Gibbs-with-gradients: change the one token that the gradient of the energy likes best, and test the change.

It samples :math:`\rho^*(y) \propto e^{-L(y)}`. From :math:`y` a position :math:`i` and a new token :math:`v` are drawn
together,

.. math:: q(i, v \mid y) \propto \exp\big(-\tfrac12 (g_i[v] - g_i[y_i])\big), \quad v \ne y_i, \qquad
    g = \partial L / \partial y

and the change is accepted with probability :math:`\min(1, e^{L(y) - L(y')} q(i, y_i \mid y') / q(i, v \mid y))`. The
gradient only steers; the test makes the law right whatever the gradient is. A step costs one gradient of each model.

References: Grathwohl et al., 2021, https://arxiv.org/abs/2102.04509, Eq. 4 and Algorithm 1. There a token may also be
proposed where it stands; here every proposal is a change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.samplers.chain import ChainInfo, ChainState, Generators, draw_uniforms, propose, settle
from nabla_rl.samplers.chain import init as init_chain
from nabla_rl.types import LogProbsFn, RewardFn, UserError


@dataclass(frozen=True)
class GibbsWithGradientsConfig:
    """Settings of the chain."""

    beta: float = 1.0
    """KL coefficient of the target, β = 1/λ; `inf` samples the policy."""
    temperature: float = 2.0
    """Divides the first-order change of the energy in the proposal; 2 is the locally balanced choice."""
    corrected: bool = True
    """Whether proposals pass the Metropolis-Hastings test. Without it the law is wrong."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("beta", "temperature"):
            if not self.__dict__[name] > 0:
                raise UserError(f"{name}", "positive", str(self.__dict__[name]))


def proposal_log_probs(
    gradient: Float[Tensor, "chains length support"],
    tokens: Int[Tensor, "chains length"],
    mask: Bool[Tensor, "chains length"],
    temperature: float = 2.0,
) -> Float[Tensor, "chains length support"]:
    r""":math:`\log q(i, v \mid y)` of every change, float64; :math:`-\infty` for what is none and at padding."""
    gradient, current = gradient.double(), tokens[..., None]
    scores = (gradient.gather(-1, current) - gradient) / temperature
    scores = scores.scatter(-1, current, -math.inf).masked_fill(~mask[..., None], -math.inf)
    return scores.flatten(1).log_softmax(-1).view_as(scores)


def init(
    tokens: Int[Tensor, "chains length"],
    mask: Bool[Tensor, "chains length"],
    support: int,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: GibbsWithGradientsConfig,
) -> ChainState:
    """Chains that start at `tokens`; every chain needs a position that can change."""
    if support < 2 or not bool(mask.any(dim=1).all()):
        raise UserError(
            "mask", "a position in every chain, and a support of two tokens", "less", "Nothing could change."
        )
    return init_chain(tokens, mask, support, log_probs_fn, reward_fn, beta=config.beta)


@torch.no_grad()
def step(
    state: ChainState,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: GibbsWithGradientsConfig,
    generator: Generators = None,
) -> tuple[ChainState, ChainInfo]:
    """Propose one change of one token in every chain, and accept or reject it."""
    uniform = draw_uniforms(generator, len(state.tokens), 2, state.tokens.device)
    forward = proposal_log_probs(state.gradient, state.tokens, state.mask, config.temperature)
    chosen = F.categorical_from_uniform(forward.flatten(1), uniform[:, 0])
    position, token = chosen // forward.shape[-1], (chosen % forward.shape[-1])[:, None]
    old = state.tokens.gather(1, position[:, None])
    tokens = state.tokens.scatter(1, position[:, None], token)
    proposed, moved = propose(state, tokens, log_probs_fn, reward_fn, beta=config.beta)
    log_ratio = torch.zeros_like(uniform[:, 0])
    if config.corrected:
        backward = proposal_log_probs(proposed.gradient, tokens, state.mask, config.temperature)
        rows = torch.arange(len(tokens), device=tokens.device)
        back = backward[rows, position, old[:, 0]] - forward[rows, position, token[:, 0]]
        log_ratio = (state.energy - proposed.energy).double() + back
    return settle(state, proposed, log_ratio, uniform[:, 1], moved)
