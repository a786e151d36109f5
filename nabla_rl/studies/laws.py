"""Distributions of completions as samples: reweighted into others, put into a table, and compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nabla_rl.data.problems import Problem
from nabla_rl.duality import estimates
from nabla_rl.duality.estimates import Interval
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.policy import Policy
from nabla_rl.report.rows import Row
from nabla_rl.studies.sources import Density, Source, features

BEST_OF = (2, 4, 8, 16, 32, 64, 128)
REDRAWN = 4
"""Completions of each problem that a reweighted pool gives where completions are compared."""
COMPARED = 8
"""Completions of each problem at most that are compared with another distribution's."""
KL_BY: dict[Density, str] = {
    "known": "exact at each token of its samples",
    "point": "bounds: a point mass has the upper end",
    "unknown": "bounds: no density",
}


@dataclass
class Sample:
    """A distribution's completions of a family's problems, and what is known of each; seeds follow one another.

    Attributes:
        label: its name.
        curve, beta, at: as in its source.
        density: whether the distribution can be evaluated.
        problems: ids.
        completions: of each problem.
        values: rewards, gold, correct, surprisal and (of a policy) log_ratio, (problems, samples) each.
        kl: of each problem, where it is known.
        kl_by: how.
        flops: of a completion, mean over problems.
        training_flops: of its adapter.
        pool, weights: the sample that it is a reweighting of, and the weights.
    """

    label: str
    curve: str
    beta: float | None
    at: float | None
    density: Density
    problems: list[str]
    completions: list[list[tuple[int, ...]]]
    values: dict[str, Tensor]
    kl: Tensor | None
    kl_by: str
    flops: float | None = None
    training_flops: float = 0.0
    pool: Sample | None = None
    weights: Tensor | None = None

    def mean(self, name: str) -> Tensor:
        """One value for each problem."""
        if self.pool is not None and self.weights is not None:
            return (self.weights * self.pool.values[name]).sum(1)
        return self.values[name].mean(1)


def few(sample: Sample) -> Sample:
    """The first `COMPARED` completions of each problem; means stay those of all."""
    values = {name: v[:, :COMPARED] for name, v in sample.values.items()}
    pool, weights = sample.pool, sample.weights
    if pool is None:
        rewards = sample.values["rewards"]
        pool, weights = sample, torch.full_like(rewards, 1 / rewards.shape[1])
    completions = [answers[:COMPARED] for answers in sample.completions]
    return replace(sample, completions=completions, values=values, pool=pool, weights=weights)


def sample_of(label: str, source: Source, rows: Sequence[Row]) -> Sample:
    """The completions of a distribution, from its lines, one for each seed."""
    names = [name for name in ("rewards", "gold", "correct", "surprisal", "log_ratio") if name in rows[0]]
    problems = rows[0]["problems"]
    return Sample(
        label,
        source.curve,
        source.beta,
        source.at,
        rows[0]["density"],
        problems,
        [[tuple(ids) for row in rows for ids in row["completions"][k]] for k in range(len(problems))],
        {name: torch.cat([_matrix(row[name]) for row in rows], 1) for name in names},
        None if rows[0]["kl"] is None else torch.stack([_matrix(row["kl"]) for row in rows]).mean(0),
        KL_BY[rows[0]["density"]],
        sum(sum(row["flops"]) / len(row["flops"]) for row in rows) / len(rows),
        rows[0]["training_flops"],
    )


def _matrix(values: Sequence[Any]) -> Tensor:
    nested = [[float("nan") if v is None else v for v in row] if isinstance(row, list) else row for row in values]
    return torch.tensor(nested, dtype=torch.float64)


def reweighted(pool: Sample, weights: Tensor, **changes: Any) -> Sample:
    """Another distribution on a pool's completions: averages are weighted, and some completions are drawn by their
    weights, evenly spread."""
    generator = seeded_generator("reweighted", str(changes["label"]))
    offset = torch.rand(len(weights), 1, generator=generator, dtype=torch.float64)
    places = (torch.arange(REDRAWN) + offset) / REDRAWN
    index = torch.searchsorted(weights.cumsum(1), places).clamp(max=weights.shape[1] - 1)
    completions = [[answers[k] for k in row] for answers, row in zip(pool.completions, index.tolist(), strict=True)]
    values = {name: values.gather(1, index) for name, values in pool.values.items()}
    return replace(pool, completions=completions, values=values, pool=pool, weights=weights, **changes)


def tilt(pool: Sample, strength: float, *, label: str, curve: str, beta: float | None) -> Sample:
    """A policy's samples, reweighted by exp(r / strength): its tilted policy. The KL is that from the reference."""
    tilted = estimates.tilt_pool(pool.values["rewards"], strength)
    kl = tilted.kl + (tilted.weights * pool.values["log_ratio"]).sum(1)
    return reweighted(
        pool, tilted.weights, label=label, curve=curve, beta=beta, at=None, kl=kl, kl_by="reweighted draws",
        flops=None,
    )  # fmt: skip


