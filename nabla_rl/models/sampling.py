"""How completions are drawn from a policy."""

from __future__ import annotations

from dataclasses import dataclass

from nabla_rl.types import UserError


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn from the policy."""

    temperature: float = 0.8
    """Sampling temperature for rollouts; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass of the samples; 1 keeps the whole distribution."""
    max_new_tokens: int | None = None
    """Maximum tokens of a completion; null is the model's own generation setting, or 512."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.temperature >= 0:
            raise UserError("sampling.temperature", "at least 0", str(self.temperature), "Use 0 for greedy.")
        if not 0 < self.top_p <= 1:
            raise UserError("sampling.top_p", "a number in (0, 1]", str(self.top_p), "Use 1 to switch it off.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError("sampling.max_new_tokens", "at least 1", str(self.max_new_tokens))

    @property
    def length(self) -> int:
        """`max_new_tokens` once it is known."""
        assert self.max_new_tokens is not None
        return self.max_new_tokens
