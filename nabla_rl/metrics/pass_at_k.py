"""pass@k: would one of k answers have been right?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def pass_at_k(num_correct: Tensor, num_generations: Tensor, *, k: int) -> Tensor:
    r"""The unbiased estimate of the chance that k independent answers contain a right one, from n ≥ k answers.

    .. math:: 1 - \binom{n - c}{k} / \binom{n}{k} = 1 - \prod_{j=0}^{k-1} \frac{n - c - j}{n - j}

    where c is `num_correct` and n is `num_generations`. The plug-in estimate 1 - (1 - c/n)^k is too low for k > 1.

    Args:
        num_correct: how many of a problem's answers are right; shape (problems,).
        num_generations: how many answers the problem got; shape (problems,).
        k: how many answers are allowed.

    Returns:
        One probability per problem, float64.

    Example:
        >>> pass_at_k(torch.tensor([0, 1, 3]), torch.tensor([4, 4, 4]), k=2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)

    References:
        Chen et al., 2021, Eq. 1, https://arxiv.org/abs/2107.03374
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if bool((num_generations < k).any()):
        raise ValueError(
            f"`num_generations` must be at least k={k}, got {int(num_generations.min())}. "
            "Draw more answers per problem or lower `k`."
        )
    if bool(((num_correct < 0) | (num_correct > num_generations)).any()):
        raise ValueError("`num_correct` must lie between 0 and `num_generations`.")
    draws = torch.arange(k, dtype=torch.float64, device=num_correct.device)
    generations = num_generations.to(torch.float64)[..., None]
    wrong = (num_generations - num_correct).to(torch.float64)[..., None]
    # Fewer than k wrong answers: some factor is zero, and pass@k is one.
    return 1 - ((wrong - draws).clamp(min=0) / (generations - draws)).prod(dim=-1)


def _pass_at_k_update(num_correct: Tensor, num_generations: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Sum the problems' estimates and count the problems."""
    estimates = pass_at_k(num_correct, num_generations, k=k)
    return estimates.sum(), torch.tensor(estimates.numel(), device=estimates.device)


class PassAtK(Metric):
    """The mean over problems of `pass_at_k`. Problems may differ in how many answers they got.

    Args:
        k: how many answers are allowed.
    """

    full_state_update = False
    higher_is_better = True
    estimate: Tensor
    problems: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.k = k
        self.add_state("estimate", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, num_correct: Tensor, num_generations: Tensor) -> None:
        """Add problems: how many answers each got, and how many of them are right; both of shape (problems,)."""
        estimate, problems = _pass_at_k_update(num_correct, num_generations, k=self.k)
        self.estimate += estimate
        self.problems += problems

    def compute(self) -> Tensor:
        """The mean over all problems so far; NaN without any."""
        return self.estimate / self.problems
