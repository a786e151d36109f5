"""Every sequence of a short length over a small vocabulary, and a policy that is a table over their prefixes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nabla_rl.types import UserError

MAX_SIZE = 1_000_000
"""Sequences that are listed at most."""


@dataclass(frozen=True)
class Space:
    """All sequences of `length` tokens out of `vocab`, numbered in lexicographic order (the first token counts most).

    A law on it is a tensor (size,) of log-probabilities, float64.
    """

    vocab: int
    length: int

    def __post_init__(self) -> None:
        """Refuse what cannot be listed."""
        if self.vocab < 2 or self.length < 1:
            raise UserError(
                "vocab` and `length",
                "at least 2 and 1",
                f"{self.vocab} and {self.length}",
                "There is nothing to choose.",
            )
        if self.length * torch.tensor(float(self.vocab)).log() > torch.tensor(float(MAX_SIZE)).log() + 1e-6:
            raise UserError(
                "vocab` ** `length",
                f"at most {MAX_SIZE:,} sequences",
                f"{self.vocab} ** {self.length}",
                "Take a shorter length or fewer tokens.",
            )

    @property
    def size(self) -> int:
        """How many sequences there are."""
        return self.vocab**self.length

    @property
    def weights(self) -> Int[Tensor, " length"]:
        """What a token adds to a sequence's number, by position."""
        return self.vocab ** torch.arange(self.length - 1, -1, -1)

    def tokens(self, index: Int[Tensor, "*batch"] | None = None) -> Int[Tensor, "*batch length"]:
        """The tokens of the sequences of these numbers, or of all."""
        index = torch.arange(self.size) if index is None else index
        return index[..., None] // self.weights % self.vocab

    def index(self, tokens: Int[Tensor, "*batch length"]) -> Int[Tensor, "*batch"]:
        """The number of each sequence."""
        return (tokens * self.weights).sum(-1)

    def substitutions(self, index: Int[Tensor, " batch"]) -> Int[Tensor, "batch length vocab"]:
        """The numbers of the sequences that differ in one token: [b, i, v] has token v at position i."""
        change = torch.arange(self.vocab) - self.tokens(index)[..., None]
        return index[:, None, None] + change * self.weights[:, None]


def conditionals(logps: Float[Tensor, " size"], space: Space) -> list[Float[Tensor, "prefixes vocab"]]:
    r"""The autoregressive factors of a law: :math:`\log p(v \mid y_{<i})` for each position and prefix.

    Args:
        logps: Log-probabilities of all sequences; :math:`-\infty` is allowed.
        space: The sequences.

    Returns:
        For each position i a table (vocab ** i, vocab). After a prefix of probability zero all tokens are equally
        likely.
    """
    marginal, tables = logps, []
    for _ in range(space.length):
        joint = marginal.view(-1, space.vocab)
        marginal = joint.logsumexp(-1)
        table = joint - marginal[:, None]
        tables.append(table.masked_fill(marginal.isneginf()[:, None], -torch.tensor(float(space.vocab)).log().item()))
    return tables[::-1]


class TabularPolicy(nn.Module):
    r"""An autoregressive policy with free logits after every prefix: any law with full support, exactly.

    Args:
        tables: for each position i the logits (vocab ** i, vocab) after each prefix of i tokens.
    """

    def __init__(self, tables: list[Float[Tensor, "prefixes vocab"]]):
        super().__init__()
        self.space = Space(tables[0].shape[-1], len(tables))
        for position, table in enumerate(tables):
            expected = (self.space.vocab**position, self.space.vocab)
            if tuple(table.shape) != expected:
                raise UserError("tables", f"{expected} at position {position}", str(tuple(table.shape)))
        self.tables = nn.ParameterList([table.detach().double().clone() for table in tables])

    @classmethod
    def from_logps(cls, logps: Float[Tensor, " size"], space: Space) -> TabularPolicy:
        """The policy of a given law, which must give every sequence a probability above zero."""
        if not bool(logps.isfinite().all()):
            raise UserError("logps", "finite", "a sequence of probability zero", "No finite logits give that.")
        return cls(conditionals(logps, space))

    def forward(self) -> Float[Tensor, " size"]:
        r""":math:`\log \pi_\theta(y)` of every sequence, differentiable in the tables."""
        total = torch.zeros(1, dtype=torch.float64)
        for table in self.tables:
            total = (total[:, None] + table.log_softmax(-1)).flatten()
        return total

    def per_token_logps(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length"]:
        """Log-probability of each token of given sequences, reading only the prefixes that they have."""
        prefix, found = torch.zeros(len(tokens), dtype=torch.int64), []
        for position, table in enumerate(self.tables):
            token = tokens[:, position]
            found.append(table[prefix].log_softmax(-1).gather(1, token[:, None]).squeeze(1))
            prefix = prefix * self.space.vocab + token
        return torch.stack(found, 1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Int[Tensor, "count length"]:
        """Sequences drawn token by token."""
        prefix, tokens = torch.zeros(count, dtype=torch.int64), []
        for table in self.tables:
            law = table[prefix].softmax(-1)
            tokens.append(torch.multinomial(law, 1, generator=generator).squeeze(1))
            prefix = prefix * self.space.vocab + tokens[-1]
        return torch.stack(tokens, 1)
