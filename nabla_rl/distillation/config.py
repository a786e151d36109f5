"""The settings of distillation, in TRL's words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nabla_rl.adapters.config import AdapterConfig
from nabla_rl.distillation.rows import Method
from nabla_rl.types import UserError


@dataclass(frozen=True)
class DistillConfig(AdapterConfig):
    """Supervised training of an adapter. Every name and meaning is that of TRL's SFTConfig and DPOConfig."""

    section: ClassVar[str] = "training"
    beta: float = 0.1
    """β of DPO's implicit reward β log π/π_ref; not the β of the energy."""
    loss_type: list[Literal["sigmoid", "sft"]] = field(default_factory=lambda: ["sigmoid"])
    """Losses of preferences, in any sum: sigmoid (DPO) and sft (likelihood of what was chosen)."""
    loss_weights: list[float] | None = None
    """Weights of these losses; null is 1 each."""
    per_device_train_batch_size: int = 64
    """Rows, or pairs of preferences, in one forward and backward of a process."""
    eval_steps: int = 100
    """Steps between measurements on the validation problems; the best weights are kept."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.loss_type or (self.loss_weights and len(self.loss_weights) != len(self.loss_type)):
            raise UserError(
                "training.loss_weights", f"one for each of {len(self.loss_type)} losses", str(self.loss_weights)
            )
        self.check(at_least_one=("per_device_train_batch_size", "eval_steps"), positive=("beta",))

    def to_trl(self, method: Method, **more: Any) -> Any:
        """The same settings as TRL's config for that way to learn; `more` are further fields of it."""
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.sft_config import SFTConfig

        configs = {"sft": SFTConfig, "preference": DPOConfig}
        if method not in configs:
            raise UserError(
                "method",
                "sft or preference with {engine} trl",
                str(method),
                "TRL's trainers take no weights and no stored targets; use the lightning engine.",
            )
        if method == "sft":
            more["loss_type"] = "nll"
        return self.as_trl(configs[method], max_length=None, **more)
