"""Soft targets: the tilted next-token distribution at every position of an answer, as edit search scores edits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import require_process_reward, score_rollouts
from nabla_rl.distillation.distiller import encode_completion
from nabla_rl.distillation.rows import Row
from nabla_rl.functional.distillation import tilted_log_probs
from nabla_rl.functional.logps import selective_log_softmax
from nabla_rl.ledger import Ledger
from nabla_rl.models.groups import group_logits
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward


@torch.no_grad()
def add_soft_targets(
    rows: Sequence[Row],
    policy: Policy,
    reward: AbstractReward | None,
    *,
    beta: float,
    alternatives: int,
    batch_size: int = 64,
) -> tuple[list[Row], float]:
    """Rows with the distribution softmax(log π + ΔV/β) over the policy's likeliest tokens at each position.

    ΔV is exact: the reward model scores all alternatives in one pass under a tree attention mask. Results hold texts
    only, so the targets are computed along the final answer, by one pass of the policy and two of the reward model for
    each row.

    Args:
        rows: Rows with `prompt` and `completion`.
        policy: The teacher's policy.
        reward: The teacher's reward model, which must score prefixes.
        beta: KL coefficient of the tilted policy.
        alternatives: Number k of tokens at each position.
        batch_size: Number of rows read together.

    Returns:
        The rows with `completion_ids`, `target_ids` and `target_logps` (length, k), and the FLOPs spent.
    """
    judge, ledger, found = require_process_reward("soft targets", reward), Ledger(1), []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        completions = [encode_completion(policy, row["completion"]) for row in part]
        ids = pad_sequence([torch.tensor(each) for each in completions], batch_first=True).to(policy.device)
        lengths = torch.tensor([len(each) for each in completions], device=policy.device)
        mask = torch.arange(ids.shape[1], device=policy.device) < lengths[:, None]
        prompts = [policy.encode_prompt(row["prompt"]) for row in part]
        logits = group_logits(policy, prompts, ids, mask, ledger)
        top = logits.topk(min(alternatives, logits.shape[-1]), -1).indices
        # the token of the answer is always among them: it takes the place of the least likely one
        absent = (top != ids[..., None]).all(-1)
        top[..., -1] = torch.where(absent, ids, top[..., -1])
        problems = [Problem(str(row["id"]), row["prompt"]) for row in part]
        account = Ledger(len(part))
        _, tracks = score_rollouts(problems, judge, ids, mask, account)
        k = top.shape[-1]
        positions = (torch.arange(ids.shape[1], device=ids.device) * mask).repeat_interleave(k, 1)
        values = judge.fork_values(tracks, positions, top.flatten(1), mask.repeat_interleave(k, 1)).view_as(top)
        ledger.absorb(account, torch.zeros(len(part), dtype=torch.int64))
        # V of the prefix itself is the same for all alternatives of a position, and drops out
        targets = tilted_log_probs(selective_log_softmax(logits, top), values, beta=beta)
        for row, each, tokens, logps in zip(part, completions, top.tolist(), targets.tolist(), strict=True):
            length = len(each)
            rounded = [[round(value, 5) for value in place] for place in logps[:length]]
            found.append(row | {"completion_ids": each, "target_ids": tokens[:length], "target_logps": rounded})
    return found, ledger.cost(0).flops
