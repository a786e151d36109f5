"""From the lines of results.jsonl to the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nabla_rl.metrics import wilson_interval

Line = Mapping[str, Any]
"""A line of results.jsonl."""


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def finished_by_all(results: Sequence[Line], decoders: Sequence[str]) -> list[Line]:
    """The lines of the problems that every decoder has finished, so that all rows are over the same problems."""
    done = {(row["id"], row["decoder"]) for row in results}
    return [row for row in results if all((row["id"], decoder) in done for decoder in decoders)]


def summarise(results: Sequence[Line], decoders: Sequence[str]) -> list[dict]:
    """One row for each decoder: its accuracy with the 95% Wilson interval, and the means of everything else.

    Args:
        results: Lines of results.jsonl.
        decoders: The decoders' names, in the order of the rows.

    Returns:
        Rows with decoder, accuracy, accuracy_low, accuracy_high (None where no answer is known), mean_reward,
        gold_reward, rollouts, policy_calls, reward_calls, flops, seconds (each a mean over problems) and
        acceptance_rate (accepted proposals over all proposals).
    """
    rows = []
    for decoder in decoders:
        mine = [row for row in results if row["decoder"] == decoder]
        graded = [row["correct"] for row in mine if row["correct"] is not None]
        accuracy = sum(graded) / len(graded) if graded else None
        low, high = wilson_interval(sum(graded), len(graded)) if graded else (None, None)
        proposals = sum(row["proposals"] for row in mine)
        rows.append(
            {
                "decoder": decoder,
                "accuracy": accuracy,
                "accuracy_low": None if low is None else float(low),
                "accuracy_high": None if high is None else float(high),
                "mean_reward": mean([row["reward"] for row in mine]),
                "gold_reward": mean([row["gold_reward"] for row in mine]),
                "rollouts": mean([len(row["rollouts"]) for row in mine]),
                "policy_calls": mean([row["cost"]["policy_calls"] for row in mine]),
                "reward_calls": mean([row["cost"]["reward_calls"] for row in mine]),
                "flops": mean([row["cost"]["flops"] for row in mine]),
                "seconds": mean([row["seconds"] for row in mine]),
                "acceptance_rate": sum(row["accepted"] for row in mine) / proposals if proposals else None,
            }
        )
    return rows


def acceleration_shares(results: Sequence[Line]) -> dict[str, float] | None:
    """The share of work that each acceleration of ∇-Reasoner saved, over all problems.

    Returns:
        `positions_skipped`, the share of positions that the selector did not pick; `tokens_unchanged`, the share of
        picked positions whose token stayed, which saves the rollout; `gradients_cached`, the share of DTO steps that
        needed no model call. None where the loop did not run.
    """
    counts: dict[str, int] = {}
    for row in results:
        if row["decoder"] == "nabla":
            for name, value in row["counts"].items():
                counts[name] = counts.get(name, 0) + value
    steps, visited, skipped = (counts.get(name, 0) for name in ("dto_steps", "visited", "skipped"))
    if not visited + skipped:
        return None
    evaluations = counts.get("dto_evaluations", 0) + counts.get("probes", 0)
    return {
        "positions_skipped": skipped / (visited + skipped),
        "tokens_unchanged": counts.get("unchanged", 0) / visited if visited else 0.0,
        "gradients_cached": 1 - evaluations / steps if steps else 0.0,
    }
