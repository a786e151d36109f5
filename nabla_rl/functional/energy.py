"""The one objective, L(y) = -λ r(x, y) - log π(y|x) with λ = 1/β, and the likelihood of soft tokens inside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nabla_rl.functional.logps import pick, sequence_logps, upcast
from nabla_rl.functional.relaxation import SoftTokens
from nabla_rl.types import LogProbsFn, RewardFn

IMPOSSIBLE_LOGP = -1e4
"""Stands in for log 0 = -inf in the gradient at tokens that are not chosen: still far below every real log-probability
(float32 logits give some -1e2), and finite, so that p * (g - p.g) is a number."""


def compute_energy(
    logps: Float[Tensor, "*batch"], reward: Float[Tensor, "*batch"] | None, beta: float
) -> Float[Tensor, "*batch"]:
    r"""The energy that decoding descends and whose Gibbs law is the optimal policy of KL-regularised RL.

    .. math:: L(y) = -\lambda \, r(x, y) - \log \pi(y \mid x), \qquad \lambda = 1 / \beta

    where :math:`\log \pi` is ``logps``, :math:`r` is ``reward`` and :math:`\beta` is ``beta``. The law proportional to
    :math:`e^{-L}` maximises :math:`E[r] - \beta \, \mathrm{KL}(\cdot \| \pi)`. At ``beta=float("inf")`` (or without a
    reward) :math:`\lambda = 0`, and the reward is not looked at.

    Args:
        logps: Log-probability of each sequence.
        reward: Reward of each sequence, same shape, or None.
        beta: KL coefficient, positive, may be infinite.

    Returns:
        The energy, float32 or float64.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> compute_energy(torch.tensor([-3.0]), torch.tensor([2.0]), beta=0.5)
        tensor([-1.])

    References:
        https://arxiv.org/abs/2603.04948, Eq. 2 and Theorem 4.1.
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}. Use beta=float('inf') to leave the reward out.")
    if reward is None or beta == float("inf"):
        return -upcast(logps)
    return -upcast(reward) / beta - upcast(logps)


