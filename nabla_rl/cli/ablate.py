"""`python scripts/ablate.py`: a study over a grid, point by point, and what it found."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from rich.console import Console

from nabla_rl.cli.decode import explain, given_configs, terminable, wide_console
from nabla_rl.duality.settings import ExactSettings
from nabla_rl.report.grid import claims_table, rows_table, to_csv, to_html
from nabla_rl.run_folder import RunFolder, write_atomically
from nabla_rl.studies.base import (
    VARIANT,
    AbstractStudy,
    DecodeGrid,
    DualityExact,
    Point,
    Report,
    StudyName,
    build_points,
    finite,
)
from nabla_rl.studies.measured import Measured
from nabla_rl.studies.training import DistillGrid
from nabla_rl.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "ablate"
DEFAULT = CONFIGS / "duality_exact.yaml"
DESCRIPTION = """Hold gradient descent on samples and reinforcement learning on weights against each other. Without
options: both sides against the exact tilted policy on spaces small enough to list, with a verdict for each claim. A
study is a YAML file (--config): a grid of dotted names, each with a list of values, and seeds. The run folder keeps
every point as soon as it is done; the same command goes on with a run that was interrupted."""


def build_parser() -> ArgumentParser:
    """The options of a study."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="ablate.py",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description=DESCRIPTION,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a YAML of configs/ablate (default: duality_exact.yaml)")
    parser.add_argument(
        "--study",
        type=StudyName,
        default="duality_exact",
        help="duality_exact; decode or distill: grids of that command; measured: laws of completions on samples",
    )
    parser.add_argument(
        "--grid",
        type=dict[str, Any],
        default={},
        help="dotted names, each with a list of values; another one: --grid.model.beta [0.3, 1.0]",
    )
    parser.add_argument(
        "--fixed",
        type=dict[str, Any],
        default={},
        help="options that all points share; another one: --fixed.data.limit 50",
    )
    parser.add_argument(
        "--variants",
        type=dict[str, dict[str, Any]],
        default={},
        help="of decode and distill studies: label → dotted options, each held to the first one, in place of or "
        "within the grid; of a measured one: label → the law's curve, beta, decoder, adapter, samples, options, …",
    )
    parser.add_argument(
        "--adapters",
        type=dict[str, dict[str, Any]],
        default={},
        help="of a measured study: name → command (align or distill), snapshots (steps) and that command's options",
    )
    parser.add_argument(
        "--pairs", type=list[list[str]], default=[], help="of a measured study: labels of two laws to be compared"
    )
    parser.add_argument(
        "--adapters_dir", type=str, default="runs/ablate/adapters", help="where trained adapters are, for all studies"
    )
    parser.add_argument("--seeds", type=list[int], default=[0], help="every point is run with each; counted from seed")
    parser.add_argument("--seed", type=int, default=0, help="added to every one of seeds")
    parser.add_argument("--run_dir", type=str, default=None, help="results (default: runs/ablate/<config name>)")
    parser.add_class_arguments(ExactSettings, "exact")
    return parser


def main(arguments: list[str]) -> int:
    """Run what is missing of a study, write its files and print what it found."""
    files = given_configs(arguments)
    rest, single = single_options(arguments)
    given = rest if files else ["--config", str(DEFAULT), *rest]
    parser = build_parser()
    try:
        config = parser.parse_args(given)
    except ArgumentError as error:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UserError(explain(str(error), options, files)) from error
    options: Any = parser.instantiate(config)
    options.grid, options.fixed = options.grid | single["grid"], options.fixed | single["fixed"]
    study = build_study(options)
    points = build_points(whole_grid(options.grid, options.variants), [options.seed + seed for seed in options.seeds])
    study.check(points)
    folder = Path(options.run_dir or Path("runs/ablate") / Path(files[-1] if files else DEFAULT).stem)
    run_folder = RunFolder(folder, decisive_options(options))
    console = wide_console()
    try:
        with terminable():
            run_points(study, points, run_folder)
    except KeyboardInterrupt:
        finish(study, points, run_folder, arguments, console)
        raise
    finish(study, points, run_folder, arguments, console)
    return 0


