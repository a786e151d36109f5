"""The likelihood under a second, stronger language model as a reward: a judge that needs no training as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.functional.energy import expected_logps
from nabla_rl.functional.logps import upcast
from nabla_rl.functional.relaxation import SoftTokens
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Encoded, Prefix, Track
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractProcessReward, Scored


class LikelihoodReward(AbstractProcessReward):
    """r(x, y) = log π_strong(y | x), Σ over the completion's tokens; the process value is the partial sum.

    Args:
        judge: the stronger language model. It is booked as the reward.
    """

    name: ClassVar[str] = "likelihood"

    @classmethod
    def load(cls, options: RewardOptions, *, device: torch.device, argument: str) -> LikelihoodReward:
        assert options.name is not None
        policy = PolicyOptions(options.name, options.dtype, options.system_prompt, options.trust_remote_code)
        return cls(load_policy(policy, device=device, argument=argument))

    def __init__(self, judge: Policy):
        super().__init__()
        self.judge = judge
        self.judge.backbone.name = "reward"
        self.tokenizer = judge.tokenizer

    def prefill(self, problems: list[str], accounts: Tensor, ledger: Ledger) -> Prefix:
        prefix = self.judge.prefill([self.judge.encode_prompt(problem) for problem in problems], accounts, ledger)
        prefix.earned = torch.zeros(len(prefix), dtype=upcast(prefix.hidden[:0]).dtype, device=prefix.hidden.device)
        return prefix

    def forward(
        self,
        prefix: Prefix,
        tokens: SoftTokens,
        mask: Tensor,
        *,
        support: Tensor | None = None,
    ) -> Tensor:
        log_probs = self.judge.completion_log_probs(prefix, tokens, mask, support=support)
        return _earned(prefix) + expected_logps(tokens.probs, log_probs, mask)

    @torch.no_grad()
    def score(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Scored:
        encoded = self.read(prefix, ids, mask)
        return Scored(_sums(encoded)[:, -1], encoded)

    @torch.no_grad()
    def read(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Encoded:
        encoded = self.judge.backbone.encode(prefix, ids, mask)
        self.judge.backbone.record_head(prefix, mask.sum(-1))
        logps = self._per_token(encoded.hidden[:, :-1], ids, mask)
        before = _earned(prefix)[:, None]
        encoded.earned = torch.cat([before, before + logps.cumsum(-1)], 1)
        return encoded

    @torch.no_grad()
    def values(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
        encoded = self.judge.backbone.encode(prefix, ids[:, :-1], mask[:, 1:])
        self.judge.backbone.record_head(prefix, mask.sum(-1))
        return _earned(prefix)[:, None] + self._per_token(encoded.hidden, ids, mask).cumsum(-1)

    @torch.no_grad()
    def encoded_values(self, encoded: Encoded) -> Tensor:
        return _sums(encoded)[:, 1:]

    @torch.no_grad()
    def fork_values(self, tracks: Sequence[Track], positions: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """No pass at all: V(y_<i, v) is what was earned before i and log π_strong(v | x, y_<i)."""
        log_probs, earned = self._before(tracks, positions, mask)
        return earned + log_probs.gather(-1, ids[..., None]).squeeze(-1)

    @torch.no_grad()
    def fork_changes(
        self, tracks: Sequence[Track], positions: Tensor, ids: Tensor, mask: Tensor, alternatives: Tensor
    ) -> Tensor:
        """Exact: V_i is linear in y_i, with gradient log π_strong(· | x, y_<i)."""
        log_probs, _ = self._before(tracks, positions, mask)
        return log_probs.gather(-1, alternatives) - log_probs.gather(-1, ids[..., None])

    def _before(self, tracks: Sequence[Track], positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """log π_strong(· | x, y_<i) and what y_<i has earned, at each position."""
        at = [row[: int(n)] for row, n in zip(positions - tracks[0].start, mask.sum(-1), strict=True)]
        hidden = pad_sequence([t.hidden[rows] for t, rows in zip(tracks, at, strict=True)], batch_first=True)
        earned = pad_sequence([_sums(t)[rows] for t, rows in zip(tracks, at, strict=True)], batch_first=True)
        problems = torch.tensor([track.problem for track in tracks])
        backbone, count = self.judge.backbone, mask.sum(-1)
        tracks[0].ledger.record("reward", "forward", problems, count, backbone.formula.head(count), is_pass=False)
        return self.judge.logits(hidden).log_softmax(-1), earned

    def _per_token(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logps = self.judge.logits(hidden).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return logps.masked_fill(~mask, 0.0)


def _earned(prefix: Prefix) -> Tensor:
    assert prefix.earned is not None
    return prefix.earned


def _sums(read: Track | Encoded) -> Tensor:
    assert read.earned is not None
    return read.earned
