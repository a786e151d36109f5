"""Self-consistency (Wang et al., 2022, arXiv 2203.11171): draw n completions, answer with the majority."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from nabla_rl.data.problems import Extract, Problem, extract_boxed
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Candidate,
    Decoded,
    Sampling,
    candidates,
    decoded,
    draw_rollouts,
    prefill,
)
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
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    extract: Extract = extract_boxed
    name: str = "self_consistency"

    def decode(
        self, problems: Sequence[Problem], policy: Policy, reward: AbstractReward | None, ledger: Ledger
    ) -> list[Decoded]:
        prefix = prefill(problems, policy, ledger, self.sampling.max_new_tokens)
        rollout = draw_rollouts(problems, policy, prefix, self.sampling, n=self.n, seed=self.seed)
        tried, finished = candidates(policy, rollout, None), rollout.finished.tolist()
        results = []
        for index, problem in enumerate(problems):
            rows = slice(index * self.n, (index + 1) * self.n)
            chosen = choose_by_majority(tried[rows], self.extract)
            results.append(decoded(problem, chosen, tried[rows], finished[rows][chosen]))
        return results
