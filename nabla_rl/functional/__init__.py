"""Pure functions on tensors: last axis the vocabulary or the length, leading axes free. Needs torch alone."""

from nabla_rl.functional.distillation import dpo_loss, reward_weights, sft_loss, soft_target_kl, tilted_log_probs
from nabla_rl.functional.energy import (
    IMPOSSIBLE_LOGP,
    EnergyGradient,
    compute_energy,
    energy_gradient,
    expected_logps,
)
from nabla_rl.functional.kl import forward_kl, kl_estimate, reverse_kl
from nabla_rl.functional.logps import (
    categorical_from_uniform,
    compute_entropy,
    log_softmax,
    pick,
    selective_log_softmax,
    sequence_logps,
    top_p_filter,
    upcast,
)
from nabla_rl.functional.masks import build_completion_mask, build_position_ids, last_valid_index, left_align_index
from nabla_rl.functional.policy_gradient import (
    clipped_surrogate,
    group_relative_advantages,
    grpo_loss,
    leave_one_out_advantages,
    penalise_rewards,
    rloo_loss,
)
from nabla_rl.functional.relaxation import (
    RELAXATIONS,
    Relaxation,
    argmax,
    gumbel_softmax,
    hard_tokens,
    one_hot,
    one_hot_argmax,
    sample_gumbel,
    soft,
    straight_through,
    straight_through_vjp,
)
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.functional.support import build_support
from nabla_rl.functional.update_rules import SCHEDULES, UPDATE_RULES, adamw_update_, cosine_decay, sgd_update_

__all__ = [
    "IMPOSSIBLE_LOGP",
    "EnergyGradient",
    "RELAXATIONS",
    "SCHEDULES",
    "UPDATE_RULES",
    "Relaxation",
    "adamw_update_",
    "argmax",
    "build_completion_mask",
    "build_position_ids",
    "build_support",
    "categorical_from_uniform",
    "clipped_surrogate",
    "compute_energy",
    "compute_entropy",
    "cosine_decay",
    "energy_gradient",
    "dpo_loss",
    "expected_logps",
    "forward_kl",
    "group_relative_advantages",
    "grpo_loss",
    "gumbel_softmax",
    "hard_tokens",
    "kl_estimate",
    "last_valid_index",
    "leave_one_out_advantages",
    "left_align_index",
    "log_softmax",
    "one_hot",
    "one_hot_argmax",
    "penalise_rewards",
    "pick",
    "reverse_kl",
    "reward_weights",
    "rloo_loss",
    "sample_gumbel",
    "seeded_generator",
    "selective_log_softmax",
    "sequence_logps",
    "sft_loss",
    "sgd_update_",
    "soft",
    "soft_target_kl",
    "straight_through",
    "straight_through_vjp",
    "tilted_log_probs",
    "top_p_filter",
    "upcast",
]
