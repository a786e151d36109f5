"""Metrics of a step of reinforcement learning, with TRL's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_rl.alignment.config import RLConfig
from nabla_rl.alignment.rollouts import MicroBatch
from nabla_rl.functional.logps import compute_entropy, sequence_logps


def step_metrics(
    part: MicroBatch, logits: Tensor, ratio: Tensor, kl: Tensor | None, names: Sequence[str], rl: RLConfig
) -> dict[str, float]:
    """The metrics of one micro-batch.

    Args:
        part: Completions and rewards of the micro-batch.
        logits: Logits of the policy, (rows, length, vocab), detached.
        ratio: Ratio π/π_old of every token, detached.
        kl: Estimate of KL(policy‖reference) of every token, detached; None without a reference.
        names: Names of the reward functions.
        rl: Settings, for group size, clipping range and β.
    """
    mask = part.mask
    count, lengths = mask.sum(), mask.sum(-1).float().cpu()
    clipped_low = (ratio < 1 - rl.epsilon) & mask
    clipped_high = (ratio > 1 + (rl.epsilon if rl.epsilon_high is None else rl.epsilon_high)) & mask
    ended = lengths[part.finished.cpu()]
    metrics = {
        "reward": _mean(part.total),
        "reward_std": _std(part.total),
        "frac_reward_zero_std": flat_groups(part.total, rl.num_generations),
        "entropy": ((compute_entropy(logits) * mask).sum() / count).item(),
        "clip_ratio/low_mean": (clipped_low.sum() / count).item(),
        "clip_ratio/high_mean": (clipped_high.sum() / count).item(),
        "clip_ratio/region_mean": ((clipped_low | clipped_high).sum() / count).item(),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
        "completions/mean_terminated_length": ended.mean().item() if len(ended) else 0.0,
    }
    metrics |= reward_metrics(part.rewards, names)
    metrics["kl_sequence"] = 0.0
    if kl is not None:
        metrics["kl"] = ((kl * mask).sum() / count).item()
        metrics["kl_sequence"] = sequence_logps(kl, mask).mean().item()
    metrics["objective"] = metrics["reward"] - rl.beta * metrics["kl_sequence"]
    return metrics


def reward_metrics(rewards: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean and standard deviation of each reward function, (rows, functions), where it gave a number."""
    metrics = {}
    for index, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = _mean(rewards[:, index], nothing=0.0)
        metrics[f"rewards/{name}/std"] = _std(rewards[:, index])
    return metrics


def flat_groups(total: Tensor, num_generations: int) -> float:
    """The share of groups without a difference between their rewards."""
    spread = torch.tensor([_std(group) for group in total.view(-1, num_generations)])
    return spread.isclose(torch.zeros(())).float().mean().item()


def _mean(values: Tensor, nothing: float = float("nan")) -> float:
    values = values[~values.isnan()]
    return values.mean().item() if len(values) else nothing


def _std(values: Tensor) -> float:
    values = values[~values.isnan()]
    return values.std().item() if len(values) > 1 else 0.0
