"""Self-consistency (Wang et al., 2022, arXiv 2203.11171): draw n completions, answer with the majority."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from nabla_rl.data.problems import Extract, Problem
from nabla_rl.decoding.base import AbstractDecoder, Candidate, Decoded, Setting
from nabla_rl.decoding.draws import answer_by_draws


def choose_by_majority(tried: Sequence[Candidate], extract: Extract) -> int:
    """The first candidate with the most frequent answer.

    Ties go to the answer seen first. Completions without an answer do not vote.
    """
    answers = [extract(candidate.text) for candidate in tried]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0
    return answers.index(counts.most_common(1)[0][0])


@dataclass(frozen=True)
class SelfConsistency(AbstractDecoder):
    """The majority answer of n samples, without a reward model."""

    n: int = 8
    """Number of completions drawn."""

    name: ClassVar[str] = "self_consistency"
    needs_reward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        self.check(n=1)

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        extract = cache(setting.extract)
        return answer_by_draws(
            problems, setting, None, most=self.n, choose=lambda tried: choose_by_majority(tried, extract)
        )
