r"""What can be said from samples of a law where its space cannot be listed.

A row of a pool, (problems, draws), holds one problem's draws of the policy; elsewhere a problem has one value.
Divergences are in nats for each completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nabla_rl.metrics.paired import bootstrap_interval

CARRIED = 8
"""Draws at least that an estimate may rest on: fewer effective ones are not trusted."""
RIDGE = 1.0
"""Of the probe, for each row, on features of mean square 1."""
FOLDS, PERMUTATIONS = 5, 999
CHUNK = 32
"""Problems whose draws are compared with one another at once."""


# Best of n


def best_of_n_kl_bound(n: int) -> float:
    r"""The analytic figure :math:`\log n - (n - 1)/n`: KL(best of n‖policy) is at most that, whatever the score.

    References: Beirami et al., 2024, https://arxiv.org/abs/2401.01879, Theorem 1 (an upper bound in general, near the
    truth where single completions are unlikely).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(scores: Float[Tensor, "problems draws"], n: int) -> Float[Tensor, "problems draws"]:
    r"""The probability of each of m draws to be the best of n of them, taken without replacement.

    The draw of rank :math:`k` (from the worst, 1) is the best of a random subset with probability
    :math:`\binom{k - 1}{n - 1} / \binom{m}{n}`. A weighted mean with these weights is an unbiased estimate of an
    expectation under best-of-n (a U-statistic). Draws of equal score share their weight.
    """
    m = scores.shape[1]
    if not 1 <= n <= m:
        raise ValueError(f"`n` must be in [1, {m}], the draws of the pool, got {n}.")
    ranks = torch.arange(1, m + 1, dtype=torch.float64)
    log_weights = _log_choose(ranks - 1, n - 1) - _log_choose(torch.tensor(float(m), dtype=torch.float64), n)
    order = scores.argsort(dim=1, stable=True)
    weights = torch.empty_like(scores, dtype=torch.float64)
    weights.scatter_(1, order, log_weights.exp().expand(len(scores), -1))
    return torch.cat([_shared(*part) for part in zip(scores.split(CHUNK), weights.split(CHUNK), strict=True)])


def _shared(scores: Tensor, weights: Tensor) -> Tensor:
    """Draws of equal score have the mean of their weights."""
    same = (scores[:, :, None] == scores[:, None, :]).double()
    return (same @ weights[:, :, None]).squeeze(-1) / same.sum(-1)


def _log_choose(total: Tensor, chosen: int) -> Tensor:
    rest = total - chosen
    found = torch.lgamma(total + 1) - math.lgamma(chosen + 1) - torch.lgamma(rest.clamp(min=0) + 1)
    return found.masked_fill(rest < 0, -math.inf)


def best_of_n_kl(
    logps: Float[Tensor, "problems draws"],
    scores: Float[Tensor, "problems draws"],
    completions: Int[Tensor, "problems draws"],
    n: int,
) -> Float[Tensor, " problems"]:
    r"""KL(best of n‖policy) of each problem, from a pool of draws and their log-probabilities.

    With :math:`F(s)` the policy's probability of a score up to :math:`s` and :math:`p(s)` that of exactly :math:`s`,
    best-of-n has the density ratio :math:`(F^n - (F - p)^n) / p` (ties are shared in proportion to the policy). Here
    :math:`p(s)` is the sum of :math:`\pi(y)`, known, over the different completions of the pool that have the score,
    and :math:`F` the share of the pool. The error of :math:`F` biases the estimate once n comes near the number of
    draws.

    Args:
        logps: log π of each draw.
        scores: what is maximised; equal for equal completions.
        completions: a number for each different completion of a problem.
        n: completions that the best is taken of.
    """
    parts = [slice(start, start + CHUNK) for start in range(0, len(scores), CHUNK)]
    ratios = [_log_ratio(logps[part].double(), scores[part], completions[part], n) for part in parts]
    return (best_of_n_weights(scores, n) * torch.cat(ratios)).sum(1)


def _log_ratio(logps: Tensor, scores: Tensor, completions: Tensor, n: int) -> Tensor:
    """log of best-of-n's density over the policy's, at every draw."""
    same = scores[:, :, None] == scores[:, None, :]
    twins = completions[:, :, None] == completions[:, None, :]
    first = torch.tril(twins, diagonal=-1).sum(-1) == 0  # one draw of each completion
    mass = (same.double() @ (logps.exp() * first)[:, :, None]).squeeze(-1).clamp(max=1.0)
    upto = (scores[:, None, :] <= scores[:, :, None]).double().mean(-1)
    below = (upto - mass).clamp(min=0.0)
    return n * upto.log() + torch.log(-torch.expm1(n * (below / upto).log())) - mass.log()


# The tilted policy, by reweighting the policy's draws


class Tilted(NamedTuple):
    """The tilted policy of one strength on a pool."""

    weights: Float[Tensor, "problems draws"]
    kl: Float[Tensor, " problems"]  # KL(ρ*‖π)
    log_partition: Float[Tensor, " problems"]
    effective: Float[Tensor, " problems"]  # draws that the weights are worth


def tilt_pool(rewards: Float[Tensor, "problems draws"], beta: float) -> Tilted:
    r"""Self-normalised importance weights :math:`w \propto e^{r/\beta}` of the policy's draws: averages with them are
    those of :math:`\rho^*`; :math:`KL(\rho^* \| \pi) = E_{\rho^*}[r]/\beta - \log Z`."""
    scaled = rewards.double() / beta
    log_partition = scaled.logsumexp(1) - math.log(rewards.shape[1])
    weights = scaled.softmax(1)
    return Tilted(weights, (weights * scaled).sum(1) - log_partition, log_partition, 1 / weights.square().sum(1))


