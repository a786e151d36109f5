"""Update rules and step sizes of first-order optimisers, as functions on bare tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nabla_rl.functional.kl import reverse_kl

REACHABLE = 0.999
"""Share of the largest possible divergence that is aimed at where a direction cannot reach the wanted one."""


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


@torch.no_grad()
def kl_step_size(
    logits: Float[Tensor, "*batch vocab"],
    direction: Float[Tensor, "*batch vocab"],
    trust_region: float,
    *,
    tolerance: float = 1e-7,
    max_iterations: int = 80,
) -> Float[Tensor, "*batch"]:
    r"""How far each position may go down a direction for its distribution to change by a given divergence.

    Solves, for each position by itself,

    .. math::
        \mathrm{KL}(p_\eta \,\|\, p_0)
        = -\eta \, E_{p_\eta}[u] - \log E_{p_0}[e^{-\eta u}] = \delta, \qquad
        p_\eta = \mathrm{softmax}(z - \eta u)

    for :math:`\eta \ge 0`, where :math:`z` is ``logits``, :math:`u` is ``direction`` and :math:`\delta` is
    ``trust_region``. The divergence rises with :math:`\eta`, by :math:`\eta \, \mathrm{Var}_{p_\eta}[u]` each unit,
    from 0 to :math:`-\log p_0(\arg\min u)`; Newton's method on its square root (nearly linear in :math:`\eta`) is kept
    inside a bracket. :math:`\eta u` does not depend on the scale of :math:`u`. Small steps:
    :math:`\eta \approx \sqrt{2 \delta / \mathrm{Var}_{p_0}[u]}`. All in float64.

    Args:
        logits: Shape ``(*batch, vocab)``.
        direction: Same shape; what is subtracted from the logits. A constant one changes nothing: its step is 0.
        trust_region: The divergence in nats, at least 0. Where a direction cannot change the distribution as much,
            because its best token is likely enough already, the step makes :data:`REACHABLE` of the most possible.
        tolerance: Of the divergence, relative.
        max_iterations: Halvings and Newton steps at most.

    Returns:
        Step sizes, shape ``(*batch,)``, dtype of ``logits``.

    Raises:
        ValueError: If ``trust_region`` is negative or not finite.

    Example:
        >>> z, u = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> size = kl_step_size(z, u, 0.1)
        >>> p = torch.softmax(z - size * u, -1)
        >>> round(float((p * (2 * p).log()).sum()), 4)
        0.1
        >>> float(kl_step_size(z, 1000 * u, 0.1) * 1000 / size)
        1.0

    References:
        A trust region in KL, as for policies: Schulman et al., 2015, https://arxiv.org/abs/1502.05477.
    """
    if not 0.0 <= trust_region < math.inf:
        raise ValueError(f"`trust_region` must be at least 0 and finite, got {trust_region}.")
    log_p, u = logits.double().log_softmax(-1), direction.double()
    u = u - u.amin(-1, keepdim=True)
    most = -log_p.masked_fill(u > 0, -math.inf).logsumexp(-1).clamp(max=0.0)
    target = (REACHABLE * most).clamp(max=trust_region)
    mean = (log_p.exp() * u).sum(-1, keepdim=True)
    spread = (log_p.exp() * (u - mean).square()).sum(-1).sqrt()
    size = torch.where(spread > 0, (2 * target).sqrt() / spread, 0.0)
    movable, low, high = size > 0, torch.zeros_like(size), torch.full_like(size, math.inf)
    for _ in range(max_iterations):
        log_q = (log_p - size.unsqueeze(-1) * u).log_softmax(-1)
        kl = reverse_kl(log_q, log_p).clamp(min=0.0)
        off = ((kl - target).abs() > tolerance * target) & movable
        if not bool(off.any()):
            break
        low, high = torch.where(kl < target, size, low), torch.where(kl < target, high, size)
        q = log_q.exp()
        slope = size * (q * (u - (q * u).sum(-1, keepdim=True)).square()).sum(-1)
        newton = size - 2 * (kl - (kl * target).sqrt()) / slope
        middle = torch.where(high.isinf(), 4 * size, torch.where(low > 0, (low * high).sqrt(), high / 8))
        size = torch.where(off, torch.where((newton > low) & (newton < high), newton, middle), size)
    return size.to(logits.dtype)


def trust_region_(
    parameter: Float[Tensor, "*batch vocab"],
    gradient: Float[Tensor, "*batch vocab"],
    *,
    trust_region: float,
    weight_decay: float = 0.0,
) -> None:
    r"""One update of logits, in place, that changes each position's distribution by the same divergence.

    .. math:: z \leftarrow z - \eta_i \, (g_i + w z_i), \qquad \eta_i \text{ such that }
        \mathrm{KL}(\mathrm{softmax}(z_i^{new}) \,\|\, \mathrm{softmax}(z_i)) = \delta

    where :math:`z` is ``parameter``, :math:`g` is ``gradient``, :math:`w` is ``weight_decay`` and :math:`\delta` is
    ``trust_region``; :math:`\eta_i` is :func:`kl_step_size`.

    Args:
        parameter: What is moved, shape ``(*batch, vocab)``.
        gradient: Left as it is.
        trust_region: Divergence in nats, at least 0.
        weight_decay: Adds so much of the logits to the direction.

    Example:
        >>> z = torch.tensor([0.0, 0.0])
        >>> trust_region_(z, torch.tensor([0.0, 1.0]), trust_region=0.1)
        >>> p = torch.softmax(z, -1)
        >>> round(float((p * (2 * p).log()).sum()), 4)
        0.1
    """
    direction = gradient if weight_decay == 0.0 else gradient + weight_decay * parameter
    parameter.sub_(kl_step_size(parameter, direction, trust_region).unsqueeze(-1) * direction)


class UpdateRule(NamedTuple):
    """How logits move."""

    update: Callable[..., None]
    """In place, from parameter, gradient and two moments."""
    natural: bool
    r"""Whether it is fed :math:`g = \partial L / \partial y` itself rather than :math:`d = \partial L / \partial z`.

    With :math:`F = \mathrm{diag}(p) - p p^\top`, the Fisher information of :math:`p = \mathrm{softmax}(z)`, the chain
    rule at temperature 1 is :math:`d = F g`. So :math:`g` is the natural gradient, and descent by it is exponentiated
    gradient in the probabilities: :math:`p \leftarrow p \, e^{-\eta g} / Z`."""
    moments: bool
    """Whether it keeps running means of the gradient and of its square."""


UPDATE_RULES = {
    "adamw": UpdateRule(adamw_, natural=False, moments=True),
    "sgd": UpdateRule(sgd_, natural=False, moments=False),
    "exponentiated": UpdateRule(sgd_, natural=True, moments=False),
}
SCHEDULES = {"cosine": cosine_decay, "constant": lambda start, end, progress: start}
