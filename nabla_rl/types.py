"""Shared vocabulary: errors, outcomes, and the shapes of the callables that the algorithms are written against."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


class UserError(ValueError):
    """Bad input from outside: one line that says what, expected, found and what to do. The command line exits with
    2."""


class Outcome(StrEnum):
    """How an optimisation ended. A run that does not improve is a result, not an exception."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    NON_FINITE_GRADIENT = "non_finite_gradient"
    NO_IMPROVEMENT = "no_improvement"


@runtime_checkable
class LogProbsFn(Protocol):
    """The policy, as an optimiser of tokens sees it: log π(support token | x, y_<i) at every position.

    Prompts, support ids, masks and key-value prefixes are closed over. `rows` says which rows of the batch are asked
    for, since cached gradients make some unnecessary; `token_probs` holds only those. The result must be
    differentiable in `token_probs`, and position i of it may depend on earlier positions only.
    """

    def __call__(
        self, token_probs: Float[Tensor, "active length support"], rows: Int[Tensor, " active"], /
    ) -> Float[Tensor, "active length support"]:
        """Log-probabilities of the support tokens at each position of the given rows."""
        ...


@runtime_checkable
class RewardFn(Protocol):
    """The reward, as an optimiser of tokens sees it: r(x, y) of soft tokens, differentiable in `token_probs`."""

    def __call__(
        self, token_probs: Float[Tensor, "active length support"], rows: Int[Tensor, " active"], /
    ) -> Float[Tensor, " active"]:
        """Rewards of the given rows."""
        ...