def expected_logps(
    token_probs: Float[Tensor, "*batch length vocab"],
    log_probs: Float[Tensor, "*batch length vocab"],
    mask: Bool[Tensor, "*batch length"],
    *,
    prefix: bool = True,
    postfix: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Log-likelihood of soft tokens, with a switch for each of the two ways a token enters it.

    .. math:: \log \pi(y \mid x) = \sum_i m_i \, y_i^\top \log \pi(\cdot \mid x, y_{<i})

    where :math:`y` is ``token_probs``, :math:`\log \pi(\cdot \mid x, y_{<i})` is ``log_probs`` (a function of the
    earlier tokens) and :math:`m` is ``mask``. By the product rule the gradient of the energy in :math:`y_l` has two
    pieces:

    * :math:`\delta_{prefix} = -\log \pi(\cdot \mid x, y_{<l})`, through the first factor: how likely token :math:`l`
      is after its prefix. ``prefix=False`` detaches ``token_probs``.
    * :math:`\delta_{postfix} = -\sum_{i>l} \partial_{y_l} [\log \pi(\cdot \mid x, y_{<i})] \, y_i`, through the
      second: what token :math:`l` does to the later ones. ``postfix=False`` detaches ``log_probs``, so that no
      backward through the policy is needed.

    The value is the same whatever the switches. Products :math:`0 \cdot (-\infty)` count as 0, and for the gradient
    the log-probability of an unchosen impossible token is read as :data:`IMPOSSIBLE_LOGP`. An impossible token that
    *is* chosen gives :math:`-\infty`.

    Args:
        token_probs: Points of the simplex, shape ``(*batch, length, vocab)``.
        log_probs: Log-probabilities of the same tokens, same shape.
        mask: True at the positions that count, shape ``(*batch, length)``.
        prefix: Whether the gradient flows through ``token_probs`` as the factor of this product.
        postfix: Whether it flows through ``log_probs``.

    Returns:
        Shape ``(*batch,)``, float32 or float64.

    Example:
        >>> y = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
        >>> log_probs = torch.tensor([[[0.5, 0.5]]]).log()
        >>> value = expected_logps(y, log_probs, torch.tensor([[True]]))
        >>> value.backward()
        >>> value.item() == y.grad[0, 0, 1].item()  # the other token would do as well
        True

    References:
        https://arxiv.org/abs/2603.04948, Eq. 2 and Proposition C.1.
    """
    token_probs = upcast(token_probs if prefix else token_probs.detach())
    log_probs = upcast(log_probs if postfix else log_probs.detach())
    if not _all_finite(log_probs):
        harmless = (log_probs.isneginf() & (token_probs == 0)) | ~(log_probs.isfinite() | mask.unsqueeze(-1))
        log_probs = log_probs.masked_fill(harmless, IMPOSSIBLE_LOGP)
    return sequence_logps((token_probs * log_probs).sum(dim=-1), mask)


class EnergyGradient(NamedTuple):
    """The energy of soft tokens, its two parts, and its gradient with respect to the tokens. All detached."""

    energy: Float[Tensor, " active"]
    reward: Float[Tensor, " active"]
    """0 without a reward."""
    logps: Float[Tensor, " active"]
    gradient: Float[Tensor, "active length support"] | None
    """∂L/∂y, exactly 0 at padding."""


def energy_gradient(
    token_probs: Float[Tensor, "active length support"],
    mask: Bool[Tensor, "active length"],
    rows: Int[Tensor, " active"],
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    *,
    beta: float,
    prefix: bool = True,
    postfix: bool = True,
    reward: bool = True,
    record: bool = True,
    tokens: Int[Tensor, "active length"] | None = None,
) -> EnergyGradient:
    r"""Energy and token gradient under two frozen models, whose graphs are never in memory together.

    .. math:: g = \partial L / \partial y = \delta_{prefix} + \delta_{postfix} + \lambda \, \delta_{reward}

    with the pieces of :func:`expected_logps`, :math:`\delta_{reward} = -\partial r / \partial y` and :math:`\lambda =
    1 / \beta`, where :math:`y` is ``token_probs`` and :math:`\beta` is ``beta``. A piece switched off is left out of
    the gradient, not of the energy, and the backward pass that only it needs is not made.

    Args:
        token_probs: Points of the simplex over the support. Nothing flows into its own graph.
        mask: True at the positions that count.
        rows: Which rows of the batch these are; handed to the callables.
        log_probs_fn: The policy.
        reward_fn: The reward, or None.
        beta: KL coefficient; infinite leaves the reward out of energy and gradient.
        prefix: Whether the gradient has the prefix piece.
        postfix: Whether it has the postfix piece.
        reward: Whether it has the reward piece.
        record: Whether to take a gradient at all. False: forward passes only, and ``gradient`` is None.
        tokens: Where ``token_probs`` is known to be one-hot: look-ups then take the place of products, and the
            callables find them as ``SoftTokens.ids``.

    Returns:
        Energy, reward, log-probability and gradient of the given rows.

    Raises:
        ValueError: If a callable returns another shape, or a reward without the gradient that is asked for.

    Example:
        >>> y, mask, rows = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[True]]), torch.tensor([0])
        >>> log_probs_fn = lambda tokens, rows: torch.tensor([[[0.5, 0.5]]]).log()
        >>> reward_fn = lambda tokens, rows: tokens.probs[:, 0, 1]  # wants token 1
        >>> energy_gradient(y, mask, rows, log_probs_fn, reward_fn, beta=0.5).gradient
        tensor([[[ 0.6931, -1.3069]]])

    References:
        https://arxiv.org/abs/2603.04948, Eq. 2 and Proposition C.1.
    """
    shape, gradient = tuple(token_probs.shape), None
    probs = token_probs.detach().requires_grad_(record)
    with torch.set_grad_enabled(record and postfix):
        log_probs = log_probs_fn(SoftTokens(probs, tokens), rows)
    if log_probs.shape != shape:
        raise ValueError(f"`log_probs_fn` must return shape {shape}, got {tuple(log_probs.shape)}.")
    with torch.set_grad_enabled(record):
        if tokens is None:
            logps = expected_logps(probs, log_probs, mask, prefix=prefix, postfix=postfix)
        else:
            logps = sequence_logps(pick(log_probs, tokens), mask)
    if record:
        gradient = _token_gradient(logps, probs, -1.0)
        if gradient is None:
            gradient = torch.zeros_like(probs, requires_grad=False)
        if tokens is not None and prefix:
            gradient.sub_(_possible(log_probs.detach(), tokens))
    del log_probs
    rewards, rewarded = torch.zeros_like(logps), record and reward and beta < float("inf")
    if reward_fn is not None:
        with torch.set_grad_enabled(rewarded):
            rewards = reward_fn(SoftTokens(probs, tokens, gradient if rewarded else None), rows)
        if rewards.shape != shape[:1]:
            raise ValueError(f"`reward_fn` must return shape {shape[:1]}, got {tuple(rewards.shape)}.")
        if rewarded and not rewards.requires_grad:
            raise ValueError("`reward_fn` must be differentiable, got a result without a gradient. Use reward=False.")
        if gradient is not None and rewarded:
            rest = _token_gradient(rewards, probs, -1.0 / beta)
            if rest is not None:
                gradient.add_(rest)
    if gradient is not None and not bool(mask.all()):
        gradient = gradient.masked_fill(~mask.unsqueeze(-1), 0.0)
    rewards, logps = upcast(rewards.detach()), logps.detach()
    return EnergyGradient(compute_energy(logps, rewards, beta), rewards, logps, gradient)


def _all_finite(tensor: Tensor) -> bool:
    """Is every entry finite? One that is not shows in the sum, which takes no temporary. False may be an overflow."""
    return bool(tensor.detach().sum().isfinite())


def _possible(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities in float32 or better, with those of impossible tokens that are not chosen made finite."""
    log_probs = upcast(log_probs)
    if _all_finite(log_probs):
        return log_probs
    harmless = log_probs.isneginf().scatter_(-1, tokens.unsqueeze(-1), False)
    return log_probs.masked_fill(harmless, IMPOSSIBLE_LOGP)


def _token_gradient(values: Tensor, probs: Tensor, scale: float) -> Tensor | None:
    """The gradient of scale times the values, in a tensor that may be overwritten; None where none arrives."""
    if not values.requires_grad:
        return None
    weights = torch.full_like(values, scale, requires_grad=False)
    gradient = torch.autograd.grad(values, probs, weights, allow_unused=True)[0]
    return None if gradient is None else gradient.contiguous()
