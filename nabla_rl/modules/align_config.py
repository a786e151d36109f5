"""The settings of reinforcement learning, in TRL's words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nabla_rl.functional.policy_gradient import LossType, ScaleRewards
from nabla_rl.modules.adapter_config import AdapterConfig
from nabla_rl.types import UserError

Algorithm = Literal["rloo", "grpo"]
KLEstimator = Literal["auto", "k1", "k3", "exact"]


@dataclass(frozen=True)
class RLConfig(AdapterConfig):
    """Reinforcement learning. Every name and meaning is that of TRL's GRPOConfig and RLOOConfig.

    Four defaults differ from TRL's, on purpose. `beta` is positive for both algorithms: without it there is no tilted
    policy to head for, and no match to decoding. `top_k=0` and `top_p=1` leave the samples untruncated (they are
    TRL's, but not transformers'): a truncated sample is not the policy's, and its log-probability is not that of the
    law it was drawn from. `learning_rate` is LoRA's scale (TRL's 1e-6 is for all weights). `bf16` and
    `gradient_checkpointing` are off.
    """

    section: ClassVar[str] = "rl"
    beta: float = 1.0
    """KL coefficient β = 1/λ of J(π) = E[r] - β KL(π‖reference), as in decode's energy L(y) = -r/β - log π."""
    num_generations: int = 8
    """Completions of each prompt: a group."""
    per_device_train_batch_size: int = 64
    """Completions a process puts through one forward and backward: whole groups."""
    num_iterations: int = 1
    """Optimiser steps on each draw of completions (μ); the ratio is clipped from the second on."""
    epsilon: float = 0.2
    """Lower clipping range of the ratio."""
    epsilon_high: float | None = None
    """Upper clipping range; null: as the lower."""
    loss_type: LossType = "dapo"
    """How GRPO averages over tokens: grpo (within each completion first), dapo (all alike), dr_grpo (a constant)."""
    scale_rewards: ScaleRewards = "group"
    """What GRPO divides advantages by: the standard deviation of the group, of the batch, or none."""
    use_bias_correction_kl: bool = True
    """GRPO's KL is multiplied by the ratio, so that its gradient is that of the KL."""
    temperature: float = 1.0
    """Divides the logits, of the samples and of everything that is scored (as TRL does)."""
    top_p: float = 1.0
    """Nucleus of the samples; 1: the whole law."""
    top_k: int = 0
    """Likeliest tokens that samples are drawn from; 0: all, the only value of the lightning engine."""
    max_completion_length: int = 88
    """Tokens at most in one completion."""
    reward_weights: list[float] | None = None
    """Weights of the reward functions in their sum; null: 1 each."""
    log_completions: bool = True
    """Log sample completions, too."""
    num_completions_to_print: int | None = 4
    """How many of them; null: all of a batch."""

    def __post_init__(self) -> None:
        """Check the values in the spelling of the command line."""
        if not self.beta >= 0 or math.isinf(self.beta):
            raise UserError(
                f"--model.rl.beta: expected a number of at least 0, found {self.beta}. Use 0 to leave the reference "
                "out, with no bound on how far the policy goes."
            )
        if self.num_generations < 2:
            raise UserError(
                f"--model.rl.num_generations: expected at least 2, found {self.num_generations}. A completion is "
                "compared with the others of its group."
            )
        size = self.per_device_train_batch_size
        if size < 1 or size % self.num_generations:
            raise UserError(
                f"--model.rl.per_device_train_batch_size: expected whole groups of {self.num_generations} "
                f"completions, found {size}. Take a multiple of --model.rl.num_generations."
            )
        self.check(
            at_least_one=("num_iterations", "max_completion_length"),
            positive=("temperature",),
            not_negative=("epsilon", "top_k"),
        )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--model.rl.top_p: expected a number in (0, 1], found {self.top_p}. Use 1 for the law.")

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
