"""Both sides on problems whose answers cannot be listed: laws of completions, measured on samples, pair by pair.

A point is one law (a `Source`): the policy, an adapter that alignment or distillation has trained, or a decoder. Its
completions are drawn and judged once and written down; every figure and table comes from those lines. The policy's own
point, with many samples, is the pool from which best-of-n and the tilted policies are derived without drawing anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.duality import estimates
from nabla_rl.duality.estimates import Interval
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.loading import PolicyOptions, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.modules.ablate import (
    VARIANT,
    AbstractStudy,
    Point,
    Report,
    Row,
    as_text,
    finite,
    one_thread,
    silently,
)
from nabla_rl.modules.measuring import Density, Source, draw, features, judge
from nabla_rl.modules.snapshots import snapshot_folder
from nabla_rl.types import UserError

POOL = "policy"
"""The curve whose point is the pool."""
POOL_SIZE = 16
"""Samples of the policy at least, for best-of-n and tilted policies to be derived."""
BEST_OF = (2, 4, 8, 16, 32, 64, 128)
TILTED_SAMPLES = 4
FIGURES = ("rewards", "gold", "correct", "surprisal")
SNAPSHOTS = "nabla_rl.modules.snapshots.AdapterSnapshots"


@dataclass
class Sample:
    """A law's completions of a family's problems, and what is known of each; seeds are one behind the other.

    Attributes:
        label: its name.
        curve, beta, at: as in its source.
        density: whether the law can be evaluated.
        problems: ids.
        completions: of each problem.
        values: rewards, gold, correct and surprisal, (problems, samples) each.
        kl: of each problem, where it is known.
        flops: of a completion, mean over problems.
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
    flops: float | None
    training_flops: float = 0.0

    def mean(self, name: str) -> Tensor:
        """One value for each problem."""
        return self.values[name].nanmean(1)


