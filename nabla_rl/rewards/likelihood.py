"""The likelihood under a second, stronger language model as a reward: a judge that needs no training as one."""

from __future__ import annotations

import torch
from torch import Tensor

from nabla_rl.functional.energy import expected_logps
from nabla_rl.functional.logps import upcast
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractProcessReward, Scored


class LikelihoodReward(AbstractProcessReward):
    """r(x, y) = log π_strong(y | x), Σ over the completion's tokens; the process value is the partial sum.

    Args:
        judge: the stronger language model. It is booked as the reward.
    """

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
        token_probs: Tensor,
        mask: Tensor,
        *,
        support: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        log_probs = self.judge.completion_log_probs(prefix, token_probs, mask, support=support, tokens=tokens)
        return _earned(prefix) + expected_logps(token_probs, log_probs, mask)

    @torch.no_grad()
    def score(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Scored:
        encoded = self.judge.backbone.encode(prefix, ids, mask)
        self.judge.backbone.record_head(prefix, mask.sum(-1))
        logps = self._per_token(encoded.hidden[:, :-1], ids, mask)
        before = _earned(prefix)[:, None]
        encoded.earned = torch.cat([before, before + logps.cumsum(-1)], 1)
        return Scored(before.squeeze(1) + logps.sum(-1), encoded)

    @torch.no_grad()
    def values(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
        encoded = self.judge.backbone.encode(prefix, ids[:, :-1], mask[:, 1:])
        self.judge.backbone.record_head(prefix, mask.sum(-1))
        return _earned(prefix)[:, None] + self._per_token(encoded.hidden, ids, mask).cumsum(-1)

    def _per_token(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logps = self.judge.logits(hidden).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return logps.masked_fill(~mask, 0.0)


def _earned(prefix: Prefix) -> Tensor:
    assert prefix.earned is not None
    return prefix.earned
