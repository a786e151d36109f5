"""Both sides on problems whose answers cannot be listed: distributions of completions, measured on samples.

A point is one distribution (a `Source`): the policy, an adapter that alignment or distillation has trained, or a
decoder. Its completions are drawn and judged once and written down; every figure and table comes from those lines. The
policy's own point, with many samples, is the pool from which best-of-n and the tilted policies are derived without
drawing anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from nabla_rl.adapters.snapshots import snapshot_folder
from nabla_rl.report.rows import Report, Row, finite
from nabla_rl.run_folder import flatten
from nabla_rl.studies.base import Design, Options, Point, PointStudy, Watch, one_thread, words_of
from nabla_rl.studies.jobs import SECTIONS, Decoding, Models, read_decoding
from nabla_rl.studies.laws import Sample, best_of, compare, describe, features_of, few, sample_of, tilt
from nabla_rl.studies.sources import Source, draw, judge
from nabla_rl.studies.trainings import READERS, check_command, train
from nabla_rl.types import UserError

POOL = "policy"
"""The curve whose point is the pool."""
POOL_SIZE = 16
"""Samples of the policy at least, for best-of-n and tilted policies to be derived."""
DERIVED = ("tilted, β = ", "best of ")
"""How the labels begin of distributions that are reweightings of the pool."""
SHOWN = (
    *("family", "distribution", "accuracy", "reward", "gold_reward", "kl", "kl_from", "kl_to", "flops"),
    *("first", "second", "reward_correlation", "overlap", "same_answer", "probe_accuracy", "probe_p", "gold_wins"),
)
"""Columns of the terminal's tables."""
ADAPTER_WORDS = ("command", "snapshots")
"""What an adapter says to the study: which training it is, and after which steps it is kept."""


def pool_of(samples: Mapping[str, Sample]) -> Sample | None:
    """The policy's own sample, where it is large enough."""
    found = (s for s in samples.values() if s.curve == POOL and s.values["rewards"].shape[1] >= POOL_SIZE)
    return next(found, None)


