"""Best-of-n: draw n completions and choose one by reward, by energy, or by a vote weighted with the reward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch

from nabla_rl.data.problems import Extract, Problem
from nabla_rl.decoding.base import AbstractDecoder, Candidate, Decoded, Setting, energies, require_reward
from nabla_rl.decoding.draws import answer_by_draws

Choice = Literal["energy", "reward", "weighted_vote"]


def choose_by_energy(tried: Sequence[Candidate], beta: float, extract: Extract) -> int:
    """The candidate of lowest energy -r/β - log π: the likeliest under the tilted policy."""
    del extract
    return int(energies(tried, beta).argmin())


def choose_by_reward(tried: Sequence[Candidate], beta: float, extract: Extract) -> int:
    """The candidate of highest reward."""
    del beta, extract
    return max(range(len(tried)), key=lambda index: tried[index].reward or 0.0)


def choose_by_weighted_vote(tried: Sequence[Candidate], beta: float, extract: Extract) -> int:
    """The best candidate of the answer with most weight, a candidate weighing σ(r).

    With a reward that is the log-odds of being right, σ(r) is the probability of it.
    """
    del beta
    weights = torch.tensor([c.reward for c in tried], dtype=torch.float64).sigmoid().tolist()
    totals: dict[str | None, float] = defaultdict(float)
    for candidate, weight in zip(tried, weights, strict=True):
        totals[extract(candidate.text)] += weight
    totals.pop(None, None)
    if not totals:
        return max(range(len(tried)), key=weights.__getitem__)
    answer = max(totals, key=totals.__getitem__)
    voters = [index for index, c in enumerate(tried) if extract(c.text) == answer]
    return max(voters, key=weights.__getitem__)


CHOICES: dict[Choice, Callable[[Sequence[Candidate], float, Extract], int]] = {
    "energy": choose_by_energy,
    "reward": choose_by_reward,
    "weighted_vote": choose_by_weighted_vote,
}


@dataclass(frozen=True)
class BestOfN(AbstractDecoder):
    """The best of n samples."""

    n: int = 8
    """Number of completions drawn."""
    choose_by: Choice = "energy"
    """What is best: lowest energy, highest reward, or weighted_vote (the answer with most σ(r))."""

    name: ClassVar[str] = "best_of_n"

    def __post_init__(self) -> None:
        """Check the values."""
        self.check(n=1)

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        extract = cache(setting.extract)
        return answer_by_draws(
            problems, setting, require_reward(self.name, setting.reward), most=self.n,
            choose=lambda tried: CHOICES[self.choose_by](tried, setting.beta, extract),
        )  # fmt: skip
