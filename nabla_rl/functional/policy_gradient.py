r"""Policy gradients of KL-regularised reinforcement learning: group advantages and clipped losses, as pure functions.

The problem is :math:`\max_\pi J(\pi) = E_{y \sim \pi}[r(x, y)] - \beta\, \mathrm{KL}(\pi \| \pi_{ref})`, whose
solution is the tilted policy :math:`\rho^* \propto \pi_{ref} \exp(r / \beta)` with :math:`J(\rho^*) = \beta \log Z`.
Rows come in groups: rows :math:`G i, \dots, G i + G - 1` are the :math:`G` = ``num_generations`` completions of prompt
:math:`i`. A reward that is NaN was not given: its completion gets advantage 0 and no part in its group's baseline.

Only RLOO with the KL in the reward has :math:`\rho^*` as its fixed point. GRPO divides by the group's standard
deviation, which changes :math:`\beta` from prompt to prompt, and takes the KL of each token with the prefix held
fixed.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nabla_rl.functional.logps import sequence_logps, upcast

LossType = Literal["grpo", "dapo", "dr_grpo"]
ScaleRewards = Literal["group", "batch", "none"]
STD_OFFSET = 1e-4
"""What keeps a standard deviation away from zero, as in TRL."""


def penalise_rewards(
    rewards: Float[Tensor, " batch"],
    per_token_kl: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    *,
    beta: float,
) -> Float[Tensor, " batch"]:
    r"""The regularised return :math:`g = r - \beta \sum_i m_i k_i` of each completion.

    :math:`r` is ``rewards``, :math:`k` is ``per_token_kl``, one estimate of the KL a token
    (:func:`~nabla_rl.functional.kl.kl_estimate`, or exact over the vocabulary), :math:`m` is ``mask``. With
    :math:`k_1` the return is :math:`r - \beta \log (\pi / \pi_{ref})`, which is constant in :math:`y` exactly at
    :math:`\rho^*`.

    Args:
        rewards: Shape ``(batch,)``.
        per_token_kl: Detached, shape ``(batch, length)``; what stands at padding has no effect.
        mask: True at completion tokens, same shape.
        beta: KL coefficient, at least 0.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> kl, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])
        >>> penalise_rewards(torch.tensor([1.0]), kl, mask, beta=0.1)
        tensor([0.7000])

    References:
        Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, Sec. 2; TRL: ``RLOOTrainer``.
    """
    return upcast(rewards) - beta * sequence_logps(per_token_kl, mask)


def leave_one_out_advantages(
    returns: Float[Tensor, " batch"], num_generations: int, *, normalize: bool = False
) -> Float[Tensor, " batch"]:
    r"""RLOO: the return less the mean of the group's *other* returns, :math:`g_i - \frac{1}{G-1}\sum_{j \ne i} g_j`.

    The baseline does not depend on :math:`y_i`, so :math:`A_i \nabla \log \pi(y_i)` stays unbiased.

    Args:
        returns: Regularised returns, shape ``(batch,)``, whole groups one after another; NaN where none was given.
        num_generations: :math:`G`, at least 2.
        normalize: Whiten the advantages over the batch (TRL: ``normalize_advantages``). It rescales the gradient and
            with it the step, not the fixed point.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If the batch does not consist of whole groups of two or more.

    Example:
        >>> leave_one_out_advantages(torch.tensor([1.0, 2.0, 6.0]), 3)
        tensor([-3.0000, -1.5000,  4.5000])

    References:
        Kool et al., 2019, https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al., 2024,
        https://arxiv.org/abs/2402.14740, Eq. 7; TRL: ``RLOOTrainer``.
    """
    groups = _groups(returns, num_generations)
    others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    advantages = (groups - (groups.nansum(dim=1, keepdim=True) - groups) / others).flatten()
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (_nanstd(advantages) + STD_OFFSET)
    return advantages.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def group_relative_advantages(
    rewards: Float[Tensor, " batch"], num_generations: int, *, scale: ScaleRewards = "group"
) -> Float[Tensor, " batch"]:
    r"""GRPO: the reward less its group's mean, over a standard deviation: :math:`(r_i - \bar r) / (\sigma + 10^{-4})`.

    Args:
        rewards: Shape ``(batch,)``, whole groups one after another; NaN where none was given.
        num_generations: :math:`G`, at least 2.
        scale: :math:`\sigma` is the group's (``"group"``), the batch's (``"batch"``), or left out (``"none"``, as Dr.
            GRPO asks for), with Bessel's correction. TRL: ``scale_rewards``.

    Returns:
        Shape ``(batch,)``.

    Raises:
        ValueError: If the batch does not consist of whole groups of two or more.

    Example:
        >>> group_relative_advantages(torch.tensor([1.0, 3.0]), 2, scale="none")
        tensor([-1.,  1.])

    References:
        Shao et al., 2024, https://arxiv.org/abs/2402.03300, Sec. 4.1.2; Liu et al., 2025,
        https://arxiv.org/abs/2503.20783 (``"none"``); TRL: ``GRPOTrainer``.
    """
    groups = _groups(rewards, num_generations)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (_nanstd(groups, dim=1) + STD_OFFSET)
    elif scale == "batch":
        advantages = advantages / (_nanstd(groups.flatten()) + STD_OFFSET)
    return advantages.flatten().nan_to_num(nan=0.0)


def clipped_surrogate(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"] | Float[Tensor, "batch 1"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
) -> Float[Tensor, "*shape"]:
    r"""The negative clipped objective :math:`-\min(c A, \mathrm{clip}(c, 1 - \epsilon, 1 + \epsilon_{high}) A)`.

    :math:`c = \exp(` ``logps`` - ``old_logps`` :math:`)`, :math:`A` is ``advantages``. On the policy's own fresh
    samples :math:`c = 1` and the gradient is :math:`-A \nabla \log \pi`.

    Args:
        logps: Of tokens or of whole completions, with gradients.
        old_logps: The same when the samples were drawn, detached.
        advantages: Broadcastable to ``logps``.
        epsilon: Lower clipping range.
        epsilon_high: Upper clipping range; None means ``epsilon``.

    Returns:
        The shape of ``logps``.

    Example:
        >>> clipped_surrogate(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), epsilon=0.2)
        tensor([-1.2000])

    References:
        Schulman et al., 2017, https://arxiv.org/abs/1707.06347, Eq. 7; Yu et al., 2025 (DAPO),
        https://arxiv.org/abs/2503.14476, Eq. 8 (``epsilon_high``).
    """
    ratio = torch.exp(logps - old_logps)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    return -torch.minimum(ratio * advantages, clipped * advantages)


def rloo_loss(
    per_token_logps: Float[Tensor, "batch length"],
    old_logps: Float[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch length"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    differentiable_kl: Float[Tensor, "batch length"] | None = None,
    beta: float = 0.0,
) -> Float[Tensor, ""]:
    r"""REINFORCE with leave-one-out advantages, one ratio for each completion; the KL is in the advantages.

    .. math:: \mathcal{L} = -\frac1B \sum_b \min(c_b A_b, \mathrm{clip}(c_b) A_b),
              \qquad c_b = \frac{\pi(y_b \mid x_b)}{\pi_{old}(y_b \mid x_b)}

    The gradient of :math:`E_\pi[\sum_i k_i]` has two terms: the score function's, which the advantages bring, and that
    of the estimate itself, :math:`\beta\, E[\sum_i \nabla k_i]`, which ``differentiable_kl`` adds. For :math:`k_1` it
    is zero in expectation, and left out.

    Args:
        per_token_logps: :math:`\log \pi` of the completions' tokens, with gradients, shape ``(batch, length)``.
        old_logps: :math:`\log \pi_{old}` of the completions, shape ``(batch,)``.
        advantages: From :func:`leave_one_out_advantages` of :func:`penalise_rewards`, shape ``(batch,)``.
        mask: True at completion tokens.
        epsilon: Lower clipping range.
        epsilon_high: Upper clipping range; None means ``epsilon``.
        differentiable_kl: The estimate of the KL a token that is in the advantages, *with* gradients (:math:`k_3`, or
            exact over the vocabulary); None for :math:`k_1`.
        beta: KL coefficient, of ``differentiable_kl``.

    Returns:
        A scalar.

    Example:
        >>> logps, mask = torch.zeros(2, 1), torch.ones(2, 1).bool()
        >>> rloo_loss(logps, torch.zeros(2), torch.tensor([1.0, -3.0]), mask)
        tensor(1.)

    References:
        Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, Eq. 7; TRL: ``RLOOTrainer``.
    """
    logps = sequence_logps(per_token_logps, mask)
    loss = clipped_surrogate(logps, old_logps, advantages, epsilon=epsilon, epsilon_high=epsilon_high).mean()
    return loss if differentiable_kl is None else loss + beta * sequence_logps(differentiable_kl, mask).mean()


def grpo_loss(
    per_token_logps: Float[Tensor, "batch length"],
    old_per_token_logps: Float[Tensor, "batch length"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch length"],
    *,
    per_token_kl: Float[Tensor, "batch length"] | None = None,
    beta: float = 0.0,
    bias_correction: bool = False,
    loss_type: LossType = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    max_completion_length: int | None = None,
    num_items: float | None = None,
) -> Float[Tensor, ""]:
    r"""GRPO: a ratio for each token, the KL in the loss: :math:`\ell_{bi} = -\min(\cdot) + \beta k_{bi}`, averaged.

    ``loss_type`` says how :math:`\ell` is averaged over the :math:`|y_b|` tokens of :math:`B` completions:

    * ``"grpo"``: :math:`\frac1B \sum_b \frac{1}{|y_b|} \sum_i \ell_{bi}`; long completions count less a token.
    * ``"dapo"``: :math:`\sum_{bi} \ell_{bi} / \sum_b |y_b|`; every token counts the same.
    * ``"dr_grpo"``: :math:`\sum_{bi} \ell_{bi} / (B\, L_{max})`, a constant, so that length brings no bias.

    Args:
        per_token_logps: :math:`\log \pi` of the completions' tokens, with gradients, shape ``(batch, length)``.
        old_per_token_logps: The same when the samples were drawn, detached.
        advantages: From :func:`group_relative_advantages`, shape ``(batch,)``.
        mask: True at completion tokens.
        per_token_kl: One estimate of the KL a token, *with* gradients (:math:`k_3`, TRL's; or exact). Not :math:`k_1`,
            whose gradient is zero in expectation unless it is multiplied by the ratio.
        beta: KL coefficient.
        bias_correction: Multiply the estimate by the token's ratio, with its gradient, so that the mean of its
            gradient is that of the KL (TRL: ``use_bias_correction_kl``). An exact KL needs none.
        loss_type: How tokens are averaged.
        epsilon: Lower clipping range.
        epsilon_high: Upper clipping range; None means ``epsilon``.
        max_completion_length: :math:`L_{max}` of ``"dr_grpo"``.
        num_items: Of ``"dapo"``: completion tokens to divide by, where the batch is part of a larger one; None counts
            those of ``mask``.

    Returns:
        A scalar.

    Raises:
        ValueError: If ``loss_type`` is unknown, or lacks what it divides by.

    Example:
        >>> logps, mask = torch.zeros(2, 2), torch.tensor([[True, True], [True, False]])
        >>> grpo_loss(logps, logps, torch.tensor([3.0, -3.0]), mask, loss_type="grpo")
        tensor(0.)
        >>> grpo_loss(logps, logps, torch.tensor([3.0, -3.0]), mask, loss_type="dapo")
        tensor(-1.)

    References:
        Shao et al., 2024, https://arxiv.org/abs/2402.03300, Eq. 3; Yu et al., 2025 (DAPO),
        https://arxiv.org/abs/2503.14476, Eq. 8; Liu et al., 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783, Eq. 4;
        TRL: ``GRPOTrainer``, ``loss_type``.
    """
    old = old_per_token_logps
    losses = clipped_surrogate(
        per_token_logps, old, advantages.unsqueeze(1), epsilon=epsilon, epsilon_high=epsilon_high
    )
    if per_token_kl is not None and beta:
        if bias_correction:
            per_token_kl = per_token_kl * torch.exp(per_token_logps - old)
        losses = losses + beta * per_token_kl
    losses = losses.masked_fill(~mask, 0.0)
    if loss_type == "grpo":
        return (losses.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean()
    if loss_type == "dapo":
        count = mask.sum().clamp(min=1) if num_items is None else num_items
        return losses.sum() / count
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("`max_completion_length` must be given for 'dr_grpo', got None.")
        return losses.sum() / (len(losses) * max_completion_length)
    raise ValueError(f"`loss_type` must be 'grpo', 'dapo' or 'dr_grpo', got {loss_type!r}.")


def _groups(values: Tensor, num_generations: int) -> Tensor:
    if num_generations < 2 or len(values) % num_generations:
        raise ValueError(
            f"`num_generations` must be at least 2 and divide the batch of {len(values)}, got {num_generations}."
        )
    return upcast(values).view(-1, num_generations)


def _nanstd(values: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation of the entries that are not NaN, with Bessel's correction; `dim` is kept."""
    keep = dim is not None
    over = tuple(range(values.dim())) if dim is None else (dim,)
    count = (~values.isnan()).sum(dim=over, keepdim=keep)
    mean = values.nanmean(dim=over, keepdim=keep)
    return ((values - mean).square().nansum(dim=over, keepdim=keep) / (count - 1)).sqrt()
