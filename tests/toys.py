"""Small differentiable policies and rewards with known answers, in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nabla_rl.functional import SoftTokens


def probs_of(tokens: SoftTokens | Tensor) -> Tensor:
    """The probabilities, also where a test hands over the bare tensor."""
    return tokens.probs if isinstance(tokens, SoftTokens) else tokens


class ToyPolicy:
    """A recurrent causal policy on (batch, length, vocab) token probabilities, with a prompt vector per row."""

    def __init__(self, vocab: int = 5, hidden: int = 6, rows: int = 1, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.prompt, self.embedding, self.mixing = draw(rows, hidden), draw(vocab, hidden), 0.5 * draw(hidden, hidden)
        self.head, self.bias = draw(hidden, vocab), 0.5 * draw(vocab)
        self.calls: list[list[int]] = []

    def __call__(self, tokens: SoftTokens | Tensor, rows: Tensor) -> Tensor:
        token_probs = probs_of(tokens)
        self.calls.append(rows.tolist())
        state, log_probs = torch.tanh(self.prompt[rows]), []
        for position in range(token_probs.shape[1]):
            log_probs.append(torch.log_softmax(state @ self.head + self.bias, dim=-1))
            token = token_probs[:, position].double() @ self.embedding
            state = torch.tanh(state @ self.mixing + token)
        return torch.stack(log_probs, dim=1) if log_probs else token_probs.double()


class ToyReward:
    """A smooth reward of the mean token and of the neighbours, pooled by the mask; different in each row."""

    def __init__(self, mask: Tensor, vocab: int = 5, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mask = mask
        self.weight = torch.randn(len(mask), vocab, generator=generator, dtype=torch.float64)
        self.pairs = torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)
        self.calls: list[list[int]] = []

    def __call__(self, tokens: SoftTokens | Tensor, rows: Tensor) -> Tensor:
        token_probs = probs_of(tokens)
        self.calls.append(rows.tolist())
        valid = token_probs.double().masked_fill(~self.mask[rows, :, None], 0.0)
        neighbours = torch.einsum("blv,vw,blw->b", valid[:, :-1], self.pairs, valid[:, 1:])
        return torch.tanh((valid.sum(dim=1) * self.weight[rows]).sum(dim=-1)) + 0.3 * neighbours


class EnumerablePolicy:
    """Vocabulary 3, length 2: all nine completions can be listed, so every law on them is known exactly."""

    vocab, length = 3, 2

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = scale * torch.randn(3, generator=generator, dtype=torch.float64)
        self.second = scale * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        self.sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))  # (9, 2)

    def __call__(self, tokens: SoftTokens | Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities (active, 2, 3); the second position reads its table at the soft first token."""
        token_probs = probs_of(tokens)
        first = self.first.expand(len(rows), 3)
        second = token_probs[:, 0].double() @ self.second
        return torch.log_softmax(torch.stack([first, second], dim=1), dim=-1)

    def logps(self) -> Tensor:
        """Log-probability of each of the nine completions."""
        first, second = torch.log_softmax(self.first, dim=-1), torch.log_softmax(self.second, dim=-1)
        return first[self.sequences[:, 0]] + second[self.sequences[:, 0], self.sequences[:, 1]]


class EnumerableReward:
    """A table of nine rewards, extended to soft tokens bilinearly: r(y) = y_1ᵀ R y_2."""

    def __init__(self, seed: int = 1, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def __call__(self, tokens: SoftTokens | Tensor, rows: Tensor) -> Tensor:
        token_probs = probs_of(tokens)
        return torch.einsum("bv,vw,bw->b", token_probs[:, 0].double(), self.table, token_probs[:, 1].double())

    def rewards(self) -> Tensor:
        """Reward of each of the nine completions, in the order of `EnumerablePolicy.sequences`."""
        return self.table.flatten()


def gibbs_logps(logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Exact log-law of the tilted policy π(y) exp(r(y)/β) / Z on listed completions, and log Z."""
    unnormalised = logps + rewards / beta
    return torch.log_softmax(unnormalised, dim=0), unnormalised.logsumexp(dim=0)
