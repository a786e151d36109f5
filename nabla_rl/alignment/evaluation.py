"""Held-out figures of a policy in training: accuracy, rewards, and KL to the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nabla_rl.alignment.rollouts import reward_columns
from nabla_rl.data.problems import Problem
from nabla_rl.functional.kl import reverse_kl
from nabla_rl.functional.logps import sequence_logps
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.groups import group_logits
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.functions import GraderReward, JudgeReward, compute_rewards, reward_name, weigh_rewards

if TYPE_CHECKING:
    from nabla_rl.alignment.aligner import PolicyAligner

KL_ESTIMATE = "KL(policy‖reference) of the next token, exact over the vocabulary, summed over the policy's own samples"
"""How `kl` is measured, in nats a completion: unbiased, and less noisy than log-ratios."""


@torch.no_grad()
def evaluate(
    module: PolicyAligner, problems: Sequence[Problem], *, gold: AbstractReward | None, batch_size: int = 64
) -> dict[str, Any]:
    """Figures of the current policy on held-out problems, sampled as in training.

    The figures are accuracy, greedy accuracy, reward, gold reward, KL to the reference (`KL_ESTIMATE`) and the
    objective r - β KL. Each is a mean over problems, with its standard error as `<name>_error`. The evaluation's own
    cost is `evaluation_flops`; it is not part of the training's cost.
    """
    rows: dict[str, list[Tensor]] = {}
    ledger, judges = Ledger(1), [function for function in module.functions if isinstance(function, JudgeReward)]
    kept = [function.ledger for function in judges]
    for function in judges:
        function.ledger = ledger
    try:
        for start in range(0, len(problems), batch_size):
            for name, values in _batch(module, problems[start : start + batch_size], gold, ledger).items():
                rows.setdefault(name, []).append(values)
    finally:
        for function, own in zip(judges, kept, strict=True):
            function.ledger = own
    figures: dict[str, Any] = {
        "problems": len(problems),
        "generations": module.eval_generations,
        "evaluation_flops": ledger.cost(0).flops,
    }
    for name, parts in rows.items():
        values = torch.cat(parts).double()
        values = values[~values.isnan()]
        figures[name] = values.mean().item() if len(values) else None
        figures[f"{name}_error"] = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
    return figures


def _batch(
    module: PolicyAligner, problems: Sequence[Problem], gold: AbstractReward | None, ledger: Ledger
) -> dict[str, Tensor]:
    """Every figure of every problem, (problems,)."""
    rl, policy, n = module.rl, module.policy, module.eval_generations
    prompts = [policy.encode_prompt(problem.problem) for problem in problems]
    prefix = policy.prefill(prompts, torch.zeros(len(prompts), dtype=torch.int64), ledger)
    greedy = policy.rollout(prefix, replace(rl.sampling, temperature=0.0))
    rows = torch.arange(len(prompts), device=policy.device).repeat_interleave(n)
    generators = [seeded_generator(module.seed, "evaluate", p.id, j) for p in problems for j in range(n)]
    drawn = policy.rollout(prefix.select(rows), rl.sampling, generators)
    columns = reward_columns(policy, problems, drawn.ids, drawn.mask)
    grade = GraderReward(module.data.grade)
    named: dict[str, Tensor] = {"accuracy": compute_rewards([grade], **columns)[:, 0]}
    rewards = compute_rewards(module.functions, **columns)
    named["reward"] = weigh_rewards(rewards, rl.reward_weights)
    for index, function in enumerate(module.functions):
        named[f"rewards/{reward_name(function)}"] = rewards[:, index]
    if gold is not None:
        judge = JudgeReward(gold)
        judge.ledger = ledger
        named["gold_reward"] = compute_rewards([judge], **columns)[:, 0]
        named["gold_probability"] = named["gold_reward"].sigmoid()  # of being right, if the reward is its log-odds

    def log_probs() -> Tensor:
        logits = group_logits(policy, prompts, drawn.ids, drawn.mask, ledger)
        return logits.div(rl.temperature).log_softmax(-1)

    own = log_probs()
    with module.adapter.disabled():
        ref = log_probs()
    named["kl"] = sequence_logps(reverse_kl(own, ref), drawn.mask).cpu()
    named["objective"] = named["reward"] - rl.beta * named["kl"]
    named["completion_length"] = drawn.mask.sum(-1).float().cpu()
    means = {name: values.view(-1, n).nanmean(1) for name, values in named.items()}
    once = reward_columns(policy, problems, greedy.ids, greedy.mask)
    return {"greedy_accuracy": compute_rewards([grade], **once)[:, 0]} | means
