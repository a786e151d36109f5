"""What became of every claim of the exact study, in words: holds, or fails and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

TV_BOUND, KL_BOUND, IDENTITY_BOUND = 0.02, 0.01, 1e-9


class Verdict(NamedTuple):
    """What became of one claim on one landscape, over all β and seeds."""

    claim: str
    landscape: str
    holds: bool
    measured: float  # the worst
    bound: float
    worst_lambda: float | None
    note: str

    @property
    def text(self) -> str:
        """`holds`, or `fails` and by how much."""
        return "holds" if self.holds else f"fails by {self.measured - self.bound:.2g}"


def verdicts(points: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Every claim on every landscape, the worst point deciding."""
    found: list[Verdict] = []
    names = list(dict.fromkeys(point["landscape"] for point in points))

    def judge(claim: str, bound: float, value: Callable[[dict], float], note: Callable[[list[dict]], str]) -> None:
        for name in names:
            mine = [point for point in points if point["landscape"] == name]
            worst = max(mine, key=lambda point: _worse(value(point)))
            measured = value(worst)
            found.append(Verdict(claim, name, measured <= bound, measured, bound, worst["lambda"], note(mine)))

    judge("identities hold in float64", IDENTITY_BOUND, lambda p: max(p["identities"].values()), lambda ps: "")
    judge(
        "continuous case has its closed-form law (standard errors)", 4.0,
        lambda p: max(p["gaussian"]["variance_sigmas"], p["gaussian"]["mean_sigmas"]), lambda ps: "",
    )  # fmt: skip
    for name in (
        "Gibbs-with-gradients",
        "discrete Langevin",
        "Gibbs-with-gradients + independence",
        "discrete Langevin + independence",
        "independence Metropolis",
    ):
        judge(
            f"{name} reaches the tilted policy (TV, exact law)", TV_BOUND,
            lambda p, n=name: pick(p["samplers"], n)["tv"],
            lambda ps, n=name: "model calls needed: " + _list(pick(p["samplers"], n)["evaluations_to_tv"] for p in ps),
        )  # fmt: skip
    for name in ("Langevin on logits", "Langevin on logits + independence"):
        judge(
            f"running, corrected {name} reaches it (TV beyond that of independent draws)", TV_BOUND,
            lambda p, n=name: _excess(pick(p["samplers"], n)["measured"], ""),
            lambda ps, n=name: f"{pick(ps[0]['samplers'], n)['measured']['steps']} steps; spread of the estimate at "
            f"most {max(pick(p['samplers'], n)['measured']['iid_tv_spread'] for p in ps):.3f}",
        )  # fmt: skip
    for name in ("Gibbs-with-gradients", "discrete Langevin"):
        judge(
            f"running {name} follows its exact law (TV beyond independent draws', in standard deviations)", 4.0,
            lambda p, n=name: _excess(pick(p["samplers"], n)["measured"], "own_law_")
            / pick(p["samplers"], n)["measured"]["own_law_iid_tv_spread"],
            lambda ps: "",
        )  # fmt: skip
    for name in ("RL, exact gradient", "RL, sampled gradient"):
        judge(
            f"{name} reaches the tilted policy (KL)", KL_BOUND,
            lambda p, n=name: pick(p["training"], n)["kl"],
            lambda ps, n=name: "gradients needed: " + _list(pick(p["training"], n)["evaluations_to_kl"] for p in ps),
        )  # fmt: skip
    judge(
        "λ/2 in weights and λ/2 at test time is λ (TV)", TV_BOUND, lambda p: p["composition"]["chain_tv"],
        lambda ps: "steps from trained weights: "
        + _list(p["composition"]["steps_to_tv_from_trained"] for p in ps)
        + "; from the policy: "
        + _list(p["composition"]["steps_to_tv_from_policy"] for p in ps),
    )  # fmt: skip
    decoders = [row["name"] for row in points[0]["placements"] if row["name"] != "policy"]
    for name in decoders:
        judge(
            f"{name} samples the tilted policy (TV)", TV_BOUND,
            lambda p, n=name: pick(p["placements"], n)["tv"],
            lambda ps, n=name: describe([pick(p["placements"], n) for p in ps]),
        )  # fmt: skip
    return found


def pick(rows: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of that name."""
    return next(row for row in rows if row["name"] == name)


def describe(places: Sequence[dict[str, Any]]) -> str:
    """In which direction a decoder misses, over the points, and the strength at which it fits best."""
    count = len(places)
    seeking = sum(place["entropy_excess"] < -0.05 for place in places)
    over = sum(place["reward_excess"] > 0.01 for place in places)
    under = sum(place["reward_excess"] < -0.01 for place in places)
    strengths = _list(place["lambda_eff"] for place in places)
    return (
        f"mode-seeking at {seeking}, over-optimised at {over}, short of the reward at {under} of {count}; "
        f"λ_eff: {strengths}"
    )


def _excess(measured: dict[str, Any], which: str) -> float:
    return max(0.0, measured[f"{which}tv"] - measured[f"{which}iid_tv"])


def _worse(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _list(values: Iterable[float | None]) -> str:
    texts = ["–" if v is None else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in values]
    return ", ".join(texts)
