"""Several alignments side by side: variants of the options, each with several seeds, and their learning curves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nabla_rl.alignment.aligner import EVALUATIONS
from nabla_rl.report.learning_curves import Run
from nabla_rl.run_folder import flatten
from nabla_rl.types import UserError


@dataclass(frozen=True)
class CurvesOptions:
    """Learning curves: what several settings are worth at the same cost."""

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is compared: label → options of --model in dotted form. Empty: one ordinary run."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every variant is trained with each of them."""

    def __post_init__(self) -> None:
        """Check the values in the spelling of the command line."""
        for label in self.variants:
            if not re.fullmatch(r"\w[\w.+-]*", label):
                raise UserError(
                    f"--curves.variants: expected a label of letters, digits and _.+-, found {label!r}. It names a "
                    "folder."
                )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--curves.seeds: expected a list of different seeds, found {self.seeds}.")


@dataclass(frozen=True)
class Cell:
    """One variant with one seed: an alignment of its own, in a folder of its own."""

    label: str
    seed: int
    folder: Path
    arguments: list[str]


def build_cells(options: CurvesOptions, arguments: Sequence[str], folder: Path) -> list[Cell]:
    """One for each variant and seed: the study's own command line with a few more options after it."""
    return [
        Cell(
            label,
            seed,
            place := folder / label / f"seed{seed}",
            [*arguments, *_as_arguments(variant), f"--seed={seed}", f"--run_dir={place}"],
        )
        for label, variant in options.variants.items()
        for seed in options.seeds
    ]


def _as_arguments(variant: Mapping[str, Any]) -> list[str]:
    return [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in flatten(variant).items()
    ]


def run_cells(cells: Sequence[Cell], run: Callable[[list[str]], int], say: Callable[[str], None]) -> None:
    """Train what is not finished, one after the other."""
    for number, cell in enumerate(cells, start=1):
        if (cell.folder / "summary.json").is_file():
            continue
        say(f"run {number} of {len(cells)}: {cell.label}, seed {cell.seed}")
        with of_variant(cell):
            run(cell.arguments)


def check_cells(cells: Sequence[Cell], build: Callable[[list[str]], Any]) -> None:
    """Refuse options that a variant cannot have, before anything is trained."""
    for cell in {cell.label: cell for cell in cells}.values():
        with of_variant(cell):
            build(cell.arguments)


@contextmanager
def of_variant(cell: Cell) -> Iterator[None]:
    """Within, an error says which variant it is of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--curves.variants.{cell.label}: {error}") from error


def read_cells(cells: Sequence[Cell]) -> dict[str, dict[int, Run]]:
    """The points of all finished runs, by label and seed."""
    results: dict[str, dict[int, Run]] = {}
    for cell in cells:
        if (cell.folder / "summary.json").is_file():
            results.setdefault(cell.label, {})[cell.seed] = read_run(cell.folder)
    return results


def read_run(folder: Path) -> list[dict[str, Any]]:
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
