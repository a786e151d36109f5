"""Learning curves of alignment: variants of its options, each with several seeds, at the same cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nabla_rl.report.learning_curves import build_curves, format_curves, write_curves
from nabla_rl.report.rows import Report, Row
from nabla_rl.run_folder import write_config
from nabla_rl.studies.base import AbstractStudy, Design, Point, Watch
from nabla_rl.studies.trainings import SECTIONS, read_align, train
from nabla_rl.types import UserError

EVALUATIONS = "evaluations.jsonl"
"""What an alignment measures on held-out problems while it trains."""


@dataclass
class Curves(AbstractStudy):
    """An alignment for every variant and seed, each in a folder of its own, and their held-out figures by cost."""

    design: Design

    def __post_init__(self) -> None:
        """Refuse options that a variant cannot have, before anything is trained."""
        self.points = self.design.labelled_points("curves")
        self.design.check_sections(SECTIONS["align"], "align")
        for label in self.design.variants:
            self.design.words(label, ())
        for point in {point.label: point for point in self.points}.values():
            read_align(self.design.options(point, "align"), seed=point.seed)

    def run(self, path: Path, watch: Watch) -> None:
        if (path / "results.jsonl").is_file():
            raise UserError("run_dir", "the folder of curves", f"another run in {path}", "Choose another {run_dir}.")
        write_config(path, {"study": "curves", **self.design.plain()})
        for number, point in enumerate(self.points, start=1):
            folder = folder_of(path, point)
            done = (folder / "summary.json").is_file()
            if not done:
                watch.begin(number, len(self.points), f"{point.label}, seed {point.seed}")
            # a finished folder is handed over too, which is refused where it is of other options
            train("align", self.design.options(point, "align"), seed=point.seed, folder=folder, watch=watch)
            if not done:
                watch.end()

    def report(self, path: Path) -> Report | None:
        results: dict[str, dict[int, list[Row]]] = {}
        for point in self.points:
            if (folder_of(path, point) / "summary.json").is_file():
                results.setdefault(point.label, {})[point.seed] = read_run(folder_of(path, point))
        if not results:
            return None
        finished = sum(len(runs) for runs in results.values())
        data = read_align(self.design.options(self.points[0], "align"), seed=0).data
        seeds = ", ".join(map(str, self.design.seeds))
        title = f"{len(data.held_out)} held-out problems ({data.family.name}), seeds {seeds}"
        curves = build_curves(results)
        files = write_curves(path, curves, title)
        return Report(
            curves["rows"], files=files, printed=format_curves(curves, title=title), title=title,
            summary={"points": finished, "of": len(self.points)},
        )  # fmt: skip


def folder_of(path: Path, point: Point) -> Path:
    """The folder of one alignment."""
    return path / point.label / f"seed{point.seed}"


def read_run(folder: Path) -> list[Row]:
    """A run's evaluations in order; without any, the figures before and after it."""
    file = folder / EVALUATIONS
    if file.is_file():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = summary["steps"] or summary["stopped_at"]
    return [
        {"step": 0, "flops": 0.0, **summary["before"]},
        {"step": steps, "flops": summary["flops"], **summary["after"]},
    ]
