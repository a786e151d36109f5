"""When a proposed completion replaces the current one. Both are scored alike: the same prompt, the same template, in
full."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

Acceptance = Literal["energy", "reward", "metropolis"]


class Standing(NamedTuple):
    """A completion, as an acceptance rule sees it."""

    reward: float
    """r(x, y)."""
    energy: float
    """-r/β - log π(y|x)."""
    proposal_logp: float
    """log-probability of proposing it from the shared prefix."""


def accept_by_reward(current: Standing, proposed: Standing, uniform: float) -> bool:
    """The published rule: the reward must rise. It cannot see that the judge is being fooled."""
    del uniform
    return proposed.reward > current.reward


def accept_by_energy(current: Standing, proposed: Standing, uniform: float) -> bool:
    """The energy must fall: the proposal is likelier under the tilted policy π exp(r/β)."""
    del uniform
    return proposed.energy < current.energy


def accept_by_metropolis(current: Standing, proposed: Standing, uniform: float) -> bool:
    """Accept with probability min(1, exp(-(E' - E)) q(y) / q(y')).

    With independent proposals q this is Metropolis-Hastings for the tilted policy. Here q's first token was
    optimised from the current completion, and its law given the proposed one is taken to be the same: an
    approximation.
    """
    log_ratio = (current.energy - proposed.energy) + (current.proposal_logp - proposed.proposal_logp)
    if math.isnan(log_ratio):
        return False
    return uniform < math.exp(min(log_ratio, 0.0))


RULES: dict[Acceptance, Callable[[Standing, Standing, float], bool]] = {
    "energy": accept_by_energy,
    "reward": accept_by_reward,
    "metropolis": accept_by_metropolis,
}
