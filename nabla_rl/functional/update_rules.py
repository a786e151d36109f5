"""Update rules and step sizes of first-order optimisers, as functions on bare tensors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def adamw_update_(
    gradient: Float[Tensor, "*shape"],
    first_moment: Float[Tensor, "*shape"] | None,
    second_moment: Float[Tensor, "*shape"] | None,
    *,
    step: int,
    step_size: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    r"""Adam's update, to be added to the parameters; decoupled weight decay is left to the caller.

    .. math::
        m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
        u = -\eta \, \frac{m / (1 - b_1^{t+1})}{\sqrt{v / (1 - b_2^{t+1})} + \epsilon}

    where :math:`g` is ``gradient``, :math:`m, v` are the moments, :math:`b` is ``betas``, :math:`\eta` is
    ``step_size``, :math:`\epsilon` is ``eps`` and :math:`t` is ``step``. Overwrites all three tensors; the update lies
    where the gradient was.

    Args:
        gradient: The gradient; overwritten by the update.
        first_moment: Running mean of the gradient, zero before the first step; updated in place.
        second_moment: Running mean of its square, likewise.
        step: Number of updates made before this one.
        step_size: Positive or zero.
        betas: Decay rates of the moments.
        eps: Added to the denominator.

    Returns:
        The update.

    Raises:
        ValueError: If a moment is missing.

    Example:
        >>> gradient, mean, square = torch.tensor([5.0, -0.1]), torch.zeros(2), torch.zeros(2)
        >>> adamw_update_(gradient, mean, square, step=0, step_size=0.01)  # the first step is the sign
        tensor([-0.0100,  0.0100])

    References:
        Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101, Algorithm 2.
    """
    if first_moment is None or second_moment is None:
        raise ValueError("`first_moment` and `second_moment` must be tensors, got None. Start them at zero.")
    first_moment.lerp_(gradient, 1.0 - betas[0])
    second_moment.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])
    torch.sqrt(second_moment, out=gradient)
    gradient.div_(math.sqrt(1.0 - betas[1] ** (step + 1))).add_(eps)
    torch.div(first_moment, gradient, out=gradient)
    return gradient.mul_(-step_size / (1.0 - betas[0] ** (step + 1)))


def sgd_update_(
    gradient: Float[Tensor, "*shape"],
    first_moment: Float[Tensor, "*shape"] | None = None,
    second_moment: Float[Tensor, "*shape"] | None = None,
    *,
    step: int = 0,
    step_size: float,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
) -> Float[Tensor, "*shape"]:
    r"""The update of plain gradient descent, :math:`-\eta g`, with the signature of :func:`adamw_update_`.

    :math:`g` is ``gradient`` (overwritten) and :math:`\eta` is ``step_size``; the other arguments have no effect.

    Args:
        gradient: The gradient; overwritten by the update.
        first_moment: Not used.
        second_moment: Not used.
        step: Not used.
        step_size: Positive or zero.
        betas: Not used.
        eps: Not used.

    Returns:
        The update.

    Example:
        >>> sgd_update_(torch.tensor([5.0]), step_size=0.1)
        tensor([-0.5000])
    """
    del first_moment, second_moment, step, betas, eps
    return gradient.mul_(-step_size)


def cosine_decay(start: float, end: float, progress: float) -> float:
    r"""A half cosine from ``start`` to ``end``: :math:`e + \tfrac12 (s - e)(1 + \cos \pi t)`.

    :math:`s, e, t` are ``start``, ``end`` and ``progress``. At :math:`t = i / T` it is torch's ``CosineAnnealingLR``.

    Args:
        start: Value at progress 0.
        end: Value at progress 1 and beyond.
        progress: Share of the way, from 0.

    Returns:
        The value.

    Example:
        >>> cosine_decay(0.01, 0.0, 0.5)
        0.005

    References:
        Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983, Eq. 5.
    """
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(progress, 1.0)))


UPDATE_RULES = {"adamw": adamw_update_, "sgd": sgd_update_}
SCHEDULES = {"cosine": cosine_decay, "constant": lambda start, end, progress: start}
