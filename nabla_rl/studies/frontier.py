"""The frontier: several decoders on the same problems with several seeds, and their answers at every budget.

Each variant decodes each problem once for each seed, with the largest budget. What it would have answered with less is
read off its curve, so a list of budgets costs no more than its largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nabla_rl.decoding.run import batches, check_same_problems
from nabla_rl.report.frontier import build_frontier, format_frontier, joined_rows, write_frontier
from nabla_rl.report.rows import Report, Row
from nabla_rl.run_folder import RunFolder, write_config
from nabla_rl.studies.base import VARIANT, AbstractStudy, Design, Options, Point, Watch, counted
from nabla_rl.studies.jobs import SECTIONS, Decoding, Models, decode_batch, read_decoding
from nabla_rl.types import UserError

WORDS = ("decoder", "seeds")
"""What a variant says to the study: which decoder it is, and which of the study's seeds it takes."""
SHARED = ("model.policy", "model.reward", "model.gold", "model.decoders", "data")
"""Options that all variants have in common, since they answer the same problems with the same models."""


@dataclass(frozen=True)
class Cell:
    """One variant with one seed, which fills a run folder of its own."""

    label: str
    seed: int
    decoding: Decoding
    folder: RunFolder

    @property
    def name(self) -> str:
        """What its decoder is called."""
        return self.decoding.decoder.name


@dataclass
class Frontier(AbstractStudy):
    """Accuracy and rewards of decoders at several budgets.

    Attributes:
        design: Variants, each with its `decoder`, and perhaps with some `seeds` of its own.
        flops: Budgets at which answers are read off, in FLOPs for each problem. Decoders stop at the largest of them.
        baseline: The variant that every other one is compared with, problem by problem; None compares nothing.
    """

    design: Design
    flops: Sequence[float] = ()
    baseline: str | None = None
    models: Models = field(default_factory=Models)

    def __post_init__(self) -> None:
        """Refuse variants that cannot be run, before any is."""
        self.design.labelled_points("frontier")
        self.design.check_sections(SECTIONS, "decode")
        if not self.flops or min(self.flops) <= 0:
            raise UserError("flops", "a list of positive budgets", str(list(self.flops)))
        if self.baseline is not None and self.baseline not in self.design.variants:
            raise UserError(
                "baseline", f"one of {', '.join(self.design.variants)}", repr(self.baseline),
                "Name a variant, or null for no comparison.",
            )  # fmt: skip
        decodings = [one for label in self.design.variants for one in self._decodings(label)]
        self.points = [Point({VARIANT: label}, decoding.seed) for label, decoding in decodings]
        self.decodings = [decoding for _, decoding in decodings]
        self.cells: list[Cell] = []

    def _decodings(self, label: str) -> list[tuple[str, Decoding]]:
        """One for each seed of a variant; one alone where the answers do not depend on the seed."""
        words = self.design.words(label, WORDS)
        if not isinstance(words.get("decoder"), str):
            expected = "the name of a decoder, or a class path"
            raise UserError(f"variants.{label}.decoder", expected, repr(words.get("decoder")))
        seeds = words.get("seeds", list(self.design.seeds))
        if not isinstance(seeds, list) or not seeds or not set(seeds) <= set(self.design.seeds):
            expected = f"some of the study's seeds, {list(self.design.seeds)}"
            raise UserError(f"variants.{label}.seeds", expected, repr(seeds))
        for name in self.design.options_of(label):
            if name.startswith(tuple(f"{part}." for part in SHARED)) or name in SHARED:
                expected = "an option of the decoder"
                advice = f"All variants share it: use {{fixed.{name}}}."
                raise UserError(f"variants.{label}.{name}", expected, "one that all variants share", advice)
        first = self.decoding(Point({VARIANT: label}, seeds[0]))
        if first.decoder.is_deterministic(first.sampling):
            seeds = seeds[:1]
        return [(label, first.with_seed(seed)) for seed in seeds]

    def decoding(self, point: Point) -> Decoding:
        """What a point decodes: the decoder of its variant, up to the largest budget."""
        decoder = self.design.words(point.label, WORDS)["decoder"]
        most = Options({"model.budget.flops": float(max(self.flops))})
        options = most | self.design.options(point, "decode")
        try:
            return read_decoding(options, seed=point.seed, decoders=[decoder])
        except UserError as error:
            raise error.renamed(lambda n: f"variants.{point.label}.decoder" if n == "decoders" else n) from error

    def run(self, path: Path, watch: Watch) -> None:
        """Decode every batch of problems with every cell, so that an interrupted run has compared what it has done."""
        if (path / "results.jsonl").is_file():
            raise UserError(
                "run_dir", "the folder of a frontier", f"another run in {path}", "Choose another {run_dir}."
            )
        self.cells = [
            Cell(p.label, p.seed, d, RunFolder(path / p.label / f"seed{p.seed}", d.config))
            for p, d in zip(self.points, self.decodings, strict=True)
        ]
        write_config(path, {"study": "frontier", **self.design.plain(), "flops": list(self.flops),
                            "baseline": self.baseline})  # fmt: skip
        problems = self.decodings[0].data.problems
        for cell in self.cells:
            check_same_problems(cell.folder, problems)
        parts = list(batches(problems, self.decodings[0].data.batch_size))
        if not any(cell.folder.missing([p.id for p in problems], cell.name) for cell in self.cells):
            return
        jobs = [self.models.job(cell.decoding) for cell in self.cells]
        for number, batch in enumerate(parts, start=1):
            ids = [problem.id for problem in batch]
            waiting = [
                (cell, job) for cell, job in zip(self.cells, jobs, strict=True) if cell.folder.missing(ids, cell.name)
            ]
            if not waiting:
                continue
            watch.begin(number, len(parts), f"{len(batch)} problems")
            for done, (cell, job) in enumerate(waiting):
                watch.step(done, len(waiting), f"{cell.label}, seed {cell.seed}")
                decode_batch(job, cell.decoding, cell.folder, batch, judge_curve=True)
            watch.step(len(waiting), len(waiting))
            watch.end()

    def report(self, path: Path) -> Report:
        """The frontier of the problems that every cell has finished."""
        data = self.decodings[0].data
        ids = [problem.id for problem in data.problems]
        for cell in self.cells:
            cell.folder.merge(ids, [cell.name])
        finished = [key for key in ids if all((key, cell.name) in cell.folder.rows for cell in self.cells)]
        results: dict[str, dict[int, list[Row]]] = {label: {} for label in self.design.variants}
        for cell in self.cells:
            results[cell.label][cell.seed] = [cell.folder.rows[key, cell.name] for key in finished]
        frontier = build_frontier(results, self.flops, self.baseline)
        where = data.path or f"{data.family.name}, {data.split} split"
        seeds = ", ".join(map(str, self.design.seeds))
        title = f"{counted(len(finished), len(ids), 'problems')} ({where}), seeds {seeds}; costs per problem"
        files = write_frontier(path, frontier, title)
        return Report(
            joined_rows(frontier), files=files, printed=format_frontier(frontier, title=title), title=title,
            summary={"problems": len(finished), "of": len(ids)},
        )  # fmt: skip
