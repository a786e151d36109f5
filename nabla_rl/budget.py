"""What a decoder may spend on each problem, and what its answer would have been had it been given less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nabla_rl.ledger import Ledger
from nabla_rl.types import UserError


@dataclass(frozen=True)
class Budget:
    """The most that one problem may cost; whichever limit is met first ends the work. Null is no limit.

    A decoder begins another step (a rollout, a round of edits, an expansion) only while nothing is used up, so that a
    budget is overrun by less than one step.
    """

    rollouts: int | None = None
    """Maximum number of completions tried for each problem; null is no limit."""
    flops: float | None = None
    """Maximum floating-point operations (FLOPs) for each problem; null is no limit."""
    seconds: float | None = None
    """Maximum seconds for each problem; null is no limit. Results then depend on the machine."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UserError(f"budget.{name}", "a positive number, or null for no limit", str(value))

    def allows(self, point: Point) -> bool:
        """Whether a problem that has come to `point` may begin another step."""
        return (
            (self.rollouts is None or point.rollouts < self.rollouts)
            and (self.flops is None or point.flops < self.flops)
            and (self.seconds is None or point.seconds < self.seconds)
        )


@dataclass(frozen=True)
class Point:
    """Where a decoder stood with one problem after a step: what had been spent, and which answer it held.

    Attributes:
        rollouts: completions tried.
        flops: operations, as the ledger counts them.
        sequential_calls: model passes that had to wait for one another (latency).
        seconds: wall-clock time.
        chosen: index, among all rollouts tried, of the answer that would have been given here.
    """

    rollouts: int
    flops: float
    sequential_calls: int
    seconds: float
    chosen: int


def spent(ledger: Ledger, account: int, *, rollouts: int, chosen: int) -> Point:
    """The point that a problem has come to, by its account."""
    cost = ledger.cost(account)
    return Point(rollouts, cost.flops, cost.sequential, cost.seconds, chosen)


def point_at(curve: Sequence[Point], budget: Budget) -> Point:
    """Where a decoder would have ended under `budget`: the first point that uses it up, or the last one.

    Exact for decoders whose steps do not depend on the budget, which is all that have a curve.
    """
    return next((point for point in curve if not budget.allows(point)), curve[-1])
