"""Update rules and step sizes of first-order optimisers, as functions on bare tensors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def adamw_(
    parameter: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    first_moment: Float[Tensor, "*shape"] | None,
    second_moment: Float[Tensor, "*shape"] | None,
    *,
    step: int,
    step_size: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    r"""One AdamW update of a bare tensor, in place and in one pass over memory.

    .. math::
        m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
        z \leftarrow (1 - \eta w) z - \eta \, \frac{m / (1 - b_1^{t+1})}{\sqrt{v / (1 - b_2^{t+1})} + \epsilon}

    where :math:`z` is ``parameter``, :math:`g` is ``gradient``, :math:`m, v` are the moments, :math:`b` is ``betas``,
    :math:`\eta` is ``step_size``, :math:`w` is ``weight_decay``, :math:`\epsilon` is ``eps`` and :math:`t` is
    ``step``. It is the kernel behind ``torch.optim.AdamW(fused=True)``.

    Args:
        parameter: What is moved.
        gradient: Left as it is.
        first_moment: Running mean of the gradient, zero before the first step; updated in place.
        second_moment: Running mean of its square, likewise.
        step: Number of updates made before this one.
        step_size: Positive or zero.
        weight_decay: Decoupled decay of the parameter, times the step size.
        betas: Decay rates of the moments.
        eps: Added to the denominator.

    Raises:
        ValueError: If a moment is missing.

    Example:
        >>> z, mean, square = torch.zeros(2), torch.zeros(2), torch.zeros(2)
        >>> adamw_(z, torch.tensor([5.0, -0.1]), mean, square, step=0, step_size=0.01)  # the first step is the sign
        >>> z
        tensor([-0.0100,  0.0100])

    References:
        Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101, Algorithm 2.
    """
    if first_moment is None or second_moment is None:
        raise ValueError("`first_moment` and `second_moment` must be tensors, got None. Start them at zero.")
    count = torch.tensor(step + 1.0, device=parameter.device)
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [parameter], [gradient], [first_moment], [second_moment], [], [count], lr=step_size, beta1=betas[0],
        beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def sgd_(
    parameter: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    first_moment: Float[Tensor, "*shape"] | None = None,
    second_moment: Float[Tensor, "*shape"] | None = None,
    *,
    step: int = 0,
    step_size: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
) -> None:
    r"""One update of plain gradient descent, in place, with the signature of :func:`adamw_`.

    .. math:: z \leftarrow (1 - \eta w) z - \eta g

    where :math:`z` is ``parameter``, :math:`g` is ``gradient``, :math:`\eta` is ``step_size`` and :math:`w` is
    ``weight_decay``; the other arguments have no effect.

    Args:
        parameter: What is moved.
        gradient: Left as it is.
        first_moment: Not used.
        second_moment: Not used.
        step: Not used.
        step_size: Positive or zero.
        weight_decay: Decoupled decay of the parameter, times the step size.
        betas: Not used.
        eps: Not used.

    Example:
        >>> z = torch.tensor([1.0])
        >>> sgd_(z, torch.tensor([5.0]), step_size=0.1)
        >>> z
        tensor([0.5000])
    """
    del first_moment, second_moment, step, betas, eps
    parameter.mul_(1.0 - step_size * weight_decay).add_(gradient, alpha=-step_size)


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


UPDATE_RULES = {"adamw": adamw_, "sgd": sgd_}
SCHEDULES = {"cosine": cosine_decay, "constant": lambda start, end, progress: start}