def least_kl(rewards: Float[Tensor, "problems samples"], pool: Float[Tensor, "problems draws"]) -> float:
    r"""A lower bound of the mean KL from the policy of *any* law, density or none, from its rewards alone.

    .. math:: KL(\rho \| \pi) \ge E_\rho[f] - \log E_\pi[e^f], \qquad f = \lambda \min(r, c)

    for every witness :math:`f` (Donsker and Varadhan, 1975); the best :math:`\lambda` of a grid is taken, one for all
    problems. The cap :math:`c` of a problem is the reward of its `CARRIED`-th best draw: without it the second term
    would rest on a draw or two, or on none that was seen. So no more than :math:`\log(\text{draws} / 8)` can be
    found.
    """
    cap = pool.double().topk(min(CARRIED, pool.shape[1]), dim=1).values[:, -1:]
    capped, drawn = rewards.double().minimum(cap).mean(1), pool.double().minimum(cap)
    return max(
        float((strength * capped - tilt_pool(drawn, 1 / strength).log_partition).mean())
        for strength in (10 ** (k / 10) for k in range(-30, 31))
    )


# Two laws, side by side


def token_overlap(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], *, same: bool = False) -> float:
    """Share of positions with the same token, of the longer one's, over all pairs of two sets of completions.

    `same`: both are one set, whose completions are not paired with themselves.
    """
    found = [
        sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b), 1)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        if not same or i != j
    ]
    return sum(found) / len(found) if found else math.nan


def win_share(first: Float[Tensor, " a"], second: Float[Tensor, " b"]) -> float:
    """Share of pairs in which the first has more; a tie is half a win."""
    difference = first[:, None] - second[None]
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


class Interval(NamedTuple):
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Float[Tensor, " problems"], generator: torch.Generator) -> Interval:
    """The mean over problems with its bootstrap interval."""
    return Interval(*(float(part) for part in bootstrap_interval(values, generator=generator, resamples=2000)))


def correlation(
    first: Float[Tensor, " problems"],
    second: Float[Tensor, " problems"],
    generator: torch.Generator,
    *,
    ranks: bool = False,
    resamples: int = 2000,
) -> Interval:
    """Pearson's correlation over problems (Spearman's with `ranks`) and its percentile bootstrap interval."""
    pair = torch.stack([_ranks(x) if ranks else x.double() for x in (first, second)])
    drawn = torch.randint(pair.shape[1], (resamples, pair.shape[1]), generator=generator)
    several = _pearson(pair[0][drawn], pair[1][drawn])
    several = several[several.isfinite()]
    low, high = (
        several.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)) if len(several) else (math.nan,) * 2
    )
    return Interval(float(_pearson(pair[0], pair[1])), float(low), float(high))


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    levels, where, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[where] if len(levels) else values.double()


class TwoSample(NamedTuple):
    """Whether a probe that is shown a completion of each of two laws, for one problem, can say which is which."""

    accuracy: Interval  # on problems that the probe was not fitted on; one half: it cannot
    p_value: float  # permutation test of one law


def two_sample_test(
    first: Float[Tensor, "rows features"],
    second: Float[Tensor, "rows features"],
    problems: Int[Tensor, " rows"],
    generator: torch.Generator,
) -> TwoSample:
    r"""A classifier two-sample test with a linear probe on pairs, cross-fitted over problems.

    The probe says "the first" of a pair if :math:`w^\top (f_1 - f_2) > 0`, with :math:`w` from ridge regression, so
    what problems differ in cancels. It is fitted on four fifths of the problems and judges the fifth: no problem is on
    both sides. If the two laws are one, it is right half the time. A pair of equal completions counts as half right.
    The p-value exchanges the two completions of all pairs of a problem at once, which under that hypothesis changes
    nothing, and refits the probe each time.

    Args:
        first: a row for each completion of one law.
        second: of the other; row k answers the same problem as row k of `first`.
        problems: that problem's number.
        generator: of folds, bootstrap and permutations.

    References: Lopez-Paz and Oquab, 2017, https://arxiv.org/abs/1610.06545.
    """
    names, owner = problems.unique(return_inverse=True)
    pairs = first.double() - second.double()
    pairs = pairs / pairs.square().mean(0).sqrt().clamp(min=1e-12)
    fold = (torch.randperm(len(names), generator=generator) % FOLDS)[owner]
    flips = torch.randint(2, (len(names), PERMUTATIONS), generator=generator).double() * 2 - 1
    signs = torch.cat([torch.ones(len(names), 1, dtype=torch.float64), flips], 1)[owner]
    right = torch.empty_like(signs)
    for k in range(FOLDS):
        train, test = pairs[fold != k], pairs[fold == k]
        # exchanging a pair changes the sign of its difference: the same matrix serves every permutation
        gram = train.T @ train + RIDGE * len(train) * torch.eye(train.shape[1], dtype=torch.float64)
        scores = test @ torch.linalg.solve(gram, train.T @ signs[fold != k])
        right[fold == k] = (torch.sign(scores * signs[fold == k]) + 1) / 2
    accuracies = right.mean(0)
    p_value = (1 + int((accuracies[1:] >= accuracies[0] - 1e-12).sum())) / (1 + PERMUTATIONS)
    each = torch.zeros(len(names), dtype=torch.float64).scatter_add_(0, owner, right[:, 0])
    counts = torch.zeros(len(names), dtype=torch.float64).scatter_add_(0, owner, torch.ones(len(owner)).double())
    return TwoSample(mean_interval(each / counts, generator), p_value)
