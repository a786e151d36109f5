r"""The discrete Langevin proposal: every token may change at once, each by its own piece of the gradient.

It samples :math:`\rho^*(y) \propto e^{-L(y)}`. Langevin's Gaussian proposal, restricted to the vertices of the
simplices, factorises over positions:

.. math:: q_i(v \mid y) \propto \exp\Big(-\tfrac12 (g_i[v] - g_i[y_i]) - \tfrac{1}{\alpha} [v \ne y_i]\Big), \qquad
    g = \partial L / \partial y

(two vertices are :math:`\sqrt 2` apart, so the paper's :math:`\|\cdot\|^2 / 2\alpha` is :math:`1/\alpha`). With the
Metropolis-Hastings test the law is right whatever the gradient is; without it (`corrected=False`) the chain is cheaper
to reason about and biased. A step costs one gradient of each model, and nothing if no token is to change.

References: Zhang et al., 2022, https://arxiv.org/abs/2206.09914, Eq. 4 and 5 (DULA without, DMALA with the test).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.samplers.chain import ChainInfo, ChainState, Generators, draw_uniforms, propose, settle
from nabla_rl.samplers.chain import init as init_chain
from nabla_rl.types import LogProbsFn, RewardFn, UserError


@dataclass(frozen=True)
class DiscreteLangevinConfig:
    """Settings of the chain."""

    beta: float = 1.0
    """KL coefficient of the target, β = 1/λ; `inf` samples the policy."""
    step_size: float = 0.5
    """α: the larger, the more tokens change in a step, and the fewer proposals are accepted."""
    corrected: bool = True
    """Whether proposals pass the Metropolis-Hastings test. Without it the law is only near the target."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("beta", "step_size"):
            if not self.__dict__[name] > 0:
                raise UserError(f"{name}", "positive", str(self.__dict__[name]))


def proposal_log_probs(
    gradient: Float[Tensor, "chains length support"], tokens: Int[Tensor, "chains length"], step_size: float
) -> Float[Tensor, "chains length support"]:
    r""":math:`\log q_i(v \mid y)` of every position, float64."""
    gradient, current = gradient.double(), tokens[..., None]
    scores = (gradient.gather(-1, current) - gradient) / 2 - 1 / step_size
    return scores.scatter(-1, current, 0.0).log_softmax(-1)


def init(
    tokens: Int[Tensor, "chains length"],
    mask: Tensor,
    support: int,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: DiscreteLangevinConfig,
) -> ChainState:
    """Chains that start at `tokens`."""
    return init_chain(tokens, mask, support, log_probs_fn, reward_fn, beta=config.beta)


@torch.no_grad()
def step(
    state: ChainState,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: DiscreteLangevinConfig,
    generator: Generators = None,
) -> tuple[ChainState, ChainInfo]:
    """Propose new tokens for every position of every chain at once, and accept or reject them together."""
    length = state.tokens.shape[1]
    uniform = draw_uniforms(generator, len(state.tokens), length + 1, state.tokens.device)
    forward = proposal_log_probs(state.gradient, state.tokens, config.step_size)
    drawn = F.categorical_from_uniform(forward, uniform[:, :length])
    tokens = torch.where(state.mask, drawn, state.tokens)
    proposed, moved = propose(state, tokens, log_probs_fn, reward_fn, beta=config.beta)
    log_ratio = torch.zeros_like(uniform[:, 0])
    if config.corrected:
        backward = proposal_log_probs(proposed.gradient, tokens, config.step_size)
        there, back = _logps(forward, tokens, state.mask), _logps(backward, state.tokens, state.mask)
        log_ratio = (state.energy - proposed.energy).double() + back - there
    return settle(state, proposed, log_ratio, uniform[:, length], moved)


def _logps(log_probs: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return F.sequence_logps(log_probs.gather(-1, tokens[..., None]).squeeze(-1), mask)
