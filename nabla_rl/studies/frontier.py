"""The frontier: several decoders on the same problems with several seeds, and their answers at every budget.

Each variant decodes each problem once for each seed, with the largest budget. What it would have answered with less is
read off its curve, so a grid of budgets costs no more than its largest one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import lightning as L
from rich.console import Console

from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.module import Decoding
from nabla_rl.decoding.presets import DecoderName
from nabla_rl.report.frontier import build_frontier, format_frontier, write_frontier
from nabla_rl.run_folder import RunFolder, flatten, write_config
from nabla_rl.types import UserError

SHARED = ("policy", "reward", "gold", "decoders", "family", "seed")
"""Options of the model that all variants have in common."""


@dataclass(frozen=True)
class FrontierOptions:
    """A frontier: what several decoders are worth at several budgets."""

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is compared: label → {decoder: NAME, and options of --model in dotted form; seeds: [some], for a variant
    that is dear, or whose seeds agree}. Empty: an ordinary run."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Every variant decodes with each of them; a decoder without randomness with the first one only."""
    flops: list[float] = field(default_factory=list)
    """Budgets at which answers are read off, FLOPs for each problem. Decoders stop at the largest of them."""
    baseline: str | None = None
    """The variant that every other one is compared with, problem by problem."""

    def __post_init__(self) -> None:
        """Check the values in the spelling of the command line."""
        for label, variant in self.variants.items():
            where = f"frontier.variants.{label}"
            if not re.fullmatch(r"\w[\w.+-]*", label):
                raise UserError(
                    f"{where}: expected a label of letters, digits and _.+-, found {label!r}. It names a folder."
                )
            name, known = variant.get("decoder"), get_args(DecoderName)
            if name not in known:
                raise UserError(f"{where}.decoder: expected one of {', '.join(known)}, found {name!r}.")
            some = variant.get("seeds", self.seeds)
            if not isinstance(some, list) or not some or not set(some) <= set(self.seeds):
                raise UserError(f"{where}.seeds: expected some of frontier.seeds, {self.seeds}, found {some!r}.")
            for option in flatten(variant):
                if option.split(".")[0] in SHARED:
                    raise UserError(
                        f"{where}.{option}: expected an option of the decoder, found one that all variants share. "
                        f"Use --{'seed' if option == 'seed' else f'model.{option}'}."
                    )
        if not self.variants:
            return
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"frontier.seeds: expected a list of different seeds, found {self.seeds}.")
        if not self.flops or min(self.flops) <= 0:
            raise UserError(f"frontier.flops: expected a list of positive budgets, found {self.flops}.")
        if self.baseline is not None and self.baseline not in self.variants:
            raise UserError(
                f"frontier.baseline: expected one of {', '.join(self.variants)}, found {self.baseline!r}. Name a "
                "variant, or null for no comparison."
            )


@dataclass(frozen=True)
class Cell:
    """One variant with one seed: a decoding of its own, which fills a run folder of its own."""

    label: str
    seed: int
    module: Decoding
    config: dict[str, Any]

    @property
    def decoder(self) -> str:
        """The one decoder that it runs."""
        return self.module.decoder_names[0]

    @property
    def folder(self) -> RunFolder:
        """Its results."""
        assert self.module.run_folder is not None
        return self.module.run_folder


class Frontier(L.LightningModule):
    """Decodes every batch of problems with every cell, so that an interrupted run has compared what it has done."""

    def __init__(self, cells: Sequence[Cell]):
        super().__init__()
        self.cells = cells
        self.on_cell: Callable[[Cell], None] = lambda cell: None

    def on_predict_start(self) -> None:
        """Let the cells see the problems."""
        for cell in self.cells:
            cell.module.trainer = self.trainer

    def transfer_batch_to_device(self, batch: list[Problem], device: Any, dataloader_idx: int) -> list[Problem]:
        """Problems are text: the decoders put what they make of them where the models are."""
        return batch

    def predict_step(self, batch: list[Problem], batch_index: int) -> None:
        """Decode one batch with every cell that has not finished it."""
        for cell in self.cells:
            self.on_cell(cell)
            cell.module.predict_step(batch, batch_index)


