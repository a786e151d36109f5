r"""Independence Metropolis from the policy: propose a fresh rollout, accept it by its reward.

It samples :math:`\rho^*(y) \propto \pi(y \mid x) \, e^{r(x, y) / \beta}`. With proposals :math:`y' \sim \pi` the test
is :math:`\min(1, e^{(r(y') - r(y)) / \beta})`: the policy cancels, and no gradient is needed. No mode is out of
reach, so alternated with a local sampler (`gibbs_with_gradients`, `discrete_langevin`; `langevin.jump` for logits) it
crosses what stops that one, and the state it leaves is one that they go on from. Alone, the share of proposals that is
accepted falls exponentially as :math:`1/\beta` grows.

References: Tierney, 1994 (independence chains); alternating kernels that leave the same law: the same, Section 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nabla_rl.samplers.chain import ChainInfo, ChainState, Generators, draw_uniforms, propose, settle
from nabla_rl.samplers.chain import init as init_chain
from nabla_rl.types import LogProbsFn, RewardFn, UserError


@dataclass(frozen=True)
class IndependenceConfig:
    """Settings of the chain."""

    beta: float = 1.0
    """KL coefficient of the target, β = 1/λ; `inf` samples the policy."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.beta > 0:
            raise UserError("beta", "positive", str(self.beta))


def init(
    tokens: Int[Tensor, "chains length"],
    mask: Bool[Tensor, "chains length"],
    support: int,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: IndependenceConfig,
) -> ChainState:
    """Chains that start at `tokens`."""
    return init_chain(tokens, mask, support, log_probs_fn, reward_fn, beta=config.beta)


@torch.no_grad()
def step(
    state: ChainState,
    rollouts: Int[Tensor, "chains length"],
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: IndependenceConfig,
    generator: Generators = None,
) -> tuple[ChainState, ChainInfo]:
    """Test one rollout of the policy for each chain, drawn independently of where the chains stand."""
    uniform = draw_uniforms(generator, len(state.tokens), 1, state.tokens.device)[:, 0]
    tokens = torch.where(state.mask, rollouts, state.tokens)
    proposed, moved = propose(state, tokens, log_probs_fn, reward_fn, beta=config.beta)
    return settle(state, proposed, independence_log_ratio(state, proposed), uniform, moved)


def independence_log_ratio(state: ChainState, proposed: ChainState) -> Float[Tensor, " chains"]:
    r""":math:`(r(y') - r(y)) / \beta`, from energies and log-probabilities; float64."""
    return (state.energy + state.logps).double() - (proposed.energy + proposed.logps).double()
