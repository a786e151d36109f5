"""Trainings as studies do them: options become modules and data, and the pipelines of the verbs do the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nabla_rl.adapters.config import AdapterConfig
from nabla_rl.adapters.run import Engine, build_trainer, check_logger
from nabla_rl.adapters.snapshots import AdapterSnapshots
from nabla_rl.alignment import pipeline as alignment
from nabla_rl.alignment.aligner import PolicyAligner
from nabla_rl.alignment.data import AlignmentData
from nabla_rl.decoding import DECODERS
from nabla_rl.distillation import pipeline as distillation
from nabla_rl.distillation.data import DistillationData
from nabla_rl.distillation.distiller import PolicyDistiller
from nabla_rl.distillation.rows import read_results
from nabla_rl.report.rows import Row
from nabla_rl.studies.base import Options, Watch
from nabla_rl.studies.jobs import EMBEDDED
from nabla_rl.studies.options import OptionReader
from nabla_rl.types import UserError

SECTIONS = {"align": ("model", "data", "engine"), "distill": ("model", "data", "teacher", "engine")}
"""How the options of each training begin."""
FAMILY = "sorting"
"""The family of problems of a training that names none."""


@dataclass(frozen=True)
class Training:
    """What is trained on what; no model is loaded for it.

    Attributes:
        module: What trains.
        data: The problems.
        teacher: Who answers them, for a distillation.
        engine: Who trains: this package, or TRL.
        config: Everything that decides the results, as plain values.
    """

    module: Any
    data: Any
    teacher: Any
    engine: Engine
    config: Row


@cache
def align_reader() -> OptionReader:
    """The reader of alignment's options."""
    searches = {f"model.{name}": kind for name, kind in DECODERS.items()}
    defaults = {f"model.{name}": value for name, value in EMBEDDED.items()}
    parts = {"model": PolicyAligner, "data": AlignmentData}
    return OptionReader("align", {**parts, **searches}, {"engine": (Engine, "lightning")}, defaults)


@cache
def distill_reader() -> OptionReader:
    """The reader of distillation's options."""
    parts = {"model": PolicyDistiller, "data": DistillationData, "teacher": distillation.Teacher}
    decoders = {f"teacher.{name}": kind for name, kind in DECODERS.items()}
    defaults = {f"teacher.{name}": value for name, value in EMBEDDED.items()}
    defaults |= {"teacher.decoders": ["edit_search"], "model.policy.name": EMBEDDED["policy.name"]}
    return OptionReader("distill", {**parts, **decoders}, {"engine": (Engine, "lightning")}, defaults)


def read_align(options: Options, *, seed: int) -> Training:
    """The alignment that the options describe, by the names of `nabla-rl align`."""
    family = options.get("data.family", FAMILY)
    return _read(align_reader(), options, {"model.family": family, "model.seed": seed, "data.seed": seed}, seed)


def read_distill(options: Options, *, seed: int) -> Training:
    """The distillation that the options describe, by the names of `nabla-rl distill`."""
    family = options.get("data.family", FAMILY)
    tied = {f"{section}.{name}": value for section in ("model", "teacher") for name, value in
            (("family", family), ("seed", seed))}  # fmt: skip
    tied |= {"data.seed": seed, "model.max_completion_length": options.get("teacher.sampling.max_new_tokens")}
    return _read(distill_reader(), options, tied, seed)


def _read(reader: OptionReader, options: Options, tied: Mapping[str, Any], seed: int) -> Training:
    """The objects, with what is said in one place only wherever it is needed."""
    parsed = reader.parse(options | Options(tied))
    built, plain = reader.build(parsed, options), reader.plain(parsed)
    settings: AdapterConfig = built.model.settings
    with options.placing():
        check_logger(settings.report_to, settings.section)
    teacher = getattr(built, "teacher", None)
    return Training(built.model, built.data, teacher, built.engine, {"seed": seed, **plain})


def align(training: Training, folder: Path, snapshots: Sequence[int], watch: Watch) -> Row:
    """Align, or read what is finished; the summary."""
    done = alignment.read_finished(folder, training.config)
    if done is None:
        trainer = build_trainer(training.module.settings)
        done = alignment.train(
            training.module, training.data, trainer, folder, training.config, engine=training.engine,
            callbacks=callbacks(snapshots),
        )  # fmt: skip
    return done.summary


def distill(training: Training, folder: Path, snapshots: Sequence[int], watch: Watch) -> Row:
    """Distil, or read what is finished; the summary."""
    done = distillation.read_finished(folder, training.config)
    if done is None:
        done = distillation.Distillation(
            training.module, training.data, build_trainer(training.module.settings), folder, training.config,
            teacher=training.teacher, engine=training.engine, callbacks=callbacks(snapshots),
            watch=lambda what, made, total: watch.step(made, total, f"decoding: {what}"),
        ).run()  # fmt: skip
    return done.summary


def callbacks(snapshots: Sequence[int]) -> list[Any]:
    """What keeps the adapter along the training."""
    return [AdapterSnapshots(snapshots)] if snapshots else []


READERS: dict[str, Callable[..., Training]] = {"align": read_align, "distill": read_distill}
TRAININGS: dict[str, Callable[..., Row]] = {"align": align, "distill": distill}
"""Every training by its verb."""


def train(
    command: str,
    options: Options,
    *,
    seed: int,
    folder: Path,
    snapshots: Sequence[int] = (),
    watch: Watch | None = None,
) -> Row:
    """Train in a folder, or read what is finished there; the summary.

    Raises:
        UserError: An option cannot be used, or the folder holds a training with other options.
    """
    training = READERS[command](options, seed=seed)
    with options.placing():
        return TRAININGS[command](training, folder, snapshots, watch or Watch())


def right_answers(folder: Path, decoder: str) -> dict[str, bool]:
    """Problem → whether the decoder's answer is right, for problems whose answer is known."""
    rows = read_results([folder], decoder)
    return {row["id"]: row["correct"] for row in rows if row["correct"] is not None}


def check_command(command: Any, place: str) -> None:
    """Refuse a training that there is not."""
    if command not in TRAININGS:
        raise UserError(place, f"one of {', '.join(TRAININGS)}", repr(command))
