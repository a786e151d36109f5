"""How much work a point of the exact study is."""

from __future__ import annotations

from dataclasses import dataclass

from nabla_rl.types import UserError


@dataclass(frozen=True)
class ExactSettings:
    """How much work a point is."""

    max_steps: int = 1_000_000
    """Steps after which a chain's exact law is given up on."""
    chains: int = 2048
    """Chains of the running samplers."""
    run_steps: int = 500
    """Steps of the running samplers at most."""
    exact_steps: int = 400
    """Updates of RL with the exact gradient."""
    sampled_steps: int = 1500
    """Updates of RL with a sampled gradient."""
    batch_size: int = 256
    """Samples of each of those."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value in vars(self).items():
            if value < (2 if name in ("chains", "batch_size") else 1):
                raise UserError(f"settings.{name}", "a larger number", str(value))
