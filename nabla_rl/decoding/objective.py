"""The energy of several problems' completions as functions of relaxed tokens: what `nabla_rl.dto` is run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_rl.functional.relaxation import SoftTokens
from nabla_rl.functional.support import build_support
from nabla_rl.models.backbone import Backbone, Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward

CANDIDATE_CHUNK = 32
"""Positions whose gradients over the whole vocabulary are held at once when candidates are looked for."""


@dataclass
class Objective:
    """log π and r of completions (batch, length), right padded, that continue encoded prefixes.

    Attributes:
        policy, reward: the models.
        policy_prefix, reward_prefix: their encodings of prompt and committed tokens.
        mask: (batch, length), True at real tokens.
        support: (batch, length, k) token ids that the last axis of relaxed tokens stands for; None: the vocabulary.
        hard: relaxed tokens are exactly one-hot, so that embeddings are looked up rather than mixed.
    """

    policy: Policy
    reward: AbstractReward
    policy_prefix: Prefix
    reward_prefix: Prefix
    mask: Tensor
    support: Tensor | None
    hard: bool

    def log_probs(self, tokens: SoftTokens, rows: Tensor) -> Tensor:
        """log π(· | x, y_<i) on the support, (active, length, k), zero beyond the longest row: a `LogProbsFn`."""
        mask, part, support = self._cut(tokens, rows)
        log_probs = self.policy.completion_log_probs(_take(self.policy_prefix, rows), part, mask, support=support)
        missing = tokens.probs.shape[1] - mask.shape[1]
        return torch.nn.functional.pad(log_probs, (0, 0, 0, missing)) if missing else log_probs

    def rewards(self, tokens: SoftTokens, rows: Tensor) -> Tensor:
        """r(x, y), (active,): a `RewardFn`."""
        mask, part, support = self._cut(tokens, rows)
        return self.reward(_take(self.reward_prefix, rows), part, mask, support=support)

    def _cut(self, tokens: SoftTokens, rows: Tensor) -> tuple[Tensor, SoftTokens, Tensor | None]:
        """Mask, tokens (with ids of the vocabulary) and support of some rows, without positions that are padding in
        all of them."""
        mask = self.mask[rows]
        width = max(1, int(mask.sum(-1).max()))
        support = None if self.support is None else self.support[rows, :width]
        ids = tokens.hard()[:, :width] if self.hard else None
        if ids is not None and support is not None:
            ids = _lookup(support, ids)
        if width == mask.shape[1]:
            return mask, tokens._replace(ids=ids), support
        return mask[:, :width], SoftTokens(tokens.probs[:, :width], ids), support


def _take(prefix: Prefix, rows: Tensor) -> Prefix:
    """Some rows (different ones, in order) of a prefix; all of them without a copy."""
    return prefix if len(rows) == len(prefix) else prefix.select(rows)


def _lookup(support: Tensor, index: Tensor) -> Tensor:
    return support.gather(-1, index[..., None]).squeeze(-1)


@dataclass
class HeadLogits:
    """Logits (batch, length, vocab) that are computed where they are read, from the hidden states that predict each
    token."""

    policy: Policy
    hidden: Tensor

    @torch.no_grad()
    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """The logits of some rows and positions."""
        return self.policy.logits(self.hidden[index])

    @torch.no_grad()
    def gather(self, support: Tensor) -> Tensor:
        """Logits of the tokens `support` (batch, length, k)."""
        parts = _parts(support)
        return torch.cat([self[:, part].gather(-1, support[:, part]) for part in parts], 1)


def _parts(tensor: Tensor) -> list[slice]:
    """The positions (second axis), a few at a time."""
    return [slice(start, start + CANDIDATE_CHUNK) for start in range(0, tensor.shape[1], CANDIDATE_CHUNK)]


def choose_support(logits: Tensor | HeadLogits, ids: Tensor, k: int, candidates: Tensor | None = None) -> Tensor:
    """Token ids (batch, length, k): the current tokens, the candidates, then the policy's likeliest ones."""
    extra = ids[..., None] if candidates is None else torch.cat([ids[..., None], candidates], -1)
    return torch.cat([build_support(logits[:, part], k, extra[:, part]) for part in _parts(ids)], 1)


@torch.enable_grad()
def gradient_candidates(
    objective: Objective, ids: Tensor, logits: Tensor | HeadLogits, beta: float, num: int
) -> Tensor:
    """The tokens that the first-order change of the energy likes best, (batch, length, num), over the whole
    vocabulary.

    One forward and backward of both models at the completion `ids`, down to its input embeddings e_i; then, a few
    positions at a time, g_i[v] = -log π(v | x, y_<i) + ∂L/∂e_i · E_v. Memory is O(length · (hidden + num)).

    Args:
        objective: the models and the encoded prefixes.
        ids: (batch, length), the current completions.
        logits: (batch, length, vocab), the policy's at their positions.
        beta: KL coefficient.
        num: candidates for each position.
    """
    ones, support = torch.ones_like(ids, dtype=torch.float32)[..., None].requires_grad_(), ids[..., None]
    with objective.policy.backbone.capture_input_gradients() as captured:
        log_probs = objective.policy.completion_log_probs(
            objective.policy_prefix, SoftTokens(ones, ids), objective.mask, support=support
        )
        if log_probs.requires_grad:
            torch.autograd.grad(log_probs.squeeze(-1).masked_fill(~objective.mask, 0.0).sum(), ones)
    policy_grad = _pad_to(ids, captured)
    judge = reward_backbone(objective.reward)
    with judge.capture_input_gradients() as captured:
        reward = objective.reward(objective.reward_prefix, SoftTokens(ones, ids), objective.mask, support=support)
        torch.autograd.grad(reward.sum(), ones)
    reward_grad = _pad_to(ids, captured)
    best = []
    for part in _parts(ids):
        change = -logits[:, part].float().log_softmax(-1)
        if policy_grad is not None:
            change -= (policy_grad[:, part] @ objective.policy.backbone.weight.T).float()
        if reward_grad is not None:
            rewarding = (reward_grad[:, part] @ judge.weight[: change.shape[-1]].T).float() / beta
            change[..., : rewarding.shape[-1]] -= rewarding
        best.append(change.topk(num, largest=False).indices)
    return torch.cat(best, 1)


def _pad_to(ids: Tensor, captured: list[Tensor]) -> Tensor | None:
    """The gradients at the embeddings of all `ids`: a language model does not read the last token, and maybe none."""
    if not captured:
        return None
    (gradient,) = captured
    return torch.nn.functional.pad(gradient, (0, 0, 0, ids.shape[1] - gradient.shape[1]))


def reward_backbone(reward: AbstractReward) -> Backbone:
    """The transformer that a reward's tokens enter."""
    return next(module for module in reward.modules() if isinstance(module, Backbone))