@dataclass
class Measured(PointStudy):
    """Distributions on samples, against the policy and against each other.

    Attributes:
        design: Variants, whose words are the fields of a `Source`; the grid is over `data.family` alone.
        adapters: Name → `command` (align or distill), `snapshots` (steps after which the adapter is kept) and options.
        pairs: Labels of two distributions that are compared; those of `DERIVED` come from the policy's pool.
        adapters_dir: Where trained adapters are.
    """

    design: Design
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pairs: Sequence[Sequence[str]] = ()
    adapters_dir: Path = Path("runs/ablate/adapters")
    models: Models = field(default_factory=lambda: Models(torch.device("cpu")))

    def __post_init__(self) -> None:
        """Refuse distributions that cannot be drawn from, before any is."""
        design = self.design
        if list(design.grid) != ["data.family"]:
            raise UserError("grid", "data.family alone for a measured study", str(list(design.grid)))
        design.check_sections(SECTIONS, "decode")
        self.points = design.points()
        for name, adapter in self.adapters.items():
            command = words_of(adapter, ADAPTER_WORDS, f"adapters.{name}").get("command")
            check_command(command, f"adapters.{name}.command")
        for label in design.variants:
            source = self.source(label)
            if source.adapter is not None and source.adapter not in self.adapters:
                raise UserError(f"variants.{label}.adapter", "one of {adapters}", repr(source.adapter))
            kept = self.adapters.get(source.adapter or "", {}).get("snapshots", [])
            if source.step is not None and source.step not in kept:
                raise UserError(f"variants.{label}.step", f"a step among {kept}", str(source.step))
        for pair in self.pairs:
            known = [label in design.variants or label.startswith(DERIVED) for label in pair]
            if len(pair) != 2 or not all(known):
                raise UserError(
                    "pairs", "two labels of {variants}, `tilted, β = x` or `best of n by reward`", str(list(pair))
                )
        for point in {point.label: point for point in self.points}.values():
            self.decoding(point)
        for family in design.grid["data.family"]:
            for name in self.adapters:
                READERS[self.adapters[name]["command"]](self.adapter_options(name, str(family)), seed=0)

    def source(self, label: str) -> Source:
        """The distribution of that name."""
        known = [entry.name for entry in fields(Source)]
        words = self.design.words(label, known)
        if "curve" not in words:
            raise UserError(f"variants.{label}.curve", "the line of a figure", "none")
        try:
            return Source(**words)
        except UserError as error:
            raise error.within(f"variants.{label}") from error

    def definition(self, label: str) -> Row:
        """Everything that decides what the distribution of that name is, as plain values; what is left at its default
        is not told, so that a new field changes nothing."""
        source = self.source(label)
        told = {n: v for n, v in vars(source).items() if v != getattr(Source(source.curve), n) or n == "curve"}
        told["options"] = dict(self.design.options_of(label))
        return finite({**told, "adapter": flatten(self.adapters[source.adapter]) if source.adapter else None})

    def decisive(self) -> Row:
        return {"study": "measured", "fixed": flatten(self.design.fixed)}

    # A point

    def decoding(self, point: Point, adapter: Path | None = None) -> Decoding:
        """What a point decodes, and how."""
        source = self.source(point.label)
        options = self.design.options(point, "decode")
        if source.beta is not None and "model.beta" not in self.design.options_of(point.label):
            options = options | Options({"model.beta": source.beta}, f"variants.{point.label}")
        if adapter is not None:
            options = options | Options({"model.policy.adapter": str(adapter)})
        seed = point.seed if source.seed is None else source.seed
        return read_decoding(options, seed=seed, decoders=source.decoders)

    def run_point(self, point: Point, path: Path, watch: Watch) -> list[Row]:
        source = self.source(point.label)
        training, adapter = self._adapter(source, str(point.values["data.family"]), point.seed, watch)
        decoding = self.decoding(point, adapter)
        problems = decoding.data.problems
        watch.step(0, 2, f"{source.samples} completions of {len(problems)} problems")
        with one_thread():
            job = self.models.job(decoding)
            reference = self.models.policy(replace(decoding.policy, adapter=None))
            drawn = draw(source, decoding, job)
            watch.step(1, 2, "judging them")
            found = judge(drawn, job, reference, problems)
        return [
            {
                "decoder": point.label,
                "values": dict(point.values),
                "seed": point.seed,
                "problems": [problem.id for problem in problems],
                "training_flops": training,
                "source": self.definition(point.label),
                **found,
            }
        ]

    def adapter_options(self, name: str, family: str) -> Options:
        """The options of the training of an adapter."""
        given = {key: value for key, value in flatten(self.adapters[name]).items() if key not in ADAPTER_WORDS}
        options = self.design.default(self.adapters[name]["command"]) | Options(given, f"adapters.{name}")
        return options | Options({"data.family": family}, "grid")

    def _adapter(self, source: Source, family: str, seed: int, watch: Watch) -> tuple[float, Path | None]:
        """What training the source's adapter has cost, and its folder; it is trained where that was not done yet.

        A finished folder is handed to the training too, which refuses it if it is of other options than the study's.
        """
        if source.adapter is None:
            return 0.0, None
        words = words_of(self.adapters[source.adapter], ADAPTER_WORDS, f"adapters.{source.adapter}")
        run_dir = self.adapters_dir / f"{source.adapter}_{family}_seed={seed}"
        watch.step(0, 1, f"training the adapter {source.adapter}")
        try:
            summary = train(
                words["command"], self.adapter_options(source.adapter, family), seed=seed, folder=run_dir,
                snapshots=words.get("snapshots", ()), watch=watch,
            )  # fmt: skip
        except UserError as error:
            raise error.renamed(lambda name: "adapters_dir" if name in ("run_dir", "folder") else name) from error
        folder = run_dir / "adapter" if source.step is None else snapshot_folder(run_dir, source.step)
        return training_flops(summary), folder

    # All points

    def report_rows(self, rows: Sequence[Row], path: Path) -> Report:
        from nabla_rl.report.laws import write_measured_figures

        table: list[Row] = []
        pairs: list[Row] = []
        for family in dict.fromkeys(row["values"]["data.family"] for row in rows):
            samples = self.samples([row for row in rows if row["values"]["data.family"] == family])
            pool = pool_of(samples)
            table += [{"family": family, **describe(sample, pool)} for sample in samples.values()]
            pairs += [{"family": family, **line} for line in self._pairs(samples, str(family))]
        figures = write_measured_figures(table, path / "figures")
        tables = [("Two distributions on the same problems", pairs)] if pairs else []
        return Report(table, figures=figures, tables=tables, shown=SHOWN)

    def samples(self, rows: Sequence[Row]) -> dict[str, Sample]:
        """The distributions that were drawn from, and those that are reweightings of the policy's pool, by label."""
        found: dict[str, Sample] = {}
        for label in dict.fromkeys(row["decoder"] for row in rows):
            mine, source = [row for row in rows if row["decoder"] == label], self.source(label)
            if mine[0]["source"] != self.definition(label):
                raise UserError(
                    "run_dir", f"results of {label!r} as it is defined now", "those of another definition",
                    "Give the new one another label, or choose another {run_dir}.",
                )  # fmt: skip
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
        shared = self.design.shared("decode") | Options({"data.family": family}, "grid")
        decoding = read_decoding(shared, seed=0, decoders=["sample"])
        policy = self.models.policy(replace(decoding.policy, adapter=None))
        compared = {label: few(samples[label]) for pair in chosen for label in pair}
        seen = {label: features_of(sample, policy, decoding.data.problems) for label, sample in compared.items()}
        return [compare(compared[a], compared[b], seen[a], seen[b]) for a, b in chosen]


def training_flops(summary: Mapping[str, Any]) -> float:
    """What a training has cost, with the data that it was made of."""
    if "flops" in summary:
        return summary["flops"]
    made = summary["data"]
    return summary["training"]["flops"] + made["decode_flops"] + made["target_flops"]
