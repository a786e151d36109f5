"""Real networks on a space small enough to list: a completion's last letters, over a few of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.data.problems import Problem
from nabla_rl.duality.landscape import Landscape
from nabla_rl.duality.space import Space
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.types import UserError

BATCH = 512
"""Sequences that go through a network side by side."""


def completion_landscape(
    policy: Policy, reward: AbstractReward, problem: Problem, head: str, alphabet: Sequence[int], length: int
) -> Landscape:
    r"""Every way to end a completion with `length` tokens out of `alphabet`, as policy and reward see it.

    The policy is renormalised to the alphabet at each position, :math:`\pi(v \mid x, y_{<i}) \propto
    \pi_\text{net}(v \mid x, y_{<i})` for :math:`v` in it; the reward is that of the finished completion (head, the
    tokens, end of sequence). Values and gradients at one-hot tokens come from the networks, in batches; use float64
    weights for float64 laws.

    Args:
        policy: the language model.
        reward: the judge, which shares its vocabulary.
        problem: what is to be solved.
        head: the completion's beginning, held fixed.
        alphabet: token ids.
        length: free tokens.

    Returns:
        The landscape, with the networks' gradients.
    """
    space = Space(len(alphabet), length)
    support = torch.tensor(list(alphabet), device=policy.device)
    head_ids = list(policy.tokenizer(head, add_special_tokens=False).input_ids) if head else []
    if len(set(alphabet)) != len(alphabet) or bool(torch.isin(support, policy.get_buffer("eos_ids")).any()):
        raise UserError("alphabet", "different tokens other than the end", str(list(alphabet)))
    ledger, one = Ledger(1), torch.zeros(1, dtype=torch.int64)
    prefix = _extend(policy, policy.prefill([policy.encode_prompt(problem.problem)], one, ledger), head_ids)
    judged = _extend(reward, reward.prefill([problem.problem], one, ledger), head_ids)
    end, parts = policy.get_buffer("eos_ids")[:1], []
    for start in range(0, space.size, BATCH):
        index = torch.arange(start, min(start + BATCH, space.size))
        parts.append(_evaluate(policy, reward, prefix, judged, space.tokens(index), support, end))
    logps, rewards, of_logps, of_rewards = (torch.cat(part).double() for part in zip(*parts, strict=True))
    return Landscape(space, logps - logps.logsumexp(0), rewards, of_logps, of_rewards)


def likely_tokens(
    policy: Policy, problem: Problem, head: str, length: int, count: int, *, draws: int = 256, seed: int = 0
) -> list[int]:
    """The `count` tokens (no end of sequence) that the policy expects most often in the next `length` positions."""
    ledger, one = Ledger(1), torch.zeros(1, dtype=torch.int64)
    head_ids = list(policy.tokenizer(head, add_special_tokens=False).input_ids) if head else []
    prefix = _extend(policy, policy.prefill([policy.encode_prompt(problem.problem)], one, ledger), head_ids)
    rows = prefix.select(torch.zeros(draws, dtype=torch.int64))
    generators = [F.seeded_generator(seed, problem.id, "alphabet", draw) for draw in range(draws)]
    rollout = policy.rollout(rows, Sampling(1.0, 1.0, length), generators, keep_logits=True)
    assert rollout.logits is not None
    expected = (rollout.logits.double().softmax(-1) * rollout.mask[..., None]).sum((0, 1))
    expected[policy.get_buffer("eos_ids")] = -1.0
    return sorted(expected.topk(count).indices.tolist())


def _extend(model: Policy | AbstractReward, prefix: Prefix, ids: list[int]) -> Prefix:
    """The prefix with the tokens `ids` after it."""
    if not ids:
        return prefix
    row = torch.tensor([ids], device=prefix.hidden.device)
    if isinstance(model, Policy):
        encoded = model.backbone.encode(prefix, row, torch.ones_like(row).bool())
    else:
        encoded = model.score(prefix, row, torch.ones_like(row).bool()).encoded
    return encoded.prefix_at(torch.tensor([len(ids)], device=row.device))


@torch.enable_grad()
def _evaluate(
    policy: Policy,
    reward: AbstractReward,
    prefix: Prefix,
    judged: Prefix,
    index: Tensor,
    support: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log π and r of some sequences, and their gradients in the one-hot tokens."""
    rows = torch.zeros(len(index), dtype=torch.int64, device=support.device)
    index, ids = index.to(support.device), support[index]
    mask = torch.ones_like(ids).bool()
    dtype = torch.promote_types(prefix.hidden.dtype, torch.float32)
    probs = torch.nn.functional.one_hot(index, len(support)).to(dtype).requires_grad_()
    wide = support.expand(*index.shape, -1)
    log_probs = policy.completion_log_probs(prefix.select(rows), F.SoftTokens(probs, ids), mask, support=wide)
    log_probs = log_probs.log_softmax(-1)
    logps = F.pick(log_probs, index).sum(-1)
    (postfix,) = torch.autograd.grad(logps.sum(), probs, materialize_grads=True)
    # the end of sequence is a token of the reward's support, at the last position alone
    ended = torch.nn.functional.pad(probs, (0, 1))
    last = torch.nn.functional.one_hot(torch.full_like(index[:, :1], len(support)), len(support) + 1).to(dtype)
    ids = torch.cat([ids, end.expand(len(ids), 1)], 1)
    wide = torch.cat([support, end]).expand(*ids.shape, -1)
    mask = torch.ones_like(ids).bool()
    rewards = reward(judged.select(rows), F.SoftTokens(torch.cat([ended, last], 1), ids), mask, support=wide)
    (of_rewards,) = torch.autograd.grad(rewards.sum(), probs)
    found = (logps, rewards, postfix + log_probs, of_rewards)
    return tuple(tensor.detach().cpu() for tensor in found)  # pyright: ignore
