"""Losses that carry decoded completions into weights: likelihood, preference pairs, soft targets."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from nabla_rl.functional.kl import forward_kl, reverse_kl
from nabla_rl.functional.logps import sequence_logps, upcast

Direction = Literal["forward", "reverse"]


def sft_loss(
    per_token_logps: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    *,
    weights: Float[Tensor, " batch"] | None = None,
    num_items: float | None = None,
) -> Float[Tensor, ""]:
    r"""The weighted negative log-likelihood of completions, averaged over tokens.

    .. math:: -\frac{1}{N} \sum_n w_n \sum_i m_{ni} \log \pi(y_{ni} \mid x_n, y_{n,<i}), \qquad N = \sum_n w_n |y_n|

    :math:`\log \pi` is ``per_token_logps``, :math:`m` is ``mask``, :math:`w` is ``weights`` and :math:`N` is
    ``num_items``. With equal weights this is the loss of TRL's SFTTrainer. With the weights of
    :func:`reward_weights` it is, up to a constant, the cross-entropy of the policy to the tilted policy as far as the
    completions of a prompt show it.

    Args:
        per_token_logps: Shape ``(batch, length)``.
        mask: True at the tokens of completions.
        weights: Of completions, not negative; None weighs all alike.
        num_items: What the sum is divided by, where this batch is a part of a larger one.

    Returns:
        The loss, float32 or float64; 0 without any weight.

    Example:
        >>> logps = torch.tensor([[-1.0, -3.0], [-2.0, 0.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> sft_loss(logps, mask)  # (1 + 3 + 2) / 3
        tensor(2.)
        >>> sft_loss(logps, mask, weights=torch.tensor([0.0, 5.0]))
        tensor(2.)

    References:
        Peters and Schaal, 2007, Reinforcement learning by reward-weighted regression (the weighted form).
    """
    sums = sequence_logps(per_token_logps, mask)
    if weights is None:
        weights = torch.ones_like(sums)
    total = -(weights.to(sums) * sums).sum()
    items = (weights.to(sums) * mask.sum(dim=-1)).sum() if num_items is None else sums.new_tensor(num_items)
    return total / items if bool(items > 0) else total


def reward_weights(
    rewards: Float[Tensor, " batch"], groups: Int[Tensor, " batch"], *, beta: float
) -> Float[Tensor, " batch"]:
    r"""Weights that turn a prompt's samples of the policy into samples of the tilted policy.

    .. math:: w_n = \frac{e^{r_n / \beta}}{\sum_{m:\, g_m = g_n} e^{r_m / \beta}}

    where :math:`r` is ``rewards`` and :math:`g` is ``groups``: self-normalised importance weights of
    :math:`\rho^* \propto \pi e^{r / \beta}`, whose weights against :math:`\pi` are :math:`e^{r / \beta} / Z`.

    Args:
        rewards: One for each completion.
        groups: Which prompt each completion answers, numbers from 0 on.
        beta: KL coefficient, positive; infinite: all completions of a prompt alike.

    Returns:
        Weights that sum to 1 over each prompt's completions, float32 or float64.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> reward_weights(torch.tensor([0.0, 1.0986, 5.0]), torch.tensor([0, 0, 1]), beta=1.0)
        tensor([0.2500, 0.7500, 1.0000])

    References:
        Peng et al., 2019, https://arxiv.org/abs/1910.00177, Eq. 10 (with one normaliser for each prompt).
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}. Use beta=float('inf') for equal weights.")
    tilt = upcast(rewards) / beta
    count = int(groups.max()) + 1 if len(groups) else 0
    largest = tilt.new_full((count,), -torch.inf).scatter_reduce(0, groups, tilt, "amax")
    shares = torch.exp(tilt - largest[groups])
    return shares / tilt.new_zeros(count).index_add(0, groups, shares)[groups]


def dpo_loss(
    chosen_logps: Float[Tensor, " batch"],
    rejected_logps: Float[Tensor, " batch"],
    ref_chosen_logps: Float[Tensor, " batch"],
    ref_rejected_logps: Float[Tensor, " batch"],
    *,
    beta: float,
) -> Float[Tensor, " batch"]:
    r"""Direct preference optimisation: the logistic loss of the implicit reward's difference.

    .. math:: -\log \sigma\!\Big(\beta \big[\log \tfrac{\pi(y^+)}{\pi_{ref}(y^+)}
        - \log \tfrac{\pi(y^-)}{\pi_{ref}(y^-)}\big]\Big)

    where :math:`y^+` is the chosen and :math:`y^-` the rejected completion, and :math:`\beta` is ``beta``. It is the
    loss of TRL's DPOTrainer with ``loss_type="sigmoid"``, before its mean over the batch.

    Args:
        chosen_logps: log π of the chosen completions, summed over tokens.
        rejected_logps: The same of the rejected ones.
        ref_chosen_logps: The same of the chosen ones under the reference.
        ref_rejected_logps: The same of the rejected ones under the reference.
        beta: KL coefficient of the implicit reward, positive.

    Returns:
        One loss for each pair.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> zero = torch.zeros(1)
        >>> dpo_loss(zero, zero, zero, zero, beta=0.1)  # log 2
        tensor([0.6931])

    References:
        Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, Eq. 7.
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}.")
    chosen = upcast(chosen_logps) - upcast(ref_chosen_logps)
    rejected = upcast(rejected_logps) - upcast(ref_rejected_logps)
    return -logsigmoid(beta * (chosen - rejected))


def tilted_log_probs(
    log_probs: Float[Tensor, "*batch support"], changes: Float[Tensor, "*batch support"], *, beta: float
) -> Float[Tensor, "*batch support"]:
    r"""The tilted policy's next-token law over some alternatives.

    .. math:: q = \mathrm{softmax}(\log \pi + \Delta V / \beta)

    :math:`\log \pi` is ``log_probs`` and :math:`\Delta V` is ``changes``: how much the value of the prefix changes if
    it ends with that token. It is the exact conditional of :math:`\pi e^{r/\beta}`, restricted to the alternatives, if
    :math:`V = \beta \log E_\pi[e^{r/\beta} \mid \text{prefix}]`; a judge's own view of the prefix stands in for it. A
    constant added to ``changes`` has no effect.

    Args:
        log_probs: Of the alternatives under the policy, shape ``(*batch, support)``.
        changes: Same shape.
        beta: KL coefficient, positive, may be infinite.

    Returns:
        Log-probabilities that sum to 1 over the last axis, float32 or float64.

    Raises:
        ValueError: If ``beta`` is not positive.

    Example:
        >>> tilted_log_probs(torch.tensor([0.5, 0.25]).log(), torch.tensor([0.0, 0.6931]), beta=1.0).exp()
        tensor([0.5000, 0.5000])

    References:
        Mudgal et al., 2024, https://arxiv.org/abs/2310.17022, Eq. 3 (controlled decoding).
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}. Use beta=float('inf') to leave the value out.")
    return torch.log_softmax(upcast(log_probs) + upcast(changes) / beta, dim=-1)


def soft_target_kl(
    log_probs: Float[Tensor, "*batch support"],
    target_log_probs: Float[Tensor, "*batch support"],
    *,
    direction: str = "forward",
) -> Float[Tensor, "*batch"]:
    r"""How far the policy is from a target law that is known on some alternatives :math:`S` only.

    .. math:: \mathrm{KL}(q \,\|\, \pi_S) - \log \pi(S) \quad\text{(forward)}, \qquad
        \mathrm{KL}(\pi_S \,\|\, q) - \log \pi(S) \quad\text{(reverse)}

    where :math:`q` is ``target_log_probs``, :math:`\pi(S) = \sum_{v \in S} \pi(v)` the mass that the policy has on the
    alternatives, :math:`\pi_S = \pi / \pi(S)` there, and :math:`\pi` is ``log_probs``. The forward form equals
    :math:`\mathrm{KL}(q \| \pi)` over the whole vocabulary; a whole reverse KL would be infinite, as :math:`q` is 0
    outside :math:`S`, so the mass outside is charged the same in both. Both are 0 exactly at :math:`\pi = q`.

    Args:
        log_probs: :math:`\log \pi` of the alternatives, normalised over the whole vocabulary.
        target_log_probs: :math:`\log q`, normalised over the alternatives.
        direction: ``"forward"`` (covers all that the target does) or ``"reverse"`` (keeps to its peaks).

    Returns:
        One divergence for each row, float32 or float64.

    Raises:
        ValueError: If ``direction`` is unknown.

    Example:
        >>> policy, target = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
        >>> soft_target_kl(policy, target)  # 0.5 log(0.5 / 0.5) + 0.5 log(0.5 / 0.25)
        tensor(0.3466)

    References:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531 (forward); Gu et al., 2024,
        https://arxiv.org/abs/2306.08543 (reverse).
    """
    log_probs, target = upcast(log_probs), upcast(target_log_probs)
    mass = log_probs.logsumexp(dim=-1)
    inside = log_probs - mass.unsqueeze(-1)
    if direction == "forward":
        return forward_kl(inside, target) - mass
    if direction == "reverse":
        return reverse_kl(inside, target) - mass
    raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