def build_study(options: Any) -> AbstractStudy:
    """The study that the options describe."""
    if options.study == "duality_exact":
        if options.fixed:
            raise UserError("--fixed: expected none with duality_exact, found some. Use --exact.NAME VALUE.")
        return DualityExact(options.exact)
    if options.study == "measured":
        return Measured(
            options.fixed, options.variants, options.adapters, options.pairs, adapters_dir=Path(options.adapters_dir)
        )
    grid = DistillGrid if options.study == "distill" else DecodeGrid
    return grid(options.fixed, options.variants)


def single_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The command line without `--grid.NAME VALUE` and `--fixed.NAME VALUE`, and what those say.

    The parser knows a mapping as a whole, and of two nested options would keep the last one alone.

    Raises:
        UserError: If an option has no value, or one that is not YAML.
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
            raise UserError(f"{option}: expected a name and a value, found none. Write --{group}.data.limit 50.")
        try:
            single[group][name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{option}: expected a value in YAML, found '{text}'. Write [a, b] for a list.") from error
    return rest, single


def decisive_options(options: Any) -> dict[str, Any]:
    """What decides the results of a point. Laws can be added to a measured study, and other pairs be compared."""
    decisive = {"study": options.study, "fixed": options.fixed}
    if options.study == "duality_exact":
        return decisive | {"variants": options.variants, "exact": asdict(options.exact)}
    if options.study == "measured":
        return decisive
    return decisive | {"variants": options.variants}


def whole_grid(grid: dict[str, Any], variants: dict[str, Any]) -> dict[str, Any]:
    """The grid, with the labels of the variants as its last and fastest name."""
    return {**grid, VARIANT: list(variants)} if variants else grid


def run_points(study: AbstractStudy, points: list[Point], folder: RunFolder) -> None:
    """Do the points that have no line yet, and write each down as it is done."""
    done = {key for key, _ in folder.rows}
    for number, point in enumerate(points, start=1):
        if point.id in done:
            continue
        start = time.perf_counter()
        rows = study.run(point, folder.path)
        folder.append([{"id": point.id, "config": folder.config_hash, **row} for row in rows])
        seconds = time.perf_counter() - start
        print(f"point {number} of {len(points)}: {point.id} ({seconds:.1f} s)", file=sys.stderr, flush=True)  # noqa: T201


def finish(
    study: AbstractStudy, points: list[Point], folder: RunFolder, arguments: list[str], console: Console
) -> Report | None:
    """Write tables, figures, summary and page of the points that are finished, and print what they say."""
    rows = [row for point in points for (key, _), row in folder.rows.items() if key == point.id]
    if not rows:
        return None
    report = study.report(rows, folder.path)
    finished = len({row["id"] for row in rows})
    command = shlex.join(["python", "scripts/ablate.py", *arguments])
    folder.write_json(
        "summary.json",
        finite({"points": finished, "of": len(points), "command": command, "claims": report.claims, **report.summary}),
    )
    folder.write_json("table.json", finite(report.rows))
    write_atomically(folder.path / "table.csv", to_csv(report.rows))
    for title, lines in report.tables:
        stem = title.lower().replace(" ", "_")
        folder.write_json(f"{stem}.json", finite(lines))
        write_atomically(folder.path / f"{stem}.csv", to_csv(lines))
    name = folder.path.name
    write_atomically(folder.path / "report.html", to_html(report, f"ablate: {name}", command))
    count = f"{len(points)} points" if finished == len(points) else f"the {finished} finished of {len(points)} points"
    if report.claims:
        console.print(claims_table(report, f"{name}: verdicts over {count}, the worst one decides"))
        holds = sum(row["holds"] for row in report.claims)
        console.print(f"{holds} of {len(report.claims)} claims hold everywhere", highlight=False)
    else:
        console.print(rows_table(report.rows, f"{name}: {count}", report.shown))
    for title, rows in report.tables:
        console.print(rows_table(rows, title, report.shown))
    console.print(
        f"results in {folder.path}/ (summary.json, table.csv, table.json, report.html, figures/)", highlight=False
    )
    return report
