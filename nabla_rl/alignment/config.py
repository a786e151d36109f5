"""The settings of reinforcement learning, in TRL's words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nabla_rl.adapters.config import AdapterConfig
from nabla_rl.functional.policy_gradient import LossType, ScaleRewards
from nabla_rl.models.sampling import Sampling
from nabla_rl.types import UserError

Algorithm = Literal["rloo", "grpo"]
KLEstimator = Literal["auto", "k1", "k3", "exact"]


@dataclass(frozen=True)
class RLConfig(AdapterConfig):
    """Reinforcement learning. Every name and meaning is that of TRL's GRPOConfig and RLOOConfig.

    Four defaults differ from TRL's on purpose. `beta` is positive for both algorithms, because there is no tilted
    policy without it. `top_k=0` and `top_p=1` leave samples untruncated, because a truncated sample has another
    log-probability under the distribution that it was drawn from than under the policy. `learning_rate` suits LoRA;
    TRL's 1e-6 suits all weights. `bf16` and `gradient_checkpointing` are off.
    """

    section: ClassVar[str] = "rl"
    beta: float = 1.0
    """KL coefficient β = 1/λ of J(π) = E[r] - β KL(π‖reference), the same as in decoding."""
    num_generations: int = 8
    """Number of completions of each prompt, a group."""
    per_device_train_batch_size: int = 64
    """Completions in one forward and backward of a process, whole groups."""
    num_iterations: int = 1
    """Number of optimiser steps on each draw of completions (μ)."""
    epsilon: float = 0.2
    """Lower clipping range of the probability ratio."""
    epsilon_high: float | None = None
    """Upper clipping range; null is the lower one."""
    loss_type: LossType = "dapo"
    """GRPO's average over tokens: grpo (by completion), dapo (all alike), dr_grpo (a constant)."""
    scale_rewards: ScaleRewards = "group"
    """Divisor of GRPO's advantages: the standard deviation of the group, of the batch, or none."""
    use_bias_correction_kl: bool = True
    """Multiplication of GRPO's KL by the ratio, which makes its gradient that of the KL."""
    temperature: float = 1.0
    """Sampling temperature, also of everything that is scored."""
    top_p: float = 1.0
    """Nucleus mass of the samples; 1 keeps the whole distribution."""
    top_k: int = 0
    """Number of likeliest tokens sampled from; 0 is all, the only value for the lightning engine."""
    max_completion_length: int = 88
    """Maximum tokens of a completion."""
    reward_weights: list[float] | None = None
    """Weights of the reward functions in their sum; null is 1 each."""
    log_completions: bool = True
    """Logging of sample completions."""
    num_completions_to_print: int | None = 4
    """Number of completions logged; null is all of a batch."""
    eval_steps: int | None = None
    """Steps between evaluations on the held-out problems during training; null is none."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.beta >= 0 or math.isinf(self.beta):
            raise UserError(
                "rl.beta",
                "a number of at least 0",
                str(self.beta),
                "Use 0 to leave the reference out, with no bound on how far the policy goes.",
            )
        if self.num_generations < 2:
            raise UserError(
                "rl.num_generations",
                "at least 2",
                str(self.num_generations),
                "A completion is compared with the others of its group.",
            )
        size = self.per_device_train_batch_size
        if size < 1 or size % self.num_generations:
            raise UserError(
                "rl.per_device_train_batch_size",
                f"whole groups of {self.num_generations} completions",
                str(size),
                "Take a multiple of {rl.num_generations}.",
            )
        if self.eval_steps is not None and self.eval_steps < 1:
            raise UserError("rl.eval_steps", "at least 1 or null", str(self.eval_steps), "Use null for none.")
        self.check(
            at_least_one=("num_iterations", "max_completion_length"),
            positive=("temperature",),
            not_negative=("epsilon", "top_k"),
        )
        if not 0 < self.top_p <= 1:
            raise UserError("rl.top_p", "a number in (0, 1]", str(self.top_p), "Use 1 for the whole distribution.")

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn."""
        return Sampling(self.temperature, self.top_p, self.max_completion_length)

    @property
    def prompts_per_batch(self) -> int:
        """Groups in a process's batch."""
        return self.per_device_train_batch_size // self.num_generations

    def to_trl(self, algorithm: Algorithm, **more: Any) -> Any:
        """The same settings as TRL's config of that algorithm; `more` are further fields of it."""
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.rloo_config import RLOOConfig

        config = GRPOConfig if algorithm == "grpo" else RLOOConfig
        return self.as_trl(config, **more)


def chosen_estimator(algorithm: Algorithm, estimator: KLEstimator) -> str:
    """The estimator of the KL that trains; auto is TRL's."""
    return {"rloo": "k1", "grpo": "k3"}[algorithm] if estimator == "auto" else estimator


def check_options(
    rl: RLConfig,
    *,
    algorithm: Algorithm,
    kl_estimator: KLEstimator,
    reward_funcs: Sequence[str],
    judge: str | None,
    adapter: str | None,
    searched: bool,
    stop_at_kl: float | None,
    eval_generations: int,
) -> None:
    """Refuse options that do not go together,.

    `judge` is the name of the reward model, `adapter` the folder of an adapter that the policy already has, and
    `searched` says whether completions come from a search.
    """
    if not reward_funcs:
        raise UserError("reward_funcs", "at least one", "none", "Use [judge].")
    if rl.reward_weights is not None and len(rl.reward_weights) != len(reward_funcs):
        raise UserError(
            "rl.reward_weights", f"one for each of {len(reward_funcs)} reward functions", str(len(rl.reward_weights))
        )
    if "judge" in reward_funcs and judge is None:
        raise UserError(
            "reward.name", "a reward model for judge", "none", "Name one, or leave judge out of {reward_funcs}."
        )
    if adapter is not None:
        raise UserError(
            "policy.adapter",
            "none",
            repr(adapter),
            "A new adapter is trained; merge the old one into the weights first.",
        )
    if stop_at_kl is not None and not stop_at_kl > 0:
        raise UserError("stop_at_kl", "a positive number or null", str(stop_at_kl))
    if eval_generations < 1:
        raise UserError("eval_generations", "at least 1", str(eval_generations))
    chosen = chosen_estimator(algorithm, kl_estimator)
    if (algorithm, chosen) == ("grpo", "k1") and not rl.use_bias_correction_kl:
        raise UserError(
            "kl_estimator",
            "k3 or exact in GRPO's loss",
            "k1, whose gradient is zero in expectation",
            "Or pass {rl.use_bias_correction_kl} true.",
        )
    if not searched:
        return
    if (algorithm, chosen) != ("rloo", "k1") or rl.num_iterations > 1 or not rl.beta:
        raise UserError(
            "rollouts",
            "sample",
            "search or mixed",
            "Completions that a search draws keep the fixed point with {algorithm} rloo, {kl_estimator} k1, "
            "{rl.beta} > 0 and {rl.num_iterations} 1.",
        )
    if stop_at_kl is not None:
        raise UserError(
            "stop_at_kl",
            "null with completions of a search",
            str(stop_at_kl),
            "Only the policy's own samples measure its KL: use {rl.eval_steps} to see it.",
        )
    if "judge" not in reward_funcs:
        raise UserError(
            "reward_funcs", "judge among them for completions of a search, which climbs it", str(reward_funcs)
        )
