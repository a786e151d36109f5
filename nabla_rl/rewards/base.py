"""What a differentiable reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from nabla_rl.functional.relaxation import SoftTokens
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Encoded, Prefix, Track
from nabla_rl.models.loading import RewardOptions
from nabla_rl.types import UserError


@dataclass
class Scored:
    """Rewards of hard completions.

    Attributes:
        reward: (batch,) float32.
        encoded: what was computed on the way, to be cut into a longer prefix when tokens are committed.
    """

    reward: Tensor
    encoded: Encoded


class AbstractReward(nn.Module, ABC):
    """A frozen scorer r(x, y), differentiable in relaxed completion tokens that share the policy's vocabulary.

    On a prefix that holds completion tokens already (cut out of `Scored.encoded`) it gives the reward of the whole
    completion.

    Attributes:
        name: What this kind of reward is called in `--model.reward.kind` and its own options.
        tokenizer: The tokenizer, which shares the policy's vocabulary.
    """

    name: ClassVar[str]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, options: RewardOptions, *, device: torch.device, argument: str) -> AbstractReward:
        """The reward that the options ask for, frozen, on a device.

        Further keyword arguments of a subclass are options of its own, which the command line shows and hands over.

        Args:
            options: Name, type of the weights, and the other options that every kind has.
            device: Where the weights are put.
            argument: The setting that errors are about, such as "reward".
        """
        raise UserError(
            f"{argument}.kind",
            "a class with a `load` method of its own",
            cls.__name__,
            "Write one, as docs/extending.md shows.",
        )

    @abstractmethod
    def prefill(self, problems: list[str], accounts: Tensor, ledger: Ledger) -> Prefix:
        """Encode the prompts as this reward's own template writes them, once."""

    @abstractmethod
    def forward(
        self,
        prefix: Prefix,
        tokens: SoftTokens,
        mask: Tensor,
        *,
        support: Tensor | None = None,
    ) -> Tensor:
        """r(x, y) of relaxed completions, (batch,) float32, with gradients to `tokens.probs` (batch, length,
        support)."""

    @abstractmethod
    def score(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Scored:
        """r(x, y) of hard completions (batch, length), right padded, without gradients."""


class AbstractProcessReward(AbstractReward):
    """A reward that also judges every prefix of a completion."""

    @abstractmethod
    def values(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
        """V(y_≤i): what the judge thinks of the completion up to and including token i, (batch, length) float32."""

    @abstractmethod
    def read(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Encoded:
        """Read hard completions (batch, length), right padded, complete or not: no outcome is asked for."""

    @abstractmethod
    def encoded_values(self, encoded: Encoded) -> Tensor:
        """V(y_≤i) of completions that `read` or `score` has read, (batch, length) float32. No transformer pass."""

    @abstractmethod
    def fork_values(self, tracks: Sequence[Track], positions: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """V(y_<i, v): the value of each completion with its token i replaced by v, nothing after it, exactly.

        Args:
            tracks: completions that `score` has read.
            positions: (batch, n), the i of each replacement.
            ids: (batch, n), its v.
            mask: (batch, n), True at real ones.

        Returns:
            (batch, n) float32.
        """

    @abstractmethod
    def fork_changes(
        self, tracks: Sequence[Track], positions: Tensor, ids: Tensor, mask: Tensor, alternatives: Tensor
    ) -> Tensor:
        """V(y_<i, v) - V(y_≤i) to first order in y_i: g_i[v] - g_i[y_i] with the own-token gradient g_i = ∂V_i/∂y_i.

        One forward and one backward of one token a position, however many alternatives there are; what other positions
        contribute is held fixed.

        Args:
            tracks: completions that `score` has read.
            positions: (batch, n), the i of each gradient.
            ids: (batch, n), the tokens y_i at which it is taken.
            mask: (batch, n), True at real ones.
            alternatives: (batch, n, k), the v of each position.

        Returns:
            (batch, n, k) float32.
        """


def check_shared_vocabulary(
    policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase, *, argument: str = "reward.name"
) -> None:
    """Refuse a pair of tokenizers that give tokens different ids, with the count of them."""
    ours, theirs = policy.get_vocab(), reward.get_vocab()
    differing = sum(theirs.get(token) != index for token, index in ours.items())
    differing += sum(token not in ours for token in theirs)
    if differing:
        raise UserError(
            argument,
            f"the policy's vocabulary of {len(ours)} tokens",
            f"one of {len(theirs)} in which {differing} tokens differ",
            "Take a reward model of the policy's family.",
        )


def last_valid(mask: Tensor) -> Tensor:
    """Index of the last True in each row of `mask` (batch, length)."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return (steps * mask).argmax(-1)
