"""Self-consistency (Wang et al., 2022, arXiv 2203.11171): draw n completions, answer with the majority."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from nabla_rl.data.problems import Extract, Problem, extract_boxed
from nabla_rl.decoding.base import AbstractDecoder, Candidate, Decoded, Sampling
from nabla_rl.decoding.budget import Budget
from nabla_rl.decoding.draws import answer_by_draws
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward


def choose_by_majority(tried: Sequence[Candidate], extract: Extract) -> int:
    """The first candidate with the most frequent answer; ties go to the answer seen first, no answer never wins a
    vote."""
    answers = [extract(candidate.text) for candidate in tried]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0
    return answers.index(counts.most_common(1)[0][0])


@dataclass(frozen=True)
class SelfConsistency(AbstractDecoder):
    """The majority answer of n samples. No reward model."""

    n: int = 8
    """Completions at most."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    extract: Extract = extract_boxed
    budget: Budget = field(default_factory=Budget)
    name: str = "self_consistency"

    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        extract = cache(self.extract)
        return answer_by_draws(
            problems, policy, None, ledger, sampling=self.sampling, seed=self.seed, most=self.n, budget=self.budget,
            choose=lambda tried: choose_by_majority(tried, extract),
        )  # fmt: skip