@dataclass(frozen=True)
class Measured(AbstractStudy):
    """Laws on samples, against the policy and against each other."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Dotted options of the decode command that all points share."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Label → the fields of a `Source`."""
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name → `command` (align or distill), `snapshots` (steps after which the adapter is kept) and dotted options."""
    pairs: Sequence[Sequence[str]] = ()
    """Labels of two laws that are held against each other; `tilted, β = x` is derived from the policy's pool."""
    adapters_dir: Path = Path("runs/ablate/adapters")

    def source(self, label: str) -> Source:
        """The law of that name."""
        given = dict(self.variants[label])
        unknown = sorted(given.keys() - {entry.name for entry in fields(Source)})
        if unknown or "curve" not in given:
            found = unknown[0] if unknown else "no curve"
            known = ", ".join(entry.name for entry in fields(Source))
            raise UserError(f"--variants: expected a curve and fields among {known}, found {found} in {label!r}.")
        return Source(**given)

    def check(self, points: Sequence[Point]) -> None:
        for name in points[0].values:
            if name not in (VARIANT, "data.family"):
                raise UserError(f"--grid: expected data.family alone for a measured study, found {name!r}.")
        for label in self.variants:
            source = self.source(label)
            if source.adapter is not None and source.adapter not in self.adapters:
                raise UserError(
                    f"--variants: expected an adapter of --adapters for {label!r}, found {source.adapter!r}."
                )
            kept = self.adapters.get(source.adapter or "", {}).get("snapshots", [])
            if source.step is not None and source.step not in kept:
                raise UserError(f"--variants: expected a step among {kept} for {label!r}, found {source.step}.")
        for name, adapter in self.adapters.items():
            if adapter.get("command") not in COMMANDS:
                raise UserError(
                    f"--adapters: expected command: align or distill for {name!r}, found {adapter.get('command')!r}."
                )
        for pair in self.pairs:
            for label in pair:
                if len(pair) != 2 or (label not in self.variants and not label.startswith("tilted, β = ")):
                    raise UserError(f"--pairs: expected two labels of --variants or `tilted, β = x`, found {pair}.")

    def definition(self, label: str) -> dict[str, Any]:
        """Everything that decides what the law of that name is, as plain values."""
        source = self.source(label)
        return finite({**vars(source), "adapter": self.adapters[source.adapter] if source.adapter else None})

    # A point

    def run(self, point: Point, folder: Path) -> list[Row]:
        from nabla_rl.modules.decode_cli import read_options

        label = point.values[VARIANT]
        source, family = self.source(label), str(point.values["data.family"])
        training, adapter = self._adapter(source, family, point.seed)
        with one_thread(), torch.inference_mode(False):
            cli = read_options(self.arguments(source, family, point.seed, adapter))
            module, data = cli.model, cli.datamodule
            module.prepare(torch.device("cpu"), data.problems)
            base = module.options["policy"]
            reference = module.policy
            if adapter is not None:
                reference = load_policy(replace(base, adapter=None), family=family, device=module.policy.device)
            drawn = draw(source, module, data.problems, data.extract, batch_size=data.batch_size)
            found = judge(drawn, module, reference, data.problems, data.grade)
        return [
            {
                "decoder": label,
                "values": dict(point.values),
                "seed": point.seed,
                "problems": [problem.id for problem in data.problems],
                "training_flops": training,
                "source": self.definition(label),
                **found,
            }
        ]

    def arguments(self, source: Source, family: str, seed: int, adapter: Path | None) -> list[str]:
        """The command line of decoding that the point's models, problems and decoder are built from."""
        options: dict[str, Any] = {**self.fixed, "data.family": family, "seed": seed}
        if source.beta is not None:
            options["model.beta"] = source.beta
        if source.decoder not in ("sample", "dto"):
            options["model.decoders"] = [source.decoder]
        options |= source.options
        if adapter is not None:
            options["model.policy.adapter"] = str(adapter)
        return [text for name, value in options.items() for text in (f"--{name}", as_text(value))]

    def _adapter(self, source: Source, family: str, seed: int) -> tuple[float, Path | None]:
        """What training the source's adapter has cost, and its folder; it is trained where that was not done yet."""
        if source.adapter is None:
            return 0.0, None
        import json

        options = dict(self.adapters[source.adapter])
        command, steps = options.pop("command"), options.pop("snapshots", [])
        run_dir = self.adapters_dir / f"{source.adapter}_{family}_seed={seed}"
        summary = run_dir / "summary.json"
        if not summary.is_file():
            options |= {"data.family": family, "seed": seed, "run_dir": str(run_dir)}
            if steps:
                options["trainer.callbacks"] = [{"class_path": SNAPSHOTS, "init_args": {"steps": list(steps)}}]
            arguments = [text for name, value in options.items() for text in (f"--{name}", as_text(value))]
            with silently():
                COMMANDS[command](arguments)
        found = json.loads(summary.read_text(encoding="utf-8"))
        if "flops" in found:
            flops = found["flops"]
        else:
            flops = found["training"]["flops"] + found["data"]["decode_flops"] + found["data"]["target_flops"]
        folder = run_dir / "adapter" if source.step is None else snapshot_folder(run_dir, source.step)
        return flops, folder

    # All points

    def report(self, rows: Sequence[Row], folder: Path) -> Report:
        from nabla_rl.modules.measured_figures import write_measured_figures

        table: list[Row] = []
        pairs: list[Row] = []
        for family in dict.fromkeys(row["values"]["data.family"] for row in rows):
            samples = self._samples([row for row in rows if row["values"]["data.family"] == family])
            lines = _lines(samples)
            table += [{"family": family, **line} for line in lines]
            pairs += [{"family": family, **line} for line in self._pairs(samples, str(family))]
        figures = write_measured_figures(table, folder / "figures")
        return Report(table, figures=figures, tables=[("Two laws on the same problems", pairs)] if pairs else [])

    def _samples(self, rows: Sequence[Row]) -> dict[str, Sample]:
        found: dict[str, Sample] = {}
        for label in dict.fromkeys(row["decoder"] for row in rows):
            mine, source = [row for row in rows if row["decoder"] == label], self.source(label)
            if mine[0]["source"] != self.definition(label):
                raise UserError(
                    f"--run_dir: expected {label!r} to be the law that its results are of, found another definition "
                    "now. Give the new one another label, or choose another --run_dir."
                )
            found[label] = Sample(
                label,
                source.curve,
                source.beta,
                source.at,
                mine[0]["density"],
                mine[0]["problems"],
                [
                    [tuple(ids) for row in mine for ids in row["completions"][k]]
                    for k in range(len(mine[0]["problems"]))
                ],
                {name: torch.cat([_matrix(row[name]) for row in mine], 1) for name in FIGURES},
                None if mine[0]["kl"] is None else torch.stack([_matrix(row["kl"]) for row in mine]).mean(0),
                sum(sum(row["flops"]) / len(row["flops"]) for row in mine) / len(mine),
                mine[0]["training_flops"],
            )
        pool = next((s for s in found.values() if s.curve == POOL), None)
        if pool is not None and pool.values["rewards"].shape[1] >= POOL_SIZE:
            betas = sorted({s.beta for s in found.values() if s.beta is not None})
            found |= {tilted.label: tilted for tilted in (tilted_sample(pool, beta) for beta in betas)}
        return found

    def _pairs(self, samples: Mapping[str, Sample], family: str) -> list[Row]:
        chosen = [pair for pair in self.pairs if all(label in samples for label in pair)]
        if not chosen:
            return []
        policy, problems = self._reference(family)
        labels = dict.fromkeys(label for pair in chosen for label in pair)
        seen = {label: features_of(samples[label], policy, problems) for label in labels}
        return [compare(samples[a], samples[b], seen[a], seen[b]) for a, b in chosen]

    def _reference(self, family: str) -> tuple[Policy, list[Problem]]:
        """The policy that all laws are held to, and the problems."""
        from nabla_rl.modules.decode_cli import read_options

        cli = read_options(self.arguments(Source(POOL), family, 0, None))
        options: PolicyOptions = cli.model.options["policy"]
        data: ProblemData = cli.datamodule
        return load_policy(options, family=family, device=torch.device("cpu")), data.problems


