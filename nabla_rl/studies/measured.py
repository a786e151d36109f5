"""Both sides on problems whose answers cannot be listed: laws of completions, measured on samples, pair by pair.

A point is one law (a `Source`): the policy, an adapter that alignment or distillation has trained, or a decoder. Its
completions are drawn and judged once and written down; every figure and table comes from those lines. The policy's own
point, with many samples, is the pool from which best-of-n and the tilted policies are derived without drawing anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from nabla_rl.adapters.snapshots import snapshot_folder
from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.models.loading import PolicyOptions, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.studies.base import (
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
from nabla_rl.studies.laws import Sample, best_of, compare, describe, features_of, few, sample_of, tilt
from nabla_rl.studies.sources import Source, draw, judge
from nabla_rl.types import UserError

POOL = "policy"
"""The curve whose point is the pool."""
POOL_SIZE = 16
"""Samples of the policy at least, for best-of-n and tilted policies to be derived."""
DERIVED = ("tilted, β = ", "best of ")
"""How the labels of laws begin that are reweightings of the pool."""
SHOWN = (
    *("family", "law", "accuracy", "reward", "gold_reward", "kl", "kl_from", "kl_to", "flops"),
    *("first", "second", "reward_correlation", "overlap", "same_answer", "probe_accuracy", "probe_p", "gold_wins"),
)
"""Columns of the terminal's tables."""
SNAPSHOTS = "nabla_rl.adapters.snapshots.AdapterSnapshots"


def pool_of(samples: Mapping[str, Sample]) -> Sample | None:
    """The policy's own sample, where it is large enough."""
    found = (s for s in samples.values() if s.curve == POOL and s.values["rewards"].shape[1] >= POOL_SIZE)
    return next(found, None)


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
    """Labels of two laws that are held against each other; those of `DERIVED` come from the policy's pool."""
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
            known = [label in self.variants or label.startswith(DERIVED) for label in pair]
            if len(pair) != 2 or not all(known):
                raise UserError(
                    "--pairs: expected two labels of --variants, `tilted, β = x` or `best of n by reward`, found "
                    f"{list(pair)}."
                )

    def definition(self, label: str) -> dict[str, Any]:
        """Everything that decides what the law of that name is, as plain values; what is left at its default is not
        told, so that a new field changes no law."""
        source = self.source(label)
        told = {n: v for n, v in vars(source).items() if v != getattr(Source(source.curve), n) or n == "curve"}
        return finite({**told, "adapter": self.adapters[source.adapter] if source.adapter else None})

    # A point

    def run(self, point: Point, folder: Path) -> list[Row]:
        from nabla_rl.cli.decode import read_options

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
        """What training the source's adapter has cost, and its folder; it is trained where that was not done yet.

        A finished folder is handed to the command, too, which refuses it if it is of other options than the study's.
        """
        if source.adapter is None:
            return 0.0, None
        options = dict(self.adapters[source.adapter])
        command, steps = options.pop("command"), options.pop("snapshots", [])
        run_dir = self.adapters_dir / f"{source.adapter}_{family}_seed={seed}"
        options |= {"data.family": family, "seed": seed, "run_dir": str(run_dir)}
        if steps:
            options["trainer.callbacks"] = [{"class_path": SNAPSHOTS, "init_args": {"steps": list(steps)}}]
        arguments = [text for name, value in options.items() for text in (f"--{name}", as_text(value))]
        try:
            with silently():
                COMMANDS[command](arguments)
        except UserError as error:
            raise UserError(str(error).replace("--run_dir", "--adapters_dir")) from error
        found = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        if "flops" in found:
            flops = found["flops"]
        else:
            flops = found["training"]["flops"] + found["data"]["decode_flops"] + found["data"]["target_flops"]
        folder = run_dir / "adapter" if source.step is None else snapshot_folder(run_dir, source.step)
        return flops, folder

    # All points

    def report(self, rows: Sequence[Row], folder: Path) -> Report:
        from nabla_rl.report.laws import write_measured_figures

        table: list[Row] = []
        pairs: list[Row] = []
        for family in dict.fromkeys(row["values"]["data.family"] for row in rows):
            samples = self.samples([row for row in rows if row["values"]["data.family"] == family])
            pool = pool_of(samples)
            table += [{"family": family, **describe(sample, pool)} for sample in samples.values()]
            pairs += [{"family": family, **line} for line in self._pairs(samples, str(family))]
        figures = write_measured_figures(table, folder / "figures")
        tables = [("Two laws on the same problems", pairs)] if pairs else []
        return Report(table, figures=figures, tables=tables, shown=SHOWN)

    def samples(self, rows: Sequence[Row]) -> dict[str, Sample]:
        """The laws that were drawn from, and those that are reweightings of the policy's pool, by label."""
        found: dict[str, Sample] = {}
        for label in dict.fromkeys(row["decoder"] for row in rows):
            mine, source = [row for row in rows if row["decoder"] == label], self.source(label)
            if mine[0]["source"] != self.definition(label):
                raise UserError(
                    f"--run_dir: expected {label!r} to be the law that its results are of, found another definition "
                    "now. Give the new one another label, or choose another --run_dir."
                )
            sample = sample_of(label, source, mine)
            if source.tilt is not None:
                sample = tilt(sample, source.tilt, label=label, curve=source.curve, beta=source.beta)
            found[label] = sample
        pool = pool_of(found)
        if pool is not None:
            betas = sorted({s.beta for s in found.values() if s.beta is not None}, reverse=True)
            tilted = [tilt(pool, beta, label=f"tilted, β = {beta:g}", curve="tilted", beta=beta) for beta in betas]
            found |= {sample.label: sample for sample in [*tilted, *best_of(pool)]}
        return found

    def _pairs(self, samples: Mapping[str, Sample], family: str) -> list[Row]:
        chosen = [pair for pair in self.pairs if all(label in samples for label in pair)]
        if not chosen:
            return []
        policy, problems = self._reference(family)
        compared = {label: few(samples[label]) for pair in chosen for label in pair}
        seen = {label: features_of(sample, policy, problems) for label, sample in compared.items()}
        return [compare(compared[a], compared[b], seen[a], seen[b]) for a, b in chosen]

    def _reference(self, family: str) -> tuple[Policy, list[Problem]]:
        """The policy that all laws are held to, and the problems."""
        from nabla_rl.cli.decode import read_options

        cli = read_options(self.arguments(Source(POOL), family, 0, None))
        options: PolicyOptions = cli.model.options["policy"]
        data: ProblemData = cli.datamodule
        return load_policy(options, family=family, device=torch.device("cpu")), data.problems


def _align(arguments: list[str]) -> int:
    from nabla_rl.cli.align import main

    return main(arguments)


def _distill(arguments: list[str]) -> int:
    from nabla_rl.cli.distill import main

    return main(arguments)


COMMANDS = {"align": _align, "distill": _distill}