def best_of(pool: Sample) -> list[Sample]:
    """Best-of-n by reward and by energy (β = 1), as distributions on the pool."""
    completions, rewards, surprisal = numbered(pool.completions), pool.values["rewards"], pool.values["surprisal"]
    return [
        reweighted(
            pool,
            estimates.best_of_n_weights(scores, n),
            label=f"best of {n} by {choice}",
            curve=f"best of n by {choice}",
            at=n,
            kl=estimates.best_of_n_kl(-surprisal, scores, completions, n),
            kl_by="order statistics",
            flops=None if pool.flops is None else n * pool.flops,
        )  # fmt: skip
        for choice, scores in (("reward", rewards), ("energy", rewards - surprisal))
        for n in BEST_OF
        if n <= rewards.shape[1] / 2
    ]


def numbered(completions: Sequence[Sequence[tuple[int, ...]]]) -> Tensor:
    """A number for each different completion of a problem, (problems, samples)."""
    rows = []
    for answers in completions:
        order = {ids: number for number, ids in enumerate(dict.fromkeys(answers))}
        rows.append([order[ids] for ids in answers])
    return torch.tensor(rows)


def describe(sample: Sample, pool: Sample | None) -> Row:
    """A line of the table: means over problems with their intervals, and the KL from the policy or what bounds it."""
    row: Row = {"distribution": sample.label, "curve": sample.curve, "beta": sample.beta, "at": sample.at}
    row |= {"problems": len(sample.problems), "samples": (sample.pool or sample).values["rewards"].shape[1]}
    means = {"accuracy": "correct", "reward": "rewards", "gold_reward": "gold", "surprisal": "surprisal"}
    for name, key in means.items():
        row |= _interval(name, sample.mean(key))
    if sample.kl is not None:
        row |= _interval("kl", sample.kl)
    else:
        # KL = E[-log π(y)] - entropy, and no entropy is negative
        least = None if pool is None else estimates.least_kl(sample.values["rewards"], pool.values["rewards"])
        row |= {"kl": None, "kl_from": least, "kl_to": row["surprisal"]}
    row["kl_by"] = sample.kl_by
    if sample.curve.startswith("best of n"):
        row["kl_analytic"] = estimates.best_of_n_kl_bound(int(sample.at or 1))
    if sample.weights is not None and not sample.curve.startswith("best of n"):
        effective = 1 / sample.weights.square().sum(1)
        row["few_draws"] = float((effective < estimates.CARRIED).double().mean())
    return row | {"flops": sample.flops, "training_flops": sample.training_flops or None}


def _interval(name: str, values: Tensor) -> Row:
    """A mean over problems and its 95% bootstrap interval; nothing where nothing is known."""
    if not bool(values.isfinite().all()):
        return {name: None}
    found = estimates.mean_interval(values, seeded_generator("measured", name))
    return _named(name, found)


def _named(name: str, found: Interval) -> Row:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def features_of(sample: Sample, policy: Policy, problems: Sequence[Problem]) -> Tensor:
    """What a probe sees, (problems, samples, features): the policy's states, its likelihood, and the reward."""
    size = len(sample.completions[0])
    by_id = {problem.id: problem for problem in problems}
    owners = [by_id[key] for key in sample.problems for _ in range(size)]
    states = features(policy, owners, [ids for answers in sample.completions for ids in answers])
    scalars = torch.stack([sample.values[name].flatten() for name in ("rewards", "surprisal")], 1)
    return torch.cat([states, scalars], 1).view(len(sample.problems), size, -1)


def compare(first: Sample, second: Sample, seen_first: Tensor, seen_second: Tensor) -> Row:
    """Whether two distributions on the same problems are the same one, and which is better."""
    row: Row = {"first": first.label, "second": second.label, "problems": len(first.problems)}
    generator = seeded_generator("compare", first.label, second.label)
    rewards = first.mean("rewards"), second.mean("rewards")
    row |= _named("reward_correlation", estimates.correlation(*rewards, generator))
    row |= _named("rank_correlation", estimates.correlation(*rewards, generator, ranks=True))
    overlaps = [estimates.token_overlap(a, b) for a, b in zip(first.completions, second.completions, strict=True)]
    row |= _interval("overlap", torch.tensor(overlaps, dtype=torch.float64))
    for name, sample in (("overlap_within_first", first), ("overlap_within_second", second)):
        if len(sample.completions[0]) > 1:
            inside = [estimates.token_overlap(a, a, same=True) for a in sample.completions]
            row[name] = sum(inside) / len(inside)
    same = [
        sum(a == b for a in x for b in y) / (len(x) * len(y))
        for x, y in zip(first.completions, second.completions, strict=True)
    ]
    row |= _interval("same_answer", torch.tensor(same, dtype=torch.float64))
    count = min(seen_first.shape[1], seen_second.shape[1])
    owner = torch.arange(len(seen_first)).repeat_interleave(count)
    probe = estimates.two_sample_test(
        seen_first[:, :count].flatten(0, 1), seen_second[:, :count].flatten(0, 1), owner, generator
    )
    row |= _named("probe_accuracy", probe.accuracy) | {"probe_p": probe.p_value}
    if bool(first.values["gold"].isfinite().all() and second.values["gold"].isfinite().all()):
        wins = [estimates.win_share(a, b) for a, b in zip(first.values["gold"], second.values["gold"], strict=True)]
        row |= _interval("gold_wins", torch.tensor(wins, dtype=torch.float64))
    for name, key in (("accuracy", "correct"), ("reward", "rewards"), ("gold", "gold")):
        row |= _interval(f"{name}_difference", first.mean(key) - second.mean(key))
    return row
