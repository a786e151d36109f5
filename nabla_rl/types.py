"""Shared vocabulary: errors, outcomes, and the shapes of the callables that the algorithms are written against."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


class UserError(ValueError):
    """Bad input from outside, told in one line: what, what was expected, what was found, what to do.

    Args:
        option: The setting that is wrong, dotted as the Python API has it (`beta`, `sampling.top_p`), or the place of
            the fault (`problem 'p3'`, `problems.jsonl, line 7`).
        expected: What would have been right, as a noun phrase.
        found: What was there instead. It is shown as it is, and may be the user's own text.
        advice: What to do about it, in whole sentences. A setting is named in braces (`Lower {beta}.`), here and in
            `expected`; whoever shows the error decides how it is spelled.

    Example:
        >>> print(UserError("beta", "a positive number", "-1", "Use {beta} = inf to leave the reward out."))
        beta: expected a positive number, found -1. Use `beta` = inf to leave the reward out.
    """

    LIMIT = 400

    def __init__(self, option: str, expected: str, found: str, advice: str = ""):
        super().__init__(option, expected, found, advice)
        self.option, self.expected, self.found, self.advice = option, expected, found, advice

    def __str__(self) -> str:
        return self.told(lambda name: name, lambda name: f"`{name}`")

    def told(self, subject: Callable[[str], str], mention: Callable[[str], str]) -> str:
        """The line, at most `LIMIT` characters; `subject` spells the faulty setting, `mention` any other one."""
        expected, advice = (_SETTING.sub(lambda m: mention(m[1]), text) for text in (self.expected, self.advice))
        head = f"{_printable(subject(self.option))}: expected {expected}, found "
        tail = f". {advice}" if advice else "."
        room = max(self.LIMIT - len(head) - len(tail), 24)
        found = _printable(self.found)
        return (head + (found if len(found) <= room else found[: room - 1] + "…") + tail)[: self.LIMIT]

    def within(self, section: str) -> UserError:
        """The same error of a setting that belongs to `section`: `beta` becomes `teacher.beta`."""
        return self.renamed(lambda name: f"{section}.{name}")

    def renamed(self, rename: Callable[[str], str]) -> UserError:
        """The same error with every setting renamed, the subject and those in braces."""
        expected, advice = (_SETTING.sub(lambda m: f"{{{rename(m[1])}}}", t) for t in (self.expected, self.advice))
        subject = rename(self.option) if _NAME.fullmatch(self.option) else self.option
        return UserError(subject, expected, self.found, advice)


_NAME = re.compile(r"[A-Za-z_][\w]*(?:\.[A-Za-z_][\w]*)*")
_SETTING = re.compile(r"\{([A-Za-z_][\w]*(?:\.[A-Za-z_][\w]*)*)\}")


def _printable(text: str) -> str:
    """One line in which control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


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
    for, since cached gradients make some unnecessary; `tokens` (a `functional.SoftTokens`) holds only those. The
    result must be differentiable in `tokens.probs`, and position i of it may depend on earlier positions only.
    """

    def __call__(self, tokens: Any, rows: Int[Tensor, " active"], /) -> Float[Tensor, "active length support"]:
        """Log-probabilities of the support tokens at each position of the given rows."""
        ...


@runtime_checkable
class RewardFn(Protocol):
    """The reward, as an optimiser of tokens sees it: r(x, y) of soft tokens, differentiable in `tokens.probs`."""

    def __call__(self, tokens: Any, rows: Int[Tensor, " active"], /) -> Float[Tensor, " active"]:
        """Rewards of the given rows."""
        ...
