"""Rewards with the signature of TRL's reward functions, so that ours work in TRL's trainers and TRL's work here.

A reward function is called with lists, one entry for each completion, and returns one number for each, or None where
it does not apply:

    reward(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

`prompts` and `completions` are texts, or conversations where the policy has a chat template. `columns` are the fields
of the data set (`problem`, `answer`, `id`), and whatever else the trainer hands over.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.ledger import Ledger
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.types import UserError

Text = str | list[dict[str, Any]]
"""A text, or a conversation."""
NAN = float("nan")


class RewardFunction(Protocol):
    """What TRL calls a reward function."""

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Sequence[Any]:
        """One reward, or None, for each completion."""
        ...


def plain_text(text: Text) -> str:
    """A completion or prompt as text: of a conversation, what is said last."""
    return text if isinstance(text, str) else str(text[-1]["content"])


class JudgeReward:
    """r(x, y) of a learned judge: what ∇-Reasoner climbs.

    It reads the very ids that the policy wrote (`completion_ids`, which share its vocabulary), not the text encoded
    anew, so that it gives what the same judge gives a decoder.

    Args:
        judge: a sequence classifier, a likelihood, or any other reward of this package.
        batch_size: completions scored at once. The rewards do not depend on it.
    """

    def __init__(self, judge: AbstractReward, *, name: str = "judge", batch_size: int = 256):
        self.judge, self.batch_size, self.__name__ = judge, batch_size, name
        self.ledger = Ledger(1)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        problem: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of the completions. Without the column `problem`, the prompt's text is the problem."""
        del columns
        if completion_ids is None:
            tokenizer = self.judge.tokenizer
            completion_ids = [tokenizer(plain_text(c), add_special_tokens=False).input_ids for c in completions]
        problems = [plain_text(p).strip("\n") for p in prompts] if problem is None else list(problem)
        rewards: list[float | None] = []
        for start in range(0, len(problems), self.batch_size):
            part = slice(start, start + self.batch_size)
            rewards += self._score(problems[part], completion_ids[part]).tolist()
        # a completion without a token has nothing to be scored at
        return [r if len(c) else None for r, c in zip(rewards, completion_ids, strict=True)]

    def _score(self, problems: Sequence[str], completions: Sequence[Sequence[int]]) -> Tensor:
        device = next(self.judge.parameters()).device
        unique = list(dict.fromkeys(problems))
        where = torch.tensor([unique.index(text) for text in problems], device=device)
        rows = [torch.tensor(list(ids) or [0], device=device) for ids in completions]
        ids = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        prefix = self.judge.prefill(unique, torch.zeros(len(unique), dtype=torch.int64), self.ledger).select(where)
        with self.ledger.phase("score"):
            return self.judge.score(prefix, ids, mask).reward


class GraderReward:
    """1 for a right answer, 0 for a wrong one, None where the answer is unknown: a verifier as a reward.

    Args:
        grade: `grade(completion, answer)`: `grade_boxed` (math-verify on the last boxed answer) or `grade_exact` of
            `nabla_rl.data.problems`, or your own.
    """

    def __init__(self, grade: Callable[[str, str], bool], *, name: str = "grader"):
        self.grade, self.__name__ = grade, name

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        answer: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Grade the completions by the column `answer`."""
        del prompts, columns
        answers = [None] * len(completions) if answer is None else answer
        return [
            None if right is None else float(self.grade(plain_text(text), right))
            for text, right in zip(completions, answers, strict=True)
        ]


def compute_rewards(functions: Sequence[RewardFunction], **columns: Any) -> Tensor:
    """What every function says of every completion, (completions, functions) float32; NaN where it gave None.

    Raises:
        UserError: a function returns the wrong number of rewards, or an infinite one.
    """
    count, parts = len(columns["completions"]), []
    for function in functions:
        given = function(**columns)
        if len(given) != count:
            raise UserError(
                f"reward {reward_name(function)!r}",
                f"one reward for each of {count} completions",
                str(len(given)),
                "Return a list as long as `completions`.",
            )
        values = [NAN if value is None else float(value) for value in given]
        if any(math.isinf(value) for value in values):
            raise UserError(
                f"reward {reward_name(function)!r}",
                "numbers",
                "infinity",
                "Return None where a reward does not apply.",
            )
        parts.append(torch.tensor(values, dtype=torch.float32))
    return torch.stack(parts, 1)


def weigh_rewards(rewards: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The weighted sum over functions, (completions,): those that gave none are left out; NaN where all are."""
    scale = torch.ones(rewards.shape[1]) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
    return (rewards * scale).nansum(1).masked_fill(rewards.isnan().all(1), NAN)


def import_reward(name: str) -> RewardFunction:
    """The function of a dotted name, for instance `trl.rewards.think_format_reward`."""
    module, _, attribute = name.rpartition(".")
    try:
        function = vars(importlib.import_module(module))[attribute] if module else None
    except ImportError:
        function = None
    except KeyError:
        # modules that load what they export when it is asked for
        function = getattr(importlib.import_module(module), attribute, None)
    if not callable(function):
        raise UserError(
            "reward_funcs",
            "judge, grader, or the dotted name of a function",
            repr(name),
            "Check that it can be imported from here.",
        )
    return function  # pyright: ignore


def reward_name(function: RewardFunction) -> str:
    """The name that metrics have."""
    return str(getattr(function, "__name__", type(function).__name__))
