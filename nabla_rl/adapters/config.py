"""The settings that every training of an adapter has, in TRL's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from nabla_rl.types import UserError


@dataclass(frozen=True)
class AdapterConfig:
    """How the weights of an adapter are trained. Names and meanings are those of TRL's configs.

    `learning_rate` is LoRA's scale (TRL's defaults of 1e-6 to 2e-5 are for all weights).
    """

    section: ClassVar[str]
    gradient_accumulation_steps: int = 1
    """Number of batches in one optimiser step."""
    max_steps: int = 200
    """Number of optimiser steps."""
    learning_rate: float = 1e-4
    """Peak step size of the optimiser."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the step size: to zero along a line or a cosine, or constant."""
    warmup_steps: int = 0
    """Number of steps of linear warm-up."""
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    """Optimiser."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped; 0 never clips."""
    logging_steps: int = 1
    """Steps between lines of the metrics."""
    save_steps: int = 25
    """Steps between checkpoints."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Logger of the metrics, besides metrics.jsonl."""

    def check(
        self, *, at_least_one: Sequence[str] = (), positive: Sequence[str] = (), not_negative: Sequence[str] = ()
    ) -> None:
        """Refuse values out of range; the arguments name the fields of a subclass that have such a range."""
        option = self.section
        for name in ("gradient_accumulation_steps", "max_steps", "logging_steps", "save_steps", *at_least_one):
            if getattr(self, name) < 1:
                raise UserError(f"{option}.{name}", "at least 1", str(getattr(self, name)))
        for name in ("learning_rate", *positive):
            if not getattr(self, name) > 0:
                raise UserError(f"{option}.{name}", "a positive number", str(getattr(self, name)))
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", *not_negative):
            if not getattr(self, name) >= 0:
                raise UserError(f"{option}.{name}", "at least 0", str(getattr(self, name)))

    def as_trl(self, config: type, **more: Any) -> Any:
        """The same settings as an instance of TRL's `config`; `more` sets further fields of it."""
        known = {entry.name for entry in fields(config)}
        shared = {name: value for name, value in vars(self).items() if name in known}
        settings: dict[str, Any] = {**shared, "bf16": False, "gradient_checkpointing": False, **more}
        return config(**settings)
