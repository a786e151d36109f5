"""Adapters saved during a training, after chosen steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from nabla_rl.adapters.training import AdapterTraining
from nabla_rl.types import UserError


class AdapterSnapshots(L.Callback):
    """Saves the adapter of a training run in `<run folder>/steps/<step>/` after each of `steps`.

    As an option of align or distill: `--trainer.callbacks.class_path nabla_rl.adapters.snapshots.AdapterSnapshots`.

    Args:
        steps: Optimiser steps to save after, counted from 1.
    """

    def __init__(self, steps: Sequence[int]):
        if not steps or min(steps) < 1:
            raise UserError("steps", "whole numbers of at least 1", str(list(steps)))
        self.steps = frozenset(steps)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on the first process after each chosen step."""
        assert isinstance(pl_module, AdapterTraining)
        if trainer.global_step not in self.steps or not trainer.is_global_zero or pl_module.run_dir is None:
            return
        folder = snapshot_folder(pl_module.run_dir, trainer.global_step)
        if not folder.is_dir() and pl_module.adapter.changed():
            card = f"The adapter of {pl_module.run_dir.name} after {trainer.global_step} steps.\n"
            pl_module.adapter.save(folder, card, section=pl_module.settings.section)


def snapshot_folder(run_dir: Path, step: int) -> Path:
    """The folder of a step's adapter."""
    return run_dir / "steps" / f"{step:05d}"
