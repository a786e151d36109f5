"""A proportion, such as accuracy over few problems, and how far it can be trusted."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval: numbers from a function, tensors from a metric."""

    value: Any
    low: Any
    high: Any


def wilson_interval(successes: float, total: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion: honest for few trials, and at 0 and 1, where the usual ± is zero.

    The ends are the proportions p whose distance from the observed p̂ = `successes` / `total` is z standard errors at
    p, that is, the roots of (p̂ - p)² = z² p (1 - p) / `total`, where z is the two-sided quantile of `confidence`.

    Args:
        successes: how many of the trials succeeded; a weighted count may be fractional.
        total: how many trials there were. None at all leaves every proportion possible: (0, 1).
        confidence: the coverage aimed at.

    Returns:
        The lower and the upper end, within [0, 1].

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> print(f"{low:.3f} {high:.3f}")
        0.490 0.943

    References:
        Wilson, 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"`successes` must lie between 0 and `total`, got {successes} of {total}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie strictly between 0 and 1, got {confidence}.")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    observed = successes / total
    centre = observed + z**2 / (2 * total)
    half = z * math.sqrt(observed * (1 - observed) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # Exactly 0 and 1 at the edges, where the closed form leaves a rounding error; never on the wrong side of p̂.
    low = 0.0 if successes == 0 else min(max((centre - half) / scale, 0.0), observed)
    high = 1.0 if successes == total else max(min((centre + half) / scale, 1.0), observed)
    return low, high


def _proportion_update(outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Count successes and trials; `outcomes` are booleans or zeros and ones, of any shape."""
    if not bool(((outcomes == 0) | (outcomes == 1)).all()):
        raise ValueError("`outcomes` must be booleans or zeros and ones, got other values.")
    return outcomes.sum(dtype=torch.long), torch.tensor(outcomes.numel(), device=outcomes.device)


class Proportion(Metric):
    """The share of outcomes that are true, with its Wilson interval. No outcome at all: NaN within [0, 1].

    Args:
        confidence: the coverage that the interval aims at.
    """

    full_state_update = False
    higher_is_better = True
    successes: Tensor
    total: Tensor

    def __init__(self, *, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.confidence = confidence
        self.add_state("successes", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outcomes: Tensor) -> None:
        """Add outcomes: booleans or zeros and ones, of any shape."""
        successes, total = _proportion_update(outcomes)
        self.successes += successes
        self.total += total

    def compute(self) -> Interval:
        """The proportion and its interval, as float64 scalars."""
        successes, total = int(self.successes), int(self.total)
        low, high = wilson_interval(successes, total, confidence=self.confidence)
        value = successes / total if total else math.nan
        return Interval(
            *(torch.tensor(x, dtype=torch.float64, device=self.successes.device) for x in (value, low, high))
        )
