"""Controls of edit search: the same search with its knowledge taken away, to see what the knowledge is worth.

A study file names them by class path: `decoder: nabla_rl.studies.controls.RandomEdits`, with their options under
`model.random_edits` and `model.shuffled_gradient`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nabla_rl.decoding.base import Setting
from nabla_rl.decoding.edit_search import EditSearch, EditState, Proposals
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.sampling import Sampling


@dataclass(frozen=True)
class RandomEdits(EditSearch):
    """Edit search that tries its alternatives in a random order, without values."""

    proposals: Proposals = "policy"
    """Source of ΔV: policy (none), as a random order needs no values."""

    name: ClassVar[str] = "random_edits"

    def is_deterministic(self, sampling: Sampling) -> bool:
        return False

    def _gains(self, search: EditState, setting: Setting) -> Tensor:
        generator = seeded_generator(setting.seed, search.problem.id, "edits", len(search.tried))
        odds = search.current.odds
        return torch.rand(odds.shape, generator=generator).to(odds)


@dataclass(frozen=True)
class ShuffledGradient(EditSearch):
    """Edit search by gradient in which each position's changes of the value go to random tokens.

    The size of the changes stays, their direction is lost.
    """

    proposals: Proposals = "gradient"
    """Source of ΔV: gradient (first order), whose changes are then shuffled."""

    name: ClassVar[str] = "shuffled_gradient"

    def is_deterministic(self, sampling: Sampling) -> bool:
        return False

    def _found(self, changes: Tensor, search: EditState, setting: Setting) -> Tensor:
        generator = seeded_generator(setting.seed, search.problem.id, "shuffle", len(search.tried))
        order = torch.rand(changes.shape, generator=generator).argsort(-1).to(changes.device)
        return changes.gather(-1, order)
