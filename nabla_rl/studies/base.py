"""Studies: what is varied, what a point of it does, and what all points together say.

Every study file speaks one language:

    study: decode                                   # the kind
    seeds: [0, 1]                                   # every point is run with each of them
    grid: {model.beta: [0.3, 1.0]}                  # every combination of these values is a point
    fixed: {data.limit: 200, data.split: validation}
    variants:                                       # so is every label, within each combination of the grid
      eight rollouts: {model.edit_search.max_rollouts: 8}

A name with a dot is an option of the verb that the study is about, spelled as that verb spells it. A name without a
dot is a word of the study itself, such as `decoder` or `seeds`. Variants win over the grid, and the grid over `fixed`.
"""

from __future__ import annotations

import itertools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from nabla_rl.report.rows import Report, Row
from nabla_rl.run_folder import RunFolder, flatten
from nabla_rl.types import UserError

VARIANT = "variant"
"""The name under which a point holds the label of its variant."""


@dataclass(frozen=True)
class Point:
    """One setting of everything that varies."""

    values: Mapping[str, Any]
    seed: int

    @property
    def id(self) -> str:
        """Its name, which is also a folder's."""
        words = [f"{name.rpartition('.')[2]}={value}" for name, value in self.values.items()]
        return "_".join([*words, f"seed={self.seed}"]).replace("/", "-").replace(" ", "")

    @property
    def label(self) -> str:
        """The label of its variant; empty where there are none."""
        return str(self.values.get(VARIANT, ""))


class Options(Mapping[str, Any]):
    """Dotted options of a verb, with the place in the study file that each comes from.

    Args:
        values: The options; nested mappings are dotted names too.
        section: Where they stand, such as `fixed`; empty where nobody has written them.
    """

    def __init__(self, values: Mapping[str, Any], section: str = ""):
        self._values = flatten(values)
        self._places = {name: f"{section}.{name}" if section else name for name in self._values}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __or__(self, other: Options) -> Options:
        """Both, where the other one wins."""
        both = Options({})
        both._values, both._places = {**self._values, **other._values}, {**self._places, **other._places}
        return both

    def place(self, name: str) -> str:
        """Where a setting was written, by its full name or by the end of it; the name itself where nowhere."""
        known = next((given for given in self if given == name or given.endswith(f".{name}")), None)
        return name if known is None else self._places[known]

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Within, errors of settings say where in the study file the setting stands."""
        try:
            yield
        except UserError as error:
            raise error.renamed(self.place) from error


@dataclass(frozen=True)
class Design:
    """What a study file says about what varies.

    Attributes:
        seeds: Every point is run with each of them.
        grid: Dotted options, each with a list of values.
        fixed: Dotted options that all points share.
        variants: Label → dotted options and words of the study.
        defaults: Verb → dotted options where a study says nothing, such as a shipped file's.
    """

    seeds: Sequence[int] = (0,)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """Every combination of the grid's values and variants, for every seed; the last name varies fastest."""
        grid = {**self.grid, **({VARIANT: list(self.variants)} if self.variants else {})}
        if not grid:
            raise UserError("grid", "dotted names and lists of their values", "none", "See configs/ablate/.")
        for name, values in grid.items():
            if not isinstance(values, (list, tuple)) or not values:
                raise UserError("grid", f"a list of values for {name}", repr(values), "Write [a, b].")
        self.check_seeds()
        combinations = itertools.product(*grid.values())
        points = [Point(dict(zip(grid, values, strict=True)), seed) for values in combinations for seed in self.seeds]
        twice = next((p.id for k, p in enumerate(points) if any(p.id == q.id for q in points[:k])), None)
        if twice is not None:
            raise UserError("grid", "values that differ", f"{twice} twice")
        return points

    def labelled_points(self, kind: str) -> list[Point]:
        """A point for every variant and seed, where the label names a folder and a grid has no place."""
        if self.grid:
            raise UserError("grid", f"none with a {kind} study", ", ".join(self.grid), "Use {variants}.")
        if not self.variants:
            raise UserError("variants", f"labels and their options for a {kind} study", "none", "See configs/ablate/.")
        for label in self.variants:
            check_label(label)
        return self.points()

    def plain(self) -> Row:
        """What the study file says, as plain values."""
        variants = {label: flatten(given) for label, given in self.variants.items()}
        sections = {"seeds": list(self.seeds), "grid": dict(self.grid), "fixed": flatten(self.fixed)}
        return {**sections, "variants": variants}

    def check_seeds(self) -> None:
        """Refuse seeds that make no points, or one point twice."""
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError("seeds", "different whole numbers", str(list(self.seeds)))

    def options(self, point: Point, verb: str) -> Options:
        """The options of a point for a verb, all sections merged."""
        varied = {name: value for name, value in point.values.items() if name != VARIANT}
        return self.shared(verb) | Options(varied, "grid") | self.options_of(point.label)

    def default(self, verb: str) -> Options:
        """What holds where a study says nothing."""
        return Options({name: value for name, value in flatten(self.defaults.get(verb, {})).items() if "." in name})

    def shared(self, verb: str) -> Options:
        """The options of a verb that all points share."""
        return self.default(verb) | Options(self.fixed, "fixed")

    def options_of(self, label: str) -> Options:
        """The options that a variant gives itself."""
        given = flatten(self.variants.get(label, {}))
        return Options({name: value for name, value in given.items() if "." in name}, f"variants.{label}")

    def words(self, label: str, known: Sequence[str]) -> Row:
        """The study's own words of a variant; any beside the known ones is refused."""
        return words_of(self.variants.get(label, {}), known, f"variants.{label}")

    def check_sections(self, allowed: Sequence[str], verb: str) -> None:
        """Refuse names that cannot be options of a verb, before any is read."""
        for where, names in (("fixed", flatten(self.fixed)), ("grid", self.grid)):
            for name in names:
                if name.partition(".")[0] not in allowed or "." not in name:
                    raise UserError(
                        f"{where}.{name}", f"a dotted option of {verb} ({', '.join(f'{a}.…' for a in allowed)})", name
                    )
        both = next((name for name in flatten(self.fixed) if name in self.grid), None)
        if both is not None:
            raise UserError(f"fixed.{both}", "an option that the grid does not vary", both)


