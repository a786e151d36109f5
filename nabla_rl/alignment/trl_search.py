r"""Completions of a search in TRL's own trainer, by `GRPOTrainer(rollout_func=...)`.

A search has no density, so its completions are off-policy data of weight 1, and only returns that hold the KL keep the
tilted policy as the fixed point (see `PolicyAligner`). GRPOTrainer has the KL in its loss, where that is not so. It is
therefore set up to take RLOO's steps: β = 0 in TRL's config, and one reward function, the scaled return

.. math:: c\,(r - \beta \log \pi/\pi_{ref}), \qquad c = L_{max}\, G / (G - 1),

with log π/π_ref of the policy of the moment, which `rollout_func` hands on as the column `log_ratio`. The group's
mean and `scale_rewards="none"` make (G - 1)/G times the leave-one-out advantages, and `loss_type="dr_grpo"` divides
by L_max: with c the gradient is that of `rloo_loss`, token for token. `rollout_func` returns no `logprobs`: they are
meant to be the sampler's, and a search has none.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from nabla_rl.adapters.training import trl_prompt
from nabla_rl.alignment.metrics import flat_groups, reward_metrics
from nabla_rl.alignment.rollouts import MicroBatch
from nabla_rl.functional.logps import sequence_logps
from nabla_rl.functional.policy_gradient import penalise_rewards
from nabla_rl.rewards.functions import compute_rewards, reward_name, weigh_rewards

if TYPE_CHECKING:
    from nabla_rl.alignment.aligner import PolicyAligner
    from nabla_rl.data.problems import Problem

PLAIN = "nabla_"
"""What names of metrics start with that TRL logs of the scaled return under its own names."""


class SearchRollouts:
    """The `rollout_func` and the reward function that hand a search's completions to TRL's trainer."""

    __name__ = "return"

    def __init__(self, module: PolicyAligner, rows: Sequence[Mapping[str, Any]], problems: Sequence[Problem]):
        self.module = module
        self.problems = {_key(row["prompt"]): problem for row, problem in zip(rows, problems, strict=True)}

    @property
    def scale(self) -> float:
        """c of the module's docstring."""
        rl = self.module.rl
        return rl.max_completion_length * rl.num_generations / (rl.num_generations - 1)

    def rollout(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: each prompt comes `num_generations` times in a row."""
        module, size = self.module, self.module.rl.num_generations
        problems = [self.problems[_key(prompt)] for prompt in prompts[::size]]
        ids = [module.policy.encode_prompt(problem.problem) for problem in problems]
        found = module.rollout(problems, ids, trainer.state.global_step)
        rewards = torch.full((len(found.ids), 1), torch.nan)
        part = MicroBatch(ids, found.ids, found.mask, rewards, rewards[:, 0], found.finished)
        with torch.no_grad():
            logps, _ = module.logps(part)
            with module.adapter.disabled():
                ref, _ = module.logps(part)
        return {
            "prompt_ids": [list(row) for row in ids for _ in range(size)],
            "completion_ids": found.rows(),
            "logprobs": None,
            "log_ratio": sequence_logps(logps - ref, found.mask).tolist(),
        }

    def __call__(self, *, log_ratio: Sequence[float], log_metric: Any = None, **columns: Any) -> list[float | None]:
        """The scaled return of each completion; the rewards behind it are logged beside it."""
        module, rl = self.module, self.module.rl
        rewards = compute_rewards(module.functions, **columns)
        total, ratio = weigh_rewards(rewards, rl.reward_weights), torch.tensor(log_ratio)
        if log_metric is not None:
            metrics = reward_metrics(rewards, [reward_name(function) for function in module.functions])
            finite = total[~total.isnan()]
            metrics["reward"] = finite.mean().item() if len(finite) else 0.0
            metrics["reward_std"] = finite.std().item() if len(finite) > 1 else 0.0
            metrics["frac_reward_zero_std"] = flat_groups(total, rl.num_generations)
            metrics["kl_sequence"] = ratio.mean().item()
            tokens = sum(len(ids) for ids in columns["completion_ids"])
            metrics["kl"] = ratio.sum().item() / max(tokens, 1)
            for name, value in metrics.items():
                log_metric(PLAIN + name, value)
        returns = penalise_rewards(total, ratio[:, None], torch.ones(len(ratio), 1).bool(), beta=rl.beta)
        return [None if value != value else self.scale * value for value in returns.tolist()]

    @staticmethod
    def plain_metrics(logs: Mapping[str, Any]) -> dict[str, Any]:
        """TRL's log with the plain rewards instead of the scaled return."""
        own = {name.removeprefix(PLAIN): value for name, value in logs.items() if name.startswith(PLAIN)}
        rest = {
            name: value
            for name, value in logs.items()
            if not name.startswith(PLAIN) and not name.startswith("rewards/return/")
        }
        return rest | own


def training_problems(module: PolicyAligner, world_size: int = 1) -> list[Problem]:
    """The problems of all draws of a run in order."""
    rl = module.rl
    count = rl.gradient_accumulation_steps * world_size * rl.prompts_per_batch
    draws = range(-(-rl.max_steps // rl.num_iterations))
    return [problem for draw in draws for problem in module.data.training(draw, count)]


def training_rows(module: PolicyAligner, world_size: int = 1) -> list[dict[str, Any]]:
    """The same as TRL's data set has them."""
    return [
        {
            "prompt": trl_prompt(module.policy, problem.problem),
            "problem": problem.problem,
            "answer": problem.answer,
            "id": problem.id,
        }
        for problem in training_problems(module, world_size)
    ]


def build_search_trainer(module: PolicyAligner, **settings: Any) -> Any:
    """TRL's GRPOTrainer on a search's completions, with the gradient of this package's RLOO."""
    own = {"beta": 0.0, "scale_rewards": "none", "loss_type": "dr_grpo", "reward_weights": None}
    config: GRPOConfig = module.rl.to_trl("grpo", **(own | settings))
    rows = training_rows(module, config.world_size)
    search = SearchRollouts(module, rows, training_problems(module, config.world_size))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")  # experimental, says TRL
        return GRPOTrainer(
            model=module.adapter.peft,  # pyright: ignore
            reward_funcs=[search],  # pyright: ignore
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=module.policy.tokenizer,
            rollout_func=search.rollout,  # pyright: ignore
        )


def _key(prompt: Any) -> str:
    """A prompt, text or conversation, as a key."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
