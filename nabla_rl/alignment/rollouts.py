"""Groups of completions to train on: the policy's own samples, those of a search, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.adapters.training import trl_prompt
from nabla_rl.alignment.config import RLConfig
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import AbstractDecoder, Setting
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.functions import Text
from nabla_rl.types import UserError

Rollouts = Literal["sample", "search", "mixed"]


@dataclass
class MicroBatch:
    """Groups of completions that go through one forward and backward.

    Attributes:
        prompts: Ids of the P prompts.
        ids: (P·G, length), right padded.
        mask: (P·G, length), True at tokens.
        rewards: (P·G, functions), NaN where there is none.
        total: (P·G,), their weighted sum.
        finished: (P·G,), True where the completion ended by itself.
        advantages: (P·G,), where they are known.
        old: (P·G, length), log-probabilities under the policy that drew them, where they are known.
        ref: (P·G, length), log-probabilities under the reference, where they are known.
        num_items: Completion tokens of the whole draw, averaged over processes.
    """

    prompts: list[list[int]]
    ids: Tensor
    mask: Tensor
    rewards: Tensor
    total: Tensor
    finished: Tensor
    advantages: Tensor | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    num_items: float = 0.0


@dataclass(frozen=True)
class Completions:
    """Rows in groups, right padded: row G·i + j is completion j of problem i.

    Attributes:
        ids: (rows, length), right padded.
        mask: (rows, length), True at tokens.
        finished: (rows,), True where the completion ended by itself.
    """

    ids: Tensor
    mask: Tensor
    finished: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], finished: Sequence[bool], policy: Policy) -> Completions:
        """Lists of tokens as padded rows."""
        tensors = [torch.tensor(list(row), device=policy.device) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=policy.pad_id)
        lengths = torch.tensor([len(row) for row in rows], device=policy.device)
        mask = torch.arange(ids.shape[1], device=policy.device) < lengths[:, None]
        return cls(ids, mask, torch.tensor(list(finished), device=policy.device))

    def rows(self) -> list[list[int]]:
        """The tokens without padding."""
        return [row[kept].tolist() for row, kept in zip(self.ids, self.mask, strict=True)]


def check_search(decoder: AbstractDecoder, rl: RLConfig) -> None:
    """Refuse a search that would find the same completion for a whole group."""
    if decoder.is_deterministic(rl.sampling):
        raise UserError(
            "search",
            "a search whose completions of a group differ",
            f"{decoder.name}, which always answers alike with these options",
            "For {search} edit_search pass {edit_search.temperature} 1.",
        )


@torch.no_grad()
def sample_groups(
    policy: Policy,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    rl: RLConfig,
    ledger: Ledger,
    *,
    key: tuple[Any, ...],
) -> Completions:
    """The policy's own samples, numbers `indices` of each problem's group; each depends on (key, problem, number)."""
    prefix = policy.prefill(prompts, torch.zeros(len(prompts), dtype=torch.int64), ledger)
    rows = torch.arange(len(prompts), device=policy.device).repeat_interleave(len(indices))
    drawn = policy.rollout(
        prefix.select(rows),
        rl.sampling,
        [seeded_generator(*key, problem.id, j) for problem in problems for j in indices],
    )
    return Completions(drawn.ids, drawn.mask, drawn.finished)


def search_groups(
    decoder: AbstractDecoder,
    policy: Policy,
    judge: AbstractReward | None,
    problems: Sequence[Problem],
    indices: Sequence[int],
    number: int,
    *,
    rl: RLConfig,
    seed: int,
) -> tuple[Completions, float]:
    """The completions of a search, each with its own random numbers, and the FLOPs that they cost."""
    asked = [replace(problem, id=f"{problem.id}/{number}/{j}") for problem in problems for j in indices]
    ledger = Ledger(len(asked))
    with torch.enable_grad():
        setting = Setting(policy, judge, ledger, beta=rl.beta, sampling=rl.sampling, seed=seed)
        found = decoder.decode(asked, setting)
    completions = Completions.of([one.ids for one in found], [one.finished for one in found], policy)
    return completions, sum(ledger.cost(index).flops for index in range(len(asked)))


def interleave(first: Completions, second: Completions, groups: int, policy: Policy) -> Completions:
    """Groups joined by problem: the first's rows, then the second's."""
    rows, finished = [], []
    each = [(part.rows(), part.finished.tolist(), len(part.ids) // groups) for part in (first, second)]
    for group in range(groups):
        for tokens, ended, size in each:
            rows += tokens[group * size :][:size]
            finished += ended[group * size :][:size]
    return Completions.of(rows, finished, policy)


def reward_columns(policy: Policy, problems: Sequence[Problem], ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """The arguments of a reward function, as TRL's trainers would give them."""
    size = len(ids) // len(problems)
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    repeated = [problem for problem in problems for _ in range(size)]
    texts: list[Text] = [policy.decode(row) for row in rows]
    if policy.tokenizer.chat_template is not None:
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return {
        "prompts": [trl_prompt(policy, problem.problem) for problem in repeated],
        "completions": texts,
        "completion_ids": rows,
        "problem": [problem.problem for problem in repeated],
        "answer": [problem.answer for problem in repeated],
        "id": [problem.id for problem in repeated],
    }


def sample_lines(
    policy: Policy, problems: Sequence[Problem], ids: Tensor, mask: Tensor, total: Tensor, count: int | None
) -> list[dict[str, Any]]:
    """The first `count` completions of a draw as text, for the log; None is all of them."""
    size, rows = len(ids) // len(problems), range(len(ids) if count is None else min(count, len(ids)))
    return [
        {
            "prompt": problems[row // size].problem,
            "completion": policy.decode(ids[row][mask[row]].tolist()),
            "reward": total[row].item(),
        }
        for row in rows
    ]