def words_of(given: Mapping[str, Any], known: Sequence[str], where: str) -> Row:
    """The names without a dot of a mapping; any beside the known ones is refused."""
    words = {name: value for name, value in given.items() if "." not in name and not isinstance(value, Mapping)}
    unknown = next((name for name in words if name not in known), None)
    if unknown is not None:
        expected = f"one of {', '.join(known)}, or a dotted option" if known else "a dotted option"
        raise UserError(f"{where}.{unknown}", expected, unknown, guess(unknown, known))
    return words


def guess(name: str, known: Sequence[str]) -> str:
    """Advice about an unknown name: a known one that ends alike or looks alike."""
    alike = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    close = get_close_matches(name, alike or known, 1, 0.0 if alike else 0.6)
    return f"Did you mean {close[0]}?" if close else ""


def check_label(label: str) -> None:
    """Refuse a label that cannot name a folder."""
    if not re.fullmatch(r"\w[\w.+-]*", label):
        raise UserError("variants", "labels of letters, digits and _.+-, as each names a folder", repr(label))


class Watch:
    """Where a study tells what it is doing. This one tells nobody."""

    def begin(self, number: int, total: int, what: str) -> None:
        """A part of the study begins, the `number`-th of `total`."""

    def step(self, done: int, total: int, what: str = "") -> None:
        """Within that part, `done` of `total` steps are made, and the next one is about `what`."""

    def end(self) -> None:
        """The part is done."""


class AbstractStudy(ABC):
    """A kind of study.

    Attributes:
        design: What varies.
        points: Every point, in the order in which they are run.
    """

    design: Design
    points: list[Point]

    @abstractmethod
    def run(self, path: Path, watch: Watch) -> None:
        """Do what is missing in a folder, and write everything down as soon as it is known."""

    @abstractmethod
    def report(self, path: Path) -> Report | None:
        """What is finished says; figures are written under the folder. None where nothing is finished."""


class PointStudy(AbstractStudy):
    """A study that does one point after the other, and has the rows of each in one results.jsonl."""

    folder: RunFolder

    @abstractmethod
    def decisive(self) -> Row:
        """What decides the rows of a point, so that a folder with other results is refused."""

    @abstractmethod
    def run_point(self, point: Point, path: Path, watch: Watch) -> list[Row]:
        """Do one point, with the folder for its own files; rows carry `decoder`, a name that is theirs alone."""

    @abstractmethod
    def report_rows(self, rows: Sequence[Row], path: Path) -> Report:
        """What the rows of all finished points say."""

    def run(self, path: Path, watch: Watch) -> None:
        self.folder = RunFolder(path, self.decisive())
        done = {key for key, _ in self.folder.rows}
        for number, point in enumerate(self.points, start=1):
            if point.id in done:
                continue
            watch.begin(number, len(self.points), point.id)
            rows = self.run_point(point, path, watch)
            self.folder.append([{"id": point.id, "config": self.folder.config_hash, **row} for row in rows])
            watch.end()

    def report(self, path: Path) -> Report | None:
        rows = [row for point in self.points for (key, _), row in self.folder.rows.items() if key == point.id]
        if not rows:
            return None
        report = self.report_rows(rows, path)
        finished = len({row["id"] for row in rows})
        report.summary = {"points": finished, "of": len(self.points), **report.summary}
        report.title = report.title or counted(finished, len(self.points), "points")
        return report


def counted(finished: int, total: int, what: str) -> str:
    """How much of a study a table is about."""
    return f"{total} {what}" if finished == total else f"the {finished} finished of {total} {what}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes on one thread: on small tensors several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start
