"""nabla_rl: reasoning at test time by gradient or by value, and its dual, KL-regularised reinforcement learning.

    import nabla_rl as nr
    answers = nr.decode(problems, policy="words/tiny-policy", reward="words/tiny-reward", decoder="edit_search")

Everything here is loaded when it is first used, so that `import nabla_rl` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nabla_rl.alignment.pipeline import align
    from nabla_rl.budget import Budget
    from nabla_rl.data.problems import Problem
    from nabla_rl.decoding import (
        DECODERS,
        MCTS,
        AbstractDecoder,
        BeamSearch,
        BestOfN,
        Decoded,
        EditSearch,
        Greedy,
        Nabla,
        Sample,
        Sampling,
        SelfConsistency,
        Setting,
    )
    from nabla_rl.decoding.run import decode
    from nabla_rl.distillation.pipeline import distill
    from nabla_rl.dto import DTOConfig
    from nabla_rl.ledger import Ledger
    from nabla_rl.models.loading import load_policy
    from nabla_rl.rewards.base import AbstractProcessReward, AbstractReward
    from nabla_rl.rewards.loading import REWARDS, load_reward
    from nabla_rl.types import UserError

__version__ = "0.2.0"

_PLACES = {
    "align": "alignment.pipeline",
    "decode": "decoding.run",
    "distill": "distillation.pipeline",
    "load_policy": "models.loading",
    "load_reward": "rewards.loading",
    "DECODERS": "decoding",
    "REWARDS": "rewards.loading",
    "AbstractDecoder": "decoding",
    "AbstractProcessReward": "rewards.base",
    "AbstractReward": "rewards.base",
    "BeamSearch": "decoding",
    "BestOfN": "decoding",
    "Budget": "budget",
    "DTOConfig": "dto",
    "Decoded": "decoding",
    "EditSearch": "decoding",
    "Greedy": "decoding",
    "Ledger": "ledger",
    "MCTS": "decoding",
    "Nabla": "decoding",
    "Problem": "data.problems",
    "Sample": "decoding",
    "Sampling": "decoding",
    "SelfConsistency": "decoding",
    "Setting": "decoding",
    "UserError": "types",
}
"""Every public name, and the module below this package that defines it."""

__all__ = [
    "DECODERS",
    "MCTS",
    "REWARDS",
    "AbstractDecoder",
    "AbstractProcessReward",
    "AbstractReward",
    "BeamSearch",
    "BestOfN",
    "Budget",
    "DTOConfig",
    "Decoded",
    "EditSearch",
    "Greedy",
    "Ledger",
    "Nabla",
    "Problem",
    "Sample",
    "Sampling",
    "SelfConsistency",
    "Setting",
    "UserError",
    "__version__",
    "align",
    "decode",
    "distill",
    "load_policy",
    "load_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