def _align(arguments: list[str]) -> int:
    from nabla_rl.modules.align_cli import main

    return main(arguments)


def _distill(arguments: list[str]) -> int:
    from nabla_rl.modules.distill_cli import main

    return main(arguments)


COMMANDS = {"align": _align, "distill": _distill}


def _matrix(values: Sequence[Any]) -> Tensor:
    nested = [[float("nan") if v is None else v for v in row] if isinstance(row, list) else row for row in values]
    return torch.tensor(nested, dtype=torch.float64)


def tilted_sample(pool: Sample, beta: float) -> Sample:
    """Samples of the tilted policy: the pool's completions, drawn anew by their weights, evenly spread."""
    tilted = estimates.tilt_pool(pool.values["rewards"], beta)
    generator = seeded_generator("tilted", repr(beta))
    offset = torch.rand(len(tilted.weights), 1, generator=generator, dtype=torch.float64)
    places = (torch.arange(TILTED_SAMPLES) + offset) / TILTED_SAMPLES
    index = torch.searchsorted(tilted.weights.cumsum(1), places).clamp(max=tilted.weights.shape[1] - 1)
    return Sample(
        f"tilted, β = {beta:g}",
        "tilted",
        beta,
        None,
        "known",
        pool.problems,
        [[answers[k] for k in row] for answers, row in zip(pool.completions, index.tolist(), strict=True)],
        {name: values.gather(1, index) for name, values in pool.values.items()},
        tilted.kl,
        None,
    )


def _lines(samples: Mapping[str, Sample]) -> list[Row]:
    """The table: every law, and what is derived from the pool."""
    pool = next((s for s in samples.values() if s.curve == POOL and s.values["rewards"].shape[1] >= POOL_SIZE), None)
    lines = [_line(sample, pool) for sample in samples.values() if sample.curve != "tilted"]
    if pool is None:
        return lines
    for sample in samples.values():
        if sample.curve == "tilted":
            assert sample.beta is not None
            tilted = estimates.tilt_pool(pool.values["rewards"], sample.beta)
            line = _weighted_line(sample.label, "tilted", sample.beta, pool, tilted.weights, sample.kl)
            few = float((tilted.effective < estimates.CARRIED).double().mean())
            lines.append(line | {"kl_by": "reweighted draws", "few_draws": few})
    completions = numbered(pool.completions)
    for choice, scores in (
        ("reward", pool.values["rewards"]),
        ("energy", pool.values["rewards"] - pool.values["surprisal"]),
    ):
        for n in (n for n in BEST_OF if n <= pool.values["rewards"].shape[1] / 2):
            weights = estimates.best_of_n_weights(scores, n)
            kl = estimates.best_of_n_kl(-pool.values["surprisal"], scores, completions, n)
            label = f"best of {n} by {choice}"
            line = _weighted_line(label, f"best of n by {choice}", None, pool, weights, kl)
            bound = estimates.best_of_n_kl_bound(n)
            spent = None if pool.flops is None else n * pool.flops
            lines.append(line | {"at": n, "kl_by": "order statistics", "kl_bound": bound, "flops": spent})
    return lines


def numbered(completions: Sequence[Sequence[tuple[int, ...]]]) -> Tensor:
    """A number for each different completion of a problem, (problems, samples)."""
    rows = []
    for answers in completions:
        order = {ids: number for number, ids in enumerate(dict.fromkeys(answers))}
        rows.append([order[ids] for ids in answers])
    return torch.tensor(rows)


def _line(sample: Sample, pool: Sample | None) -> Row:
    row: Row = {"law": sample.label, "curve": sample.curve, "beta": sample.beta, "at": sample.at}
    row |= {"problems": len(sample.problems), "samples": sample.values["rewards"].shape[1]}
    means = {"accuracy": "correct", "reward": "rewards", "gold_reward": "gold", "surprisal": "surprisal"}
    for name, key in means.items():
        row |= _interval(name, sample.mean(key))
    if sample.kl is not None:
        row |= _interval("kl", sample.kl) | {"kl_by": "exact at each token of its samples"}
    else:
        point = "a point mass has the upper end" if sample.density == "point" else "no density"
        row |= {"kl_from": None, "kl_to": row["surprisal"], "kl_by": f"bounds: {point}"}
        if pool is not None:
            row["kl_from"] = estimates.least_kl(sample.values["rewards"], pool.values["rewards"])
    return row | {"flops": sample.flops, "training_flops": sample.training_flops or None}


def _weighted_line(
    label: str, curve: str, beta: float | None, pool: Sample, weights: Tensor, kl: Tensor | None
) -> Row:
    row: Row = {"law": label, "curve": curve, "beta": beta, "at": None}
    row |= {"problems": len(pool.problems), "samples": pool.values["rewards"].shape[1]}
    means = {"accuracy": "correct", "reward": "rewards", "gold_reward": "gold", "surprisal": "surprisal"}
    for name, key in means.items():
        row |= _interval(name, (weights * pool.values[key]).sum(1))
    return row if kl is None else row | _interval("kl", kl)


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
    """Two laws on the same problems: are they the same law, and which is better?"""
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
