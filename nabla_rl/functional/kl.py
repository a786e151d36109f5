"""Kullback-Leibler divergences of a policy and its reference: exact over the vocabulary, or from samples."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nabla_rl.functional.logps import upcast


def forward_kl(
    log_probs: Float[Tensor, "*batch vocab"], ref_log_probs: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    r"""KL(ref‖policy) :math:`= \sum_v \pi_{ref}(v) [\log \pi_{ref}(v) - \log \pi(v)]`.

    Small only if the policy covers all that the reference does.

    Args:
        log_probs: :math:`\log \pi`, normalised, shape ``(*batch, vocab)``.
        ref_log_probs: :math:`\log \pi_{ref}`, normalised, same shape.

    Returns:
        Shape ``(*batch,)``; infinite where the policy excludes a token that the reference allows.

    Example:
        >>> policy, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
        >>> forward_kl(policy, ref)  # log 2
        tensor(0.6931)
    """
    return _kl(upcast(ref_log_probs), upcast(log_probs))


def reverse_kl(
    log_probs: Float[Tensor, "*batch vocab"], ref_log_probs: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    r"""KL(policy‖ref) :math:`= \sum_v \pi(v) [\log \pi(v) - \log \pi_{ref}(v)]`, the penalty of KL-regularised RL.

    Args:
        log_probs: :math:`\log \pi`, normalised, shape ``(*batch, vocab)``.
        ref_log_probs: :math:`\log \pi_{ref}`, normalised, same shape.

    Returns:
        Shape ``(*batch,)``; infinite where the reference excludes a token that the policy allows.

    Example:
        >>> policy, ref = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
        >>> reverse_kl(policy, ref)  # log 2
        tensor(0.6931)
    """
    return _kl(upcast(log_probs), upcast(ref_log_probs))


def kl_estimate(
    logps: Float[Tensor, "*batch"], ref_logps: Float[Tensor, "*batch"], estimator: str = "k3"
) -> Float[Tensor, "*batch"]:
    r"""Estimate KL(policy‖ref) from samples *of the policy*.

    .. math:: k_1 = -\log \rho, \qquad k_2 = \tfrac12 (\log \rho)^2, \qquad k_3 = \rho - 1 - \log \rho

    where :math:`\log \rho` is ``ref_logps - logps``. :math:`k_1` and :math:`k_3` are unbiased; :math:`k_3` is never
    negative and varies less near :math:`\rho = 1`. :math:`k_2` is biased, and right to second order in the distance of
    the two laws.

    Args:
        logps: Log-probabilities of the samples under the policy.
        ref_logps: Log-probabilities of the same samples under the reference, same shape.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.

    Returns:
        One estimate per sample, same shape; their mean estimates the divergence.

    Raises:
        ValueError: If ``estimator`` is unknown.

    Example:
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "k1")
        tensor([1.])
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "k3")  # exp(-1) - 1 + 1
        tensor([0.3679])

    References:
        Schulman, 2020, http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = upcast(ref_logps) - upcast(logps)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"`estimator` must be 'k1', 'k2' or 'k3', got {estimator!r}.")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # Where p = 0 the summand is 0, and so is its gradient; -inf - (-inf) would make both NaN.
    difference = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * difference).sum(dim=-1)
