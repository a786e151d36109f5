"""`nabla-rl ablate`: a study, point by point, and what it found."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nabla_rl.cli import configs
from nabla_rl.cli.base import (
    Complaint,
    before_parsing,
    explain,
    given_configs,
    option_names,
    spell,
    terminable,
    wide_console,
    with_found_configs,
)
from nabla_rl.duality.settings import ExactSettings
from nabla_rl.models.loading import is_embedded, qualified
from nabla_rl.report.grid import claims_table, rows_table, to_csv, to_html
from nabla_rl.report.rows import Report, finite
from nabla_rl.run_folder import as_user_error, flatten, write_atomically
from nabla_rl.studies.base import AbstractStudy, Design, Stopwatch, Watch
from nabla_rl.types import UserError

DEFAULT = "duality_exact"
DESCRIPTION = """Hold gradient descent on samples and reinforcement learning on weights against each other. Without
options: both sides against the exact tilted policy on spaces small enough to list, with a verdict for each claim. A
study is a YAML file (--config), whose options are spelled as the verbs spell them. The run folder keeps everything as
soon as it is done; the same command resumes a run that was interrupted."""


def exact(options: Any, design: Design) -> AbstractStudy:
    """Samplers, RL and decoders against the exact tilted policy."""
    from nabla_rl.studies.exact import DualityExact

    return DualityExact(design, options.exact)


def decode(options: Any, design: Design) -> AbstractStudy:
    """Decoders over a grid of their options."""
    from nabla_rl.studies.grid import DecodeGrid

    return DecodeGrid(design)


def frontier(options: Any, design: Design) -> AbstractStudy:
    """Decoders at several budgets."""
    from nabla_rl.studies.frontier import Frontier

    return Frontier(design, options.flops, options.baseline)


def distill(options: Any, design: Design) -> AbstractStudy:
    """Ways to distil, and alignment as their rival."""
    from nabla_rl.studies.training import DistillGrid

    return DistillGrid(design)


def measured(options: Any, design: Design) -> AbstractStudy:
    """Distributions of completions, measured on samples."""
    from nabla_rl.studies.measured import Measured

    return Measured(design, options.adapters, options.pairs, Path(options.adapters_dir))


def curves(options: Any, design: Design) -> AbstractStudy:
    """Learning curves of alignments."""
    from nabla_rl.studies.curves import Curves

    return Curves(design)


STUDIES: dict[str, Callable[[Any, Design], AbstractStudy]] = {
    "duality_exact": exact, "decode": decode, "frontier": frontier, "distill": distill, "measured": measured,
    "curves": curves,
}  # fmt: skip
"""Every kind of study by its name."""
OWN = {"frontier": ("flops", "baseline"), "measured": ("adapters", "pairs")}
"""Options that one kind of study alone has."""


def build_parser() -> ArgumentParser:
    """The options of a study."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="nabla-rl ablate",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description=DESCRIPTION,
        exit_on_error=False,
    )
    mapping, nested = dict[str, Any], dict[str, dict[str, Any]]
    add = parser.add_argument
    add("--config", action="config", help="YAML file, or the name of one in configs/ablate.")
    add("--study", type=str, default="duality_exact", help=f"Kind of study: {', '.join(STUDIES)}.")
    add("--grid", type=mapping, default={}, help="Dotted options with lists of values; or --grid.model.beta [0.3, 1].")
    add("--fixed", type=mapping, default={}, help="Dotted options of all points; or --fixed.data.limit 50.")
    add("--variants", type=nested, default={}, help="Labels with their dotted options; the first is compared with.")
    add("--seeds", type=list[int], default=[0], help="Random seeds; every point is run with each.")
    add("--seed", type=int, default=0, help="Number added to every one of the seeds.")
    add("--flops", type=list[float], default=[], help="Budgets of a frontier, in FLOPs for each problem.")
    add("--baseline", type=str | None, default=None, help="Variant that a frontier compares with; null is none.")
    add("--adapters", type=nested, default={}, help="Trained adapters of a measured study, with their options.")
    add("--pairs", type=list[list[str]], default=[], help="Pairs of labels that a measured study compares.")
    add("--adapters_dir", type=str, default="runs/ablate/adapters", help="Folder of the trained adapters.")
    add("--run_dir", type=str, default=None, help="Folder of the results; null is runs/ablate/<config name>.")
    parser.add_class_arguments(ExactSettings, "exact")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run what is missing of a study, write its files and print what it found."""
    with before_parsing():
        given = with_found_configs(arguments, "ablate")
        default = [] if given_configs(given) else ["--config", str(configs.folder("ablate") / f"{DEFAULT}.yaml")]
        rest, single = single_options([*default, *given])
    files = given_configs(rest)
    parser = build_parser()
    try:
        parsed = parser.parse_args(rest)
    except ArgumentError as error:
        raise Complaint(explain(str(error), option_names(parser), files)) from error
    try:
        options: Any = parser.instantiate(parsed)
        options.grid, options.fixed = options.grid | single["grid"], options.fixed | single["fixed"]
        path = Path(options.run_dir or Path("runs/ablate") / Path(files[-1]).stem)
        return run(build_study(options), path, arguments)
    except UserError as error:
        names = option_names(parser)
        raise Complaint(error.told(lambda name: spelled(name, names), lambda name: spelled(name, names))) from error


def spelled(name: str, options: Sequence[str]) -> str:
    """A setting as it is written on the command line, where it can be."""
    if name.startswith(("grid.", "fixed.")):
        return f"--{name}"
    if name.startswith("settings."):
        return f"--exact.{name.removeprefix('settings.')}"
    return name if "." in name else spell(name, options) or name


def build_study(options: Any) -> AbstractStudy:
    """The study that the options describe."""
    if options.study not in STUDIES:
        raise UserError("study", f"one of {', '.join(STUDIES)}", repr(options.study))
    for kind, names in OWN.items():
        for name in names:
            if kind != options.study and getattr(options, name):
                raise UserError(name, f"none with a {options.study} study", str(getattr(options, name)))
    seeds = [options.seed + seed for seed in options.seeds]
    defaults = shipped_defaults(flatten(options.fixed))
    design = Design(seeds, options.grid, options.fixed, options.variants, defaults=defaults)
    return STUDIES[options.study](options, design)


def shipped_defaults(fixed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each verb does without options, so that a study starts from the same: its default.yaml, and real.yaml after
    it for a policy that is not embedded."""
    found: dict[str, dict[str, Any]] = {}
    for verb, owner in (("decode", "model"), ("align", "model"), ("distill", "teacher")):
        policy, family = fixed.get(f"{owner}.policy.name"), str(fixed.get("data.family", "words"))
        real = isinstance(policy, str) and not is_embedded(qualified(policy, family))
        files = [configs.default(verb), configs.default(verb, "real") if real else None]
        found[verb] = {}
        for file in files:
            if file is not None:
                found[verb] |= flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
    return found


