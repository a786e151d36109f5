r"""Is a chain long enough? Autocorrelation, effective sample size, and agreement of chains (R-hat), of a scalar along
chains of shape ``(chains, steps)``."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nabla_rl.types import UserError


def acceptance_rate(accepted: Bool[Tensor, "*shape"]) -> float:
    """Share of proposals that were accepted, over chains and steps."""
    return float(accepted.double().mean())


def autocorrelation(values: Float[Tensor, "chains steps"]) -> Float[Tensor, " steps"]:
    r"""Autocorrelation :math:`\hat\rho_t` at every lag, pooled over chains about their common mean.

    .. math:: \hat\rho_t = \frac{\sum_{c, s} (x_{c,s} - \bar x)(x_{c,s+t} - \bar x) / (n - t)}
        {\sum_{c,s} (x_{c,s} - \bar x)^2 / n}

    By the fast Fourier transform, zero padded.

    Returns:
        One value for each lag from 0 (exactly 1); NaN for values that are all equal.

    Example:
        >>> autocorrelation(torch.tensor([[1.0, -1.0, 1.0, -1.0]])).round()
        tensor([ 1., -1.,  1., -1.], dtype=torch.float64)
    """
    values = _checked(values)
    steps = values.shape[1]
    centred = values - values.mean()
    spectrum = torch.fft.rfft(centred, n=2 * steps).abs().square()
    covariance = torch.fft.irfft(spectrum, n=2 * steps)[:, :steps].mean(0) / torch.arange(steps, 0, -1)
    return covariance / covariance[0]


def integrated_autocorrelation_time(values: Float[Tensor, "chains steps"]) -> float:
    r"""How many steps of a chain are worth one independent draw: :math:`\tau = 1 + 2 \sum_{t \ge 1} \rho_t`.

    The sum is cut by Geyer's initial positive, monotone sequence: pairs :math:`\rho_{2k} + \rho_{2k+1}` as long as
    they are positive, none larger than the one before.

    Returns:
        At least :math:`1 / \log_{10}(\text{draws})` (chains that alternate count for more than independent draws);
        infinite for values that are all equal.

    References:
        Geyer, 1992, Sec. 3.3; Vehtari et al., 2021, https://arxiv.org/abs/1903.08008, Eq. 10 to 12.
    """
    rho = autocorrelation(values)
    if not bool(rho.isfinite().all()):
        return math.inf
    pairs = rho[: len(rho) // 2 * 2].view(-1, 2).sum(1)
    ends = (pairs <= 0).nonzero()
    pairs = pairs[: int(ends[0])] if len(ends) else pairs
    time = -1.0 + 2.0 * float(pairs.cummin(0).values.sum()) if len(pairs) else 0.0
    return max(time, 1.0 / math.log10(max(values.numel(), 10)))


def effective_sample_size(values: Float[Tensor, "chains steps"]) -> float:
    r"""Independent draws that would estimate the mean as well: :math:`\text{draws} / \tau`."""
    return values.numel() / integrated_autocorrelation_time(values)


def r_hat(values: Float[Tensor, "chains steps"]) -> float:
    r"""Split R-hat: do chains, each cut in halves, agree about the mean?

    .. math:: \hat R = \sqrt{\frac{\frac{n-1}{n} W + \frac1n B}{W}}

    with :math:`W` the mean variance within the :math:`m` half chains of :math:`n` steps, :math:`B = n` times the
    variance of their means. Near 1 when they agree.

    Returns:
        1 for values that are all equal; infinite for chains that are constant and differ.

    References:
        Gelman and Rubin, 1992; Vehtari et al., 2021, https://arxiv.org/abs/1903.08008, Eq. 1 to 4.
    """
    values = _checked(values)
    half = values.shape[1] // 2
    if half < 2:
        raise UserError("values", "at least 4 steps for two halves", str(values.shape[1]))
    halves = torch.cat([values[:, :half], values[:, -half:]])
    within, between = float(halves.var(1).mean()), half * float(halves.mean(1).var())
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt(((half - 1) / half * within + between / half) / within)


def _checked(values: Tensor) -> Tensor:
    if values.ndim != 2 or not values.numel():
        raise UserError("values", "(chains, steps) and not empty", str(tuple(values.shape)))
    return values.double()