def build_cells(
    options: FrontierOptions, variant: Callable[[Sequence[str]], tuple[Decoding, dict[str, Any]]]
) -> list[Cell]:
    """One cell for each variant and seed.

    Args:
        options: the variants, seeds and budgets.
        variant: the decoding, and what decides its results, of the run's options with a few more after them.

    Raises:
        UserError: a variant's option is unknown or has a wrong value.
    """
    cells = []
    for label, overrides in options.variants.items():
        name = overrides["decoder"]
        given = {key: value for key, value in flatten(overrides).items() if key not in ("decoder", "seeds")}
        seeds = overrides.get("seeds", options.seeds)
        most = [] if "budget.flops" in given else [f"--model.budget.flops={max(options.flops)!r}"]
        arguments = [f"--model.decoders=[{name}]", *most, *(as_argument(*pair) for pair in given.items())]
        for seed in seeds:
            try:
                module, config = variant([*arguments, f"--seed={seed}"])
            except UserError as error:
                raise UserError(f"--frontier.variants.{label}: {error}") from error
            module.judge_curve = True
            cells.append(Cell(label, seed, module, cell_config(config, name)))
            if not has_field(module, name, "seed"):
                break
    return cells


def as_argument(name: str, value: Any) -> str:
    """An option of the model as it is written on the command line."""
    return f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}"


def has_field(module: Decoding, name: str, wanted: str) -> bool:
    """Whether a decoder's class has that field."""
    decoder = module.build_decoder(name, lambda text: text)
    return wanted in {entry.name for entry in fields(decoder)}  # pyright: ignore


def cell_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What decides the results of one cell: not the frontier around it, nor the options of other decoders."""
    config = {key: value for key, value in config.items() if key != "frontier"}
    others = set(get_args(DecoderName)) - {name}
    config["model"] = {key: value for key, value in config["model"].items() if key not in others}
    return config


def start_frontier(
    cells: Sequence[Cell],
    folder: Path,
    config: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Frontier:
    """Open the folders of all cells, <folder>/<label>/seed<k>, each with its own configuration.

    So variants, seeds and smaller budgets can be added to a finished frontier, and what a variant's results depend on
    cannot change under them.
    """
    if (folder / "results.jsonl").is_file():
        raise UserError(
            f"--run_dir: expected the folder of a frontier, found an ordinary run in {folder}. Choose another "
            "--run_dir."
        )
    for cell in cells:
        place = folder / cell.label / f"seed{cell.seed}"
        cell.module.run_folder = RunFolder(place, cell.config, rank=rank, world_size=world_size)
    if rank == 0:
        write_config(folder, config)
    return Frontier(cells)


def finish_frontier(
    module: Frontier, options: FrontierOptions, data: ProblemData, folder: Path, console: Console
) -> dict[str, Any]:
    """Merge the results and write the frontier; print its table.

    Of a run that ended early it has the problems that every cell has finished.
    """
    ids = [problem.id for problem in data.problems]
    for cell in module.cells:
        cell.folder.merge(ids, cell.module.decoder_names)
    finished = [key for key in ids if all((key, cell.decoder) in cell.folder.rows for cell in module.cells)]
    results: dict[str, dict[int, list[dict]]] = {label: {} for label in options.variants}
    for cell in module.cells:
        results[cell.label][cell.seed] = [cell.folder.rows[key, cell.decoder] for key in finished]
    frontier = build_frontier(results, options.flops, options.baseline)
    where = data.path or f"{data.family.name}, {data.split} split"
    total = len(ids)
    count = f"{total} problems" if len(finished) == total else f"the {len(finished)} finished of {total} problems"
    title = f"{count} ({where}), seeds {', '.join(map(str, options.seeds))}; costs per problem"
    names = write_frontier(folder, frontier, title)
    console.print(format_frontier(frontier, title=title))
    console.print(f"results in {folder}/ ({', '.join(names)})", highlight=False)
    return frontier
