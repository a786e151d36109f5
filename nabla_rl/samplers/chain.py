r"""What the discrete samplers share: many chains of tokens at once, the energy and gradient where they stand, and the
Metropolis-Hastings test.

The target is the tilted policy :math:`\rho^*(y) \propto e^{-L(y)} = \pi(y \mid x) \, e^{r(x, y) / \beta}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.types import LogProbsFn, RewardFn, UserError

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for all chains, or one for each: then a chain does not depend on which others run beside it."""


class ChainState(NamedTuple):
    """Where every chain stands, and what the models say there."""

    tokens: Int[Tensor, "chains length"]  # indices into the support
    mask: Bool[Tensor, "chains length"]
    gradient: Float[Tensor, "chains length support"]  # ∂L/∂y at `tokens`, 0 at padding
    energy: Float[Tensor, " chains"]
    reward: Float[Tensor, " chains"]
    logps: Float[Tensor, " chains"]
    step: int = 0


class ChainInfo(NamedTuple):
    """What happened in a step; energy, reward and logps are those after it."""

    energy: Tensor  # (chains,)
    reward: Tensor  # (chains,)
    logps: Tensor  # (chains,)
    acceptance_probability: Tensor  # (chains,) of the proposal; 1 without the correction
    accepted: Tensor  # (chains,)
    evaluated: Tensor  # (chains,) whether the models were called: not for a proposal that is where the chain stands


def init(
    tokens: Int[Tensor, "chains length"],
    mask: Bool[Tensor, "chains length"],
    support: int,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    *,
    beta: float,
) -> ChainState:
    """Chains that start at `tokens` (indices below `support`), at the price of one gradient for each."""
    if tokens.shape != mask.shape or tokens.ndim != 2:
        raise UserError("tokens", "(chains, length) as `mask` is", f"{tuple(tokens.shape)} and {tuple(mask.shape)}")
    if not beta > 0:
        raise UserError("beta", "positive (inf leaves the reward out)", str(beta))
    return evaluate(tokens, mask, support, log_probs_fn, reward_fn, beta=beta)


@torch.inference_mode(False)
@torch.no_grad()
def evaluate(
    tokens: Int[Tensor, "chains length"],
    mask: Bool[Tensor, "chains length"],
    support: int,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    *,
    beta: float,
    rows: Int[Tensor, " chains"] | None = None,
) -> ChainState:
    """Energy and gradient at one-hot tokens: a forward and a backward of both models."""
    rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
    probs = torch.zeros(*tokens.shape, support, device=tokens.device).scatter_(-1, tokens[..., None], 1.0)
    found = F.energy_gradient(probs, mask, rows, log_probs_fn, reward_fn, beta=beta, tokens=tokens)
    assert found.gradient is not None
    return ChainState(tokens, mask, found.gradient, found.energy, found.reward, found.logps)


def propose(
    state: ChainState,
    tokens: Int[Tensor, "chains length"],
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    *,
    beta: float,
) -> tuple[ChainState, Bool[Tensor, " chains"]]:
    """The state that holds `tokens` instead, and which chains needed the models for it."""
    moved = (tokens != state.tokens).any(dim=1)
    rows = moved.nonzero().squeeze(1)
    if not len(rows):
        return state, moved
    support = state.gradient.shape[-1]
    new = evaluate(tokens[rows], state.mask[rows], support, log_probs_fn, reward_fn, beta=beta, rows=rows)
    if len(rows) == len(moved):
        return new._replace(step=state.step), moved
    values = {
        name: getattr(state, name).index_copy(0, rows, getattr(new, name).to(getattr(state, name).dtype))
        for name in ("tokens", "gradient", "energy", "reward", "logps")
    }
    return state._replace(**values), moved


def settle(
    state: ChainState,
    proposed: ChainState,
    log_ratio: Float[Tensor, " chains"],
    uniform: Float[Tensor, " chains"],
    evaluated: Bool[Tensor, " chains"],
) -> tuple[ChainState, ChainInfo]:
    """Accept with probability min(1, exp(log_ratio)), chain by chain. A NaN is a rejection."""
    probability = log_ratio.clamp(max=0.0).exp().nan_to_num(nan=0.0)
    accepted = uniform < probability
    chosen = {
        name: torch.where(
            accepted.view(-1, *[1] * (getattr(state, name).ndim - 1)), getattr(proposed, name), getattr(state, name)
        )
        for name in ("tokens", "gradient", "energy", "reward", "logps")
    }
    after = state._replace(**chosen, step=state.step + 1)
    return after, ChainInfo(after.energy, after.reward, after.logps, probability, accepted, evaluated)


def draw_uniforms(generator: Generators, chains: int, count: int, device: torch.device) -> Float[Tensor, "chains n"]:
    """`count` uniforms for each chain, float64."""
    return _draw(torch.rand, generator, chains, (count,), device)


def draw_normals(generator: Generators, like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard normals of the shape and dtype of `like`."""
    return _draw(torch.randn, generator, len(like), tuple(like.shape[1:]), like.device).to(like.dtype)


def _draw(function, generator: Generators, chains: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if isinstance(generator, Sequence):
        if len(generator) != chains:
            raise UserError("generator", "one or as many as there are chains", str(len(generator)))
        drawn = torch.stack([function(shape, generator=one, dtype=torch.float64) for one in generator])
    else:
        drawn = function((chains, *shape), generator=generator, dtype=torch.float64)
    return drawn.to(device)
