"""A mean, such as reward or calls per problem, and its standard error."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(NamedTuple):
    """A mean, its standard error (NaN below two values) and how many values it is of."""

    value: Tensor
    error: Tensor
    count: Tensor


def _mean_update(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and count of `values`, in float64 whatever their dtype."""
    values = values.double()
    return values.sum(), values.square().sum(), torch.tensor(values.numel(), device=values.device)


def _mean_compute(total: Tensor, squares: Tensor, count: Tensor) -> Mean:
    """Mean and standard error √(s² / n), with s² the unbiased sample variance."""
    mean = total / count
    # Rounding may push the difference below zero when all values are equal.
    spread = (squares - count * mean.square()).clamp(min=0)
    return Mean(mean, (spread / (count - 1) / count).sqrt(), count.clone())


class MeanWithError(Metric):
    """The mean of all values so far with its standard error, accumulated in float64.

    The error treats the values as independent: give one value per problem, not one per completion of a problem. Sums
    of squares lose a spread below 1e-7 of the mean.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values, of any shape and dtype."""
        total, squares, count = _mean_update(values)
        self.total += total
        self.squares += squares
        self.count += count

    def compute(self) -> Mean:
        """Mean, standard error and count."""
        return _mean_compute(self.total, self.squares, self.count)