def single_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The command line without `--grid.NAME VALUE` and `--fixed.NAME VALUE`, and what those say.

    The parser knows a mapping as a whole, and of two nested options would keep the last one alone.

    Raises:
        UserError: An option has no value, or one that is not YAML.
    """
    rest: list[str] = []
    single: dict[str, dict[str, Any]] = {"grid": {}, "fixed": {}}
    words = iter(arguments)
    for word in words:
        option, equals, text = word.partition("=")
        group, dot, name = option.removeprefix("--").partition(".")
        if not (option.startswith("--") and dot and group in single):
            rest.append(word)
            continue
        text = text if equals else next(words, None)
        if not name or text is None:
            raise UserError(f"{group}.{name}", "a name and a value", "none", f"Write --{group}.data.limit 50.")
        try:
            single[group][name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{group}.{name}", "a value in YAML", repr(text), "Write [a, b] for a list.") from error
    return rest, single


def run(study: AbstractStudy, path: Path, arguments: Sequence[str]) -> int:
    """Run a study to its end, or to an interruption, and conclude with what there is."""
    console, command = wide_console(), shlex.join(["nabla-rl", "ablate", *arguments])
    watch = BarWatch() if sys.stderr.isatty() else LineWatch()
    try:
        with terminable():
            watch.start(f"{path.name}: {len(study.points)} points, results in {path}/")
            study.run(path, watch)
    except KeyboardInterrupt:
        watch.stop()
        conclude(study, path, command, console)
        raise
    finally:
        watch.stop()
    conclude(study, path, command, console)
    return 0


class LineWatch(Watch):
    """A line on standard error when the study starts and when a part of it is done."""

    def start(self, text: str) -> None:
        """Say what is about to happen."""
        self._say(text)

    def begin(self, number: int, total: int, what: str) -> None:
        self._part, self._clock = f"{number} of {total}: {what}", Stopwatch()

    def end(self) -> None:
        self._say(f"{self._part} ({self._clock.seconds:.1f} s)")

    def stop(self) -> None:
        """The study is over."""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


class BarWatch(Watch):
    """A progress bar of the parts of a study, and one of the steps of the part that is being done."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self.whole = self.progress.add_task("study", total=None)
        self.part = self.progress.add_task("", total=None, visible=False)

    def start(self, text: str) -> None:
        """Show the bars, below what is about to happen."""
        self.progress.start()
        self.progress.console.print(text, highlight=False, markup=False)

    def begin(self, number: int, total: int, what: str) -> None:
        self.progress.update(self.whole, completed=number - 1, total=total, description=what)
        self._number = number

    def step(self, done: int, total: int, what: str = "") -> None:
        self.progress.update(self.part, completed=done, total=total, description=f"  {what}", visible=done < total)

    def end(self) -> None:
        self.progress.update(self.whole, completed=self._number)
        self.progress.reset(self.part, visible=False)

    def stop(self) -> None:
        """Give the terminal back."""
        self.progress.stop()


