"""What every forward, backward and decoded token cost, per problem.

A `Ledger` holds one account per problem. Rows are keyed by phase (what the work was for), model (policy or reward)
and pass (forward or backward). Each row counts

- `calls`: passes that the problem took part in, one for each of its sequences (the paper's "model calls"),
- `sequential`: passes that had to wait for one another, counting sequences of one problem in one batch once (latency),
- `tokens`: real tokens processed, padding excluded, so that a figure does not depend on the batch it was decoded in,
- `flops`: floating-point operations of those tokens (formulas in `nabla_rl.models.flops`), and
- `seconds`: wall-clock time, a batch's time shared equally by the problems in it.

Gradient steps served from a cache cost nothing and appear as `cached` counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

COLUMNS = ("calls", "sequential", "tokens", "flops", "seconds")
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Cost:
    """One total, or one row of a ledger."""

    calls: int = 0
    sequential: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class Ledger:
    """Accounts of `num_problems` problems that are decoded together."""

    def __init__(self, num_problems: int):
        self.num_problems = num_problems
        self.phase_name = "rollout"
        self.rows: dict[Key, Tensor] = {}
        self.cached = torch.zeros(num_problems, dtype=torch.int64)
        self.overhead = torch.zeros(num_problems, dtype=torch.float64)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book everything recorded inside under phase `name`."""
        before, self.phase_name = self.phase_name, name
        try:
            yield
        finally:
            self.phase_name = before

    def record(
        self,
        model: str,
        direction: str,
        problems: Tensor,
        tokens: Tensor,
        flops: Tensor,
        seconds: float = 0.0,
        *,
        is_pass: bool = True,
    ) -> None:
        """Book one pass, or more work of a pass already booked.

        Args:
            model: "policy" or "reward".
            direction: "forward" or "backward".
            problems: the problem index of each sequence in the batch, (batch,).
            tokens: real tokens of each sequence, (batch,); sequences with none took no part.
            flops: operations of each sequence, (batch,).
            seconds: wall-clock time of the whole pass.
            is_pass: False adds operations and seconds to the row without counting calls and tokens again.
        """
        account = self.rows.setdefault(
            (self.phase_name, model, direction), torch.zeros(self.num_problems, len(COLUMNS), dtype=torch.float64)
        )
        problems, tokens, flops = problems.cpu(), tokens.cpu(), flops.cpu().double()
        active = tokens > 0
        problems, tokens, flops = problems[active], tokens[active], flops[active]
        calls = torch.bincount(problems, minlength=self.num_problems).double()
        present = (calls > 0).double()
        if is_pass:
            account[:, 0] += calls
            account[:, 1] += present
            account[:, 2].index_add_(0, problems, tokens.double())
        account[:, 3].index_add_(0, problems, flops)
        account[:, 4] += present * (seconds / present.sum().clamp(min=1))

    def record_steps(
        self, model: str, direction: str, problems: Tensor, fed: Tensor, flops: Tensor, seconds: Sequence[float]
    ) -> None:
        """Book passes of one token a sequence that came one after another: what `record` would say of them all.

        Args:
            model: "policy" or "reward".
            direction: "forward" or "backward".
            problems: the problem index of each sequence, (batch,).
            fed: (batch, steps), True where a sequence took part.
            flops: operations of each sequence in all steps, (batch,).
            seconds: wall-clock time of each step.
        """
        if fed.shape[1] == 0:
            return
        account = self.rows.setdefault(
            (self.phase_name, model, direction), torch.zeros(self.num_problems, len(COLUMNS), dtype=torch.float64)
        )
        problems, fed, flops = problems.cpu(), fed.cpu().double(), flops.cpu().double()
        calls = fed.sum(-1)
        present = torch.zeros(self.num_problems, fed.shape[1], dtype=torch.float64)
        present = present.index_add_(0, problems, fed).clamp(max=1)  # who waited for each step
        account[:, 0].index_add_(0, problems, calls)
        account[:, 1] += present.sum(-1)
        account[:, 2].index_add_(0, problems, calls)
        account[:, 3].index_add_(0, problems, flops)
        shares = torch.tensor(seconds, dtype=torch.float64) / present.sum(0).clamp(min=1)
        account[:, 4] += present @ shares

    def record_cached(self, problems: Tensor) -> None:
        """Count gradient steps that a cached gradient served, one for each entry of `problems`."""
        self.cached += torch.bincount(problems.cpu(), minlength=self.num_problems)

    def absorb(self, parts: Ledger, owners: Tensor) -> None:
        """Book the accounts of sequences that ran side by side, from their start on, on the problems that own them.

        Args:
            parts: a ledger with an account for each sequence.
            owners: the problem of each sequence.
        """
        for key, account in parts.rows.items():
            total = torch.zeros(self.num_problems, len(COLUMNS), dtype=torch.float64).index_add_(0, owners, account)
            # sequences of one problem waited together
            total[:, 1] = torch.zeros(self.num_problems, dtype=torch.float64).scatter_reduce(
                0, owners, account[:, 1], "amax"
            )
            self.rows[key] = self.rows[key] + total if key in self.rows else total

    def cost(
        self, problem: int, *, model: str | None = None, phase: str | None = None, direction: str | None = None
    ) -> Cost:
        """The total of one problem over the rows that match."""
        total = torch.zeros(len(COLUMNS), dtype=torch.float64)
        for (row_phase, row_model, row_direction), account in self.rows.items():
            if model in (None, row_model) and phase in (None, row_phase) and direction in (None, row_direction):
                total += account[problem]
        calls, sequential, tokens, flops, seconds = total.tolist()
        return Cost(round(calls), round(sequential), round(tokens), flops, seconds)

    def table(self, problem: int) -> list[dict]:
        """One problem's rows as plain mappings, sorted by key."""
        return [
            {"phase": key[0], "model": key[1], "pass": key[2]}
            | asdict(self.cost(problem, phase=key[0], model=key[1], direction=key[2]))
            for key in sorted(self.rows)
            if self.rows[key][problem].any()
        ]


class Stopwatch:
    """Seconds since it was made, after the device has caught up."""

    def __init__(self, device: torch.device):
        self.device = device
        self._wait()
        self.start = time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self) -> float:
        self._wait()
        return time.perf_counter() - self.start
