"""Two decoders on the same problems: the difference between them, and how surely it is one.

The sampling unit is the problem. Several seeds on one problem are not several problems: they share its difficulty, and
treating them as independent makes intervals too narrow. Seeds are therefore averaged within each problem first, and
only then are problems resampled, or the two decoders' names swapped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nabla_rl.metrics.proportion import Interval

RESAMPLES = 10_000
_AT_ONCE = 1_000
"""Resamples drawn together, which bounds the memory."""


def bootstrap_interval(
    values: Tensor, *, generator: torch.Generator, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Interval:
    """The mean of `values` over problems with its percentile bootstrap interval.

    Problems are drawn with replacement `resamples` times, each time as many as there are; the interval lies between
    the (1 - `confidence`) / 2 quantiles of the means from either end. All columns see the same draws. Values that are
    all equal have an interval of no width: the bootstrap knows only what it was shown.

    Args:
        values: one value per problem, (problems, ...); average the seeds of a problem beforehand.
        generator: of the draws, on the CPU.
        resamples: how many means are drawn.
        confidence: the coverage aimed at.

    Returns:
        Mean, lower and upper end, float64, each of the shape of one problem's values. NaN without any problem.

    References:
        Efron, 1979, Bootstrap methods: another look at the jackknife.
    """
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, got {resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie strictly between 0 and 1, got {confidence}.")
    problems, shape = len(values), values.shape[1:]
    flat = values.double().cpu().reshape(problems, math.prod(shape))
    if problems == 0:
        nothing = torch.full(shape, math.nan, dtype=torch.float64)
        return Interval(nothing, nothing.clone(), nothing.clone())
    means = []
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        drawn = torch.randint(problems, (count, problems), generator=generator)
        times = torch.zeros(count, problems, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(1, 1, dtype=torch.float64).expand_as(drawn)
        )
        means.append(times @ flat / problems)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(tails, dim=0)
    return Interval(flat.mean(0).reshape(shape), low.reshape(shape), high.reshape(shape))


def paired_difference(
    first: Tensor,
    second: Tensor,
    *,
    generator: torch.Generator,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """How much higher `first` is than `second` on the same problems, with its bootstrap interval over problems.

    d_p = mean_s first[p, s] - mean_s second[p, s] is one value for each problem; the rest is `bootstrap_interval`.
    Pairing takes the problems' own difficulty out of the difference, which is most of the variance of either accuracy.

    Args:
        first: outcomes or rewards, (problems, seeds).
        second: those of the decoder it is compared with, (problems, its seeds).
        generator: of the draws.
        resamples: how many means are drawn.
        confidence: the coverage aimed at.

    Returns:
        The difference, its lower and upper end, as float64 scalars.

    Example:
        >>> first, second = torch.tensor([[1, 1], [1, 0], [0, 0]]), torch.tensor([[0, 1], [0, 0], [0, 0]])
        >>> float(paired_difference(first, second, generator=torch.Generator().manual_seed(0)).value).__round__(4)
        0.3333
    """
    _check_pairs(first, second)
    values = first.double().mean(1) - second.double().mean(1)
    return bootstrap_interval(values, generator=generator, resamples=resamples, confidence=confidence)


def mcnemar_p(first: Tensor, second: Tensor) -> float:
    """The exact two-sided McNemar test that two decoders are right equally often.

    Of the n problems on which exactly one of the two is right, `first` is right on b. If neither were better, b would
    be Binomial(n, 1/2): p = min(1, 2 Pr[Binomial(n, 1/2) ≤ min(b, n - b)]).

    It needs one independent pair for each problem, so give it one seed. Pairs of several seeds of one problem are not
    independent, and counting them as such makes p too small; a majority over seeds is independent, but asks about
    another decoder, one that votes. `sign_flip_p` uses all seeds.

    Args:
        first: whether each problem's answer is right, (problems,).
        second: the same of the other decoder.

    Returns:
        p; 1 where the two never differ.

    Example:
        >>> mcnemar_p(torch.tensor([1, 1, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 0, 0, 1]))
        0.21875

    References:
        McNemar, 1947, Note on the sampling error of the difference between correlated proportions or percentages.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"`first` and `second` must be of shape (problems,), got {tuple(first.shape)}, {tuple(second.shape)}."
        )
    wins, losses = int((first.bool() & ~second.bool()).sum()), int((~first.bool() & second.bool()).sum())
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def sign_flip_p(first: Tensor, second: Tensor) -> float:
    """The exact two-sided permutation test of the same hypothesis, with every seed in use.

    If neither decoder were better, the two could swap names on any problem, all seeds of it together, without changing
    the law of the outcomes. So the sum of d_p over problems is compared with that of ±d_p under all choices of signs:
    p = Pr[|Σ ±d_p| ≥ |Σ d_p|], computed exactly by adding one problem at a time to the law of the sum. With one seed
    this is `mcnemar_p`.

    Args:
        first: outcomes, booleans or zeros and ones, (problems, seeds).
        second: those of the other decoder, (problems, its seeds).

    Returns:
        p; 1 where the two never differ.

    Example:
        >>> sign_flip_p(torch.tensor([[1, 1], [1, 0], [0, 0]]), torch.tensor([[0, 0], [0, 0], [0, 0]]))
        0.5
    """
    _check_pairs(first, second)
    # whole numbers: sums over seeds, on the two decoders' common denominator
    seeds = math.lcm(first.shape[1], second.shape[1])
    counts = [outcomes.long().sum(1) * (seeds // outcomes.shape[1]) for outcomes in (first, second)]
    differences = counts[0] - counts[1]
    steps = differences.abs()[differences != 0].tolist()
    reach = sum(steps)
    law = torch.zeros(2 * reach + 1, dtype=torch.float64)
    law[reach] = 1.0
    for step in steps:
        law = (law.roll(step) + law.roll(-step)) / 2
    sums = torch.arange(-reach, reach + 1)
    return min(1.0, float(law[sums.abs() >= abs(int(differences.sum()))].sum()))


def _check_pairs(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or not first.shape[1] or not second.shape[1]:
        raise ValueError(
            "`first` and `second` must be of shape (problems, seeds) with the same problems, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
