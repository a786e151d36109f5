"""Rewards by name: the kinds that there are, and a class of one's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nabla_rl.imports import import_subclass
from nabla_rl.models.loading import RewardOptions, default_device
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward

REWARDS: dict[str, type[AbstractReward]] = {
    reward.name: reward for reward in (SequenceClassifierReward, LikelihoodReward)
}
"""Every kind of reward by its name."""


def reward_class(kind: str, *, argument: str = "reward.kind") -> type[AbstractReward]:
    """The class of a kind, or of a class path."""
    return import_subclass(kind, REWARDS, AbstractReward, argument=argument)  # pyright: ignore


def load_reward(
    name: str | RewardOptions | None = "words/tiny-reward",
    *,
    device: torch.device | str | None = None,
    argument: str = "reward",
    own: dict[str, Any] | None = None,
    **options: Any,
) -> AbstractReward | None:
    """A frozen reward model with its tokenizer; None where the name is None.

    Args:
        name: A folder, a Hub name, or an embedded model such as "words/tiny-reward"; or all options at once.
        device: Where the weights are put; None is the GPU where there is one.
        argument: The setting that errors are about.
        own: Options of the kind's own, as its `load` takes them.
        options: Fields of `RewardOptions`: kind, dtype, taught, system_prompt, trust_remote_code.

    Raises:
        UserError: There is no such model, or it cannot be loaded.
    """
    given = replace(name, **options) if isinstance(name, RewardOptions) else RewardOptions(name, **options)
    if given.name is None:
        return None
    place = default_device() if device is None else torch.device(device)
    kind = reward_class(given.kind, argument=f"{argument}.kind")
    return kind.load(given, device=place, argument=argument, **(own or {}))
