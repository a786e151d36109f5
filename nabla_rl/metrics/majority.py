"""maj@k: is the answer that most of k completions agree on right?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def majority_index(answers: Sequence[Hashable | None]) -> int | None:
    """The position where the most frequent answer first occurs; ties go to the answer that occurs first.

    Args:
        answers: one final answer per completion; None, a completion without an answer, has no vote.

    Returns:
        The position, or None if nobody voted.

    Example:
        >>> majority_index(["7", None, "12", "12"])
        2
        >>> majority_index(["7", "12"])
        0
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    # `max` keeps the first of equals, and a Counter remembers the order of first occurrence.
    return answers.index(max(votes, key=votes.__getitem__))


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], *, k: int | None = None) -> bool:
    """Is the majority's answer among the first k completions right? Nobody voting counts as wrong.

    Args:
        answers: one final answer per completion, None where there is none.
        correct: whether each completion's answer is right. Of several completions with the winning answer the first
            decides, should a grader disagree with itself.
        k: how many completions vote; all if None.

    Returns:
        Whether the vote is right.
    """
    k = len(answers) if k is None else k
    if len(answers) != len(correct):
        raise ValueError(f"`correct` must be as long as `answers` ({len(answers)}), got {len(correct)}.")
    if not 1 <= k <= len(answers):
        raise ValueError(
            f"`k` must lie between 1 and the number of answers ({len(answers)}), got {k}. "
            "Draw more answers per problem or lower `k`."
        )
    winner = majority_index(answers[:k])
    return winner is not None and bool(correct[winner])


def _majority_update(
    answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]], *, k: int | None
) -> tuple[int, int]:
    """Count the problems whose vote is right, and the problems."""
    return sum(majority_at_k(a, c, k=k) for a, c in zip(answers, correct, strict=True)), len(answers)


class MajorityAtK(Metric):
    """The share of problems whose vote among the first k completions is right.

    Args:
        k: how many completions vote; all of a problem's if None.
    """

    full_state_update = False
    higher_is_better = True
    successes: Tensor
    problems: Tensor

    def __init__(self, k: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k is not None and k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.k = k
        self.add_state("successes", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]]) -> None:
        """Add problems: for each its completions' answers, and whether each is right."""
        successes, problems = _majority_update(answers, correct, k=self.k)
        self.successes += successes
        self.problems += problems

    def compute(self) -> Tensor:
        """The share over all problems so far, float64; NaN without any."""
        return self.successes.double() / self.problems