def conclude(study: AbstractStudy, path: Path, command: str, console: Console) -> Report | None:
    """Write tables, figures, summary and page of what is finished, and print what they say."""
    report = study.report(path)
    if report is None:
        return None
    name, files = path.name, list(report.files)
    with as_user_error(path):
        if not files:
            files = write_files(report, path, command)
    title = f"{name}: {report.title}"
    if report.printed is not None:
        console.print(report.printed)
    elif report.claims:
        console.print(claims_table(report, f"{title.replace(': ', ': verdicts over ', 1)}, the worst one decides"))
        holds = sum(row["holds"] for row in report.claims)
        console.print(f"{holds} of {len(report.claims)} claims hold everywhere", highlight=False)
    else:
        console.print(rows_table(report.rows, title, report.shown))
    for heading, rows in report.tables:
        console.print(rows_table(rows, heading, report.shown))
    console.print(f"results in {path}/ ({', '.join(files)})", highlight=False)
    return report


def write_files(report: Report, path: Path, command: str) -> list[str]:
    """Write what every study leaves behind that has no files of its own; the names to look at."""
    summary = {"command": command, "claims": report.claims, **report.summary}
    contents: dict[str, str] = {"summary.json": to_json(summary), "table.json": to_json(report.rows)}
    contents["table.csv"] = to_csv(report.rows)
    for title, rows in report.tables:
        stem = title.lower().replace(" ", "_")
        contents |= {f"{stem}.json": to_json(rows), f"{stem}.csv": to_csv(rows)}
    contents["report.html"] = to_html(report, f"ablate: {path.name}", command)
    for name, text in contents.items():
        write_atomically(path / name, text)
    return ["summary.json", "table.csv", "table.json", "report.html", *(["figures/"] if report.figures else [])]


def to_json(value: Any) -> str:
    """A value as JSON, with null for what is not finite."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
