"""DTO by itself as a decoder: a sample of the policy, moved down the energy for some steps, and no rollout after it.

Its completions along the steps show what the straight-through gradient does to the reward that it climbs, and to
what it does not see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from nabla_rl import dto
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Candidate,
    Decoded,
    Setting,
    draw_rollouts,
    prefill,
    prefill_reward,
    require_reward,
)
from nabla_rl.decoding.objective import Objective
from nabla_rl.decoding.probing import start_at
from nabla_rl.dto import DTOConfig


@dataclass(frozen=True)
class Descent(AbstractDecoder):
    """DTO from a sample; the answer is the argmax of the last logits, up to the first end of sequence."""

    config: DTOConfig = field(default_factory=DTOConfig)
    """The optimisation of logits (DTO)."""

    name: ClassVar[str] = "dto"

    def decode(self, problems: Sequence[Problem], setting: Setting) -> list[Decoded]:
        judge, policy, ledger = require_reward(self.name, setting.reward), setting.policy, setting.ledger
        prefix = prefill(problems, setting)
        drawn = draw_rollouts(problems, setting, prefix, keep_logits=True)
        assert drawn.logits is not None
        judged = prefill_reward(problems, judge, ledger)
        objective = Objective(policy, judge, prefix, judged, drawn.mask, None, hard=True)
        config = replace(self.config, relaxation="straight_through", beta=setting.beta)
        state = start_at(dto.init(drawn.logits, drawn.mask, config), drawn.ids)
        with torch.enable_grad(), ledger.phase("dto"):
            for _ in range(config.num_steps):
                state, _ = dto.step(state, objective.log_probs, objective.rewards, config, donate=True)
        ends = set(policy.get_buffer("eos_ids").tolist())
        results = []
        for problem, tokens, mask in zip(problems, state.tokens, drawn.mask, strict=True):
            ids = cut_at_end(tokens[mask].tolist(), ends)
            # nobody has asked for its likelihood or its reward
            answer = Candidate(policy.decode(ids), tuple(ids), math.nan)
            results.append(Decoded(problem.id, answer.text, answer.ids, ids[-1] in ends, answer.logps, None, [answer]))
        return results


def cut_at_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first that ends a sequence."""
    where = next((k for k, token in enumerate(ids) if token in ends), len(ids) - 1)
    return list(ids[: where + 1])
