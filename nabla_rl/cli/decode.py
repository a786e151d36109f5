"""`python scripts/decode.py`: options, the run, the table."""

from __future__ import annotations

import difflib
import math
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from nabla_rl.cli.progress import DecodingProgress
from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.module import Decoding
from nabla_rl.report import format_table, write_report
from nabla_rl.report.summary import acceleration_shares, summarise
from nabla_rl.run_folder import RunFolder, flatten
from nabla_rl.studies.frontier import FrontierOptions, build_cells, finish_frontier, start_frontier
from nabla_rl.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "decode"
TABLE_WIDTH = 160
NOT_IN_RESULTS = ("config", "run_dir", "trainer", "seed_everything")
OPTIONS_OF_MODEL = ("sampling.", "nabla.", "budget.", "beam.", "mcts.", "edit_search.")
FULL_PRECISION = (None, 32, "32", "32-true")
DESCRIPTION = """Decode problems with ∇-Reasoner and its rivals, with every cost counted. Without options: test
problems of the embedded tiny world by its embedded models, offline. Options come from YAML files (--config) and from
the command line, which wins. The run folder keeps every result as soon as it is there; the same command goes on with
a run that was interrupted. What most runs set: --model.policy.name, --model.reward.name, --model.gold.name (null for
none), --model.decoders, --model.beta, --data.path, --data.limit, --run_dir."""


class DecodeCLI(LightningCLI):
    """The options of decoding, from YAML and the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own options and tie what must agree."""
        parser.add_argument("--seed", type=int, default=0, help="seed of every random number")
        parser.add_argument(
            "--run_dir", type=str, default=None, help="folder of the results (default: runs/decode/<config name>)"
        )
        parser.add_class_arguments(FrontierOptions, "frontier")
        parser.link_arguments("data.family", "model.family")
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("model.beta", "model.nabla.dto.beta")
        parser.set_defaults(
            {
                "trainer.logger": False,
                "trainer.enable_checkpointing": False,
                "trainer.enable_progress_bar": False,
                "trainer.enable_model_summary": False,
                "trainer.inference_mode": False,
                "trainer.barebones": False,
            }
        )
        # our own options before the many of Lightning's trainer
        parser._action_groups.sort(key=lambda group: "training via flags" in (group.title or ""))  # pyright: ignore

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is wrong is said in this project's words."""
        self.arguments = list(sys.argv[1:] if args is None else args)
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(explain(str(error), option_names(parser), given_configs(args))) from error
        except UnicodeDecodeError as error:
            raise UserError(explain("Problems parsing config", (), given_configs(args))) from error

    def before_instantiate_classes(self) -> None:
        """Refuse what a type cannot: values that are no numbers, and precisions beside the models' own types."""
        check_numbers(self.config)
        if self.config.trainer.precision not in FULL_PRECISION:
            raise UserError(
                f"--trainer.precision: expected none, found {self.config.trainer.precision}. Weights have their own "
                "types: use --model.policy.dtype and --model.reward.dtype."
            )

    def instantiate_classes(self) -> None:
        """Build everything; errors name the option as it is written on the command line."""
        try:
            super().instantiate_classes()
        except UserError as error:
            raise UserError(spell_option(str(error))) from error

    def variant(self, arguments: Sequence[str]) -> tuple[Decoding, dict[str, Any]]:
        """The decoding that this command line would give with `arguments` after it, and what decides its results."""
        try:
            config = self.parser.parse_args([*self.arguments, *arguments])
        except ArgumentError as error:
            raise UserError(explain(str(error), option_names(self.parser))) from error
        check_numbers(config)
        decisive = plain_config(self.parser, config)
        for name in ("data", "trainer", "frontier"):
            config.pop(name)
        try:
            return self.parser.instantiate_classes(config)["model"], decisive
        except UserError as error:
            raise UserError(spell_option(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; what it cannot do on this machine is an error of the input."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"--trainer: expected options that work here, found: {error} See --help.") from error


def read_options(arguments: Sequence[str]) -> DecodeCLI:
    """The decoding, the problems and the trainer that a command line asks for."""
    default = CONFIGS / "default.yaml"
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return DecodeCLI(
        Decoding,
        ProblemData,
        run=False,
        args=list(arguments),
        seed_everything_default=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "decode.py",
            "usage": "%(prog)s [--config FILE] [--OPTION VALUE ...]",
            "description": DESCRIPTION,
            "default_config_files": [str(default)] if default.is_file() else [],
            "exit_on_error": False,
        },
    )


def main(arguments: list[str]) -> int:
    """Decode, write the run folder, print the table."""
    cli = read_options(arguments)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    folder = Path(cli.config.run_dir or Path("runs/decode") / config_name(cli.config))
    if trainer.is_global_zero:
        for notice in data.notices:
            print(f"warning: {notice}", file=sys.stderr)  # noqa: T201
    frontier: FrontierOptions = cli.config_init["frontier"]
    if frontier.variants:
        cells = build_cells(frontier, cli.variant)
        whole = start_frontier(
            cells, folder, results_config(cli), rank=trainer.global_rank, world_size=trainer.world_size
        )
        progress = DecodingProgress(data, [(cell.label, cell.module) for cell in whole.cells])
        whole.on_cell = lambda cell: progress.describe(f"{cell.label}, seed {cell.seed}")
        work, runs = whole, [cell.module for cell in whole.cells]
        conclude = partial(finish_frontier, whole, frontier, data, folder)
    else:
        module.run_folder = RunFolder(
            folder, results_config(cli), rank=trainer.global_rank, world_size=trainer.world_size
        )
        progress = DecodingProgress(data, [(None, module)])
        work, runs = module, [module]
        conclude = partial(finish, module, data, module.run_folder)
    for run in runs:
        assert run.run_folder is not None
        check_same_problems(run.run_folder, data.problems)
    for run in runs:
        # before Lightning starts other processes: what is wrong with the models is then said once
        run.prepare(trainer.strategy.root_device, data.problems, like=None if run is runs[0] else runs[0])
    trainer.callbacks.append(progress)  # pyright: ignore
    predict(trainer, work, data, lambda: any(run.run_folder and run.run_folder.rows for run in runs), conclude)
    return 0


def predict(
    trainer: Trainer,
    work: LightningModule,
    data: ProblemData,
    anything: Callable[[], bool],
    conclude: Callable[[Console], Any],
) -> None:
    """Run to the end, or to an interruption, and conclude with what there is."""
    try:
        with terminable():
            trainer.predict(work, datamodule=data, return_predictions=False)
    except SystemExit as stop:
        # what Lightning makes of Ctrl-C
        interrupt = stop.__context__
        if not isinstance(interrupt, KeyboardInterrupt):
            raise
        if trainer.world_size == 1 and anything():
            conclude(wide_console())
        raise interrupt from None
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        conclude(wide_console())


def finish(module: Decoding, data: ProblemData, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Merge the results and write the summary and the page; print the table.

    Of a run that ended early, the table and the summary have the problems that every decoder has finished.
    """
    results = folder.merge([problem.id for problem in data.problems], module.decoder_names)
    finished = [p.id for p in data.problems if all((p.id, name) in folder.rows for name in module.decoder_names)]
    kept = set(finished)
    results = [row for row in results if row["id"] in kept]
    summary: dict[str, Any] = {
        "problems": len(finished),
        "seed": module.seed,
        "rows": summarise(results, module.decoder_names),
        "accelerations": acceleration_shares(results),
        "peak_memory_mb": peak_memory_mb(module.device),
    }
    folder.write_json("summary.json", summary)
    write_report(folder.path / "report.html", f"decode: {folder.path.name}", summary["rows"], results)
    where = data.path or f"{data.family.name}, {data.split} split"
    total = len(data.problems)
    count = f"{total} problems" if len(finished) == total else f"the {len(finished)} finished of {total} problems"
    console.print(format_table(summary["rows"], title=f"{count} ({where}); costs per problem"))
    console.print(f"results in {folder.path}/ (results.jsonl, summary.json, report.html)", highlight=False)
    return summary


def wide_console() -> Console:
    """A console that does not squeeze the table, also where the output is not a terminal."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


def results_config(cli: LightningCLI) -> dict[str, Any]:
    """What decides the results: the whole configuration, less where and on what it runs."""
    return plain_config(cli.parser, cli.config)


def plain_config(parser: LightningArgumentParser, parsed: Any) -> dict[str, Any]:
    """`results_config` of options that a parser has read."""
    config = yaml.safe_load(parser.dump(parsed, skip_link_targets=False, skip_none=False))
    for name in NOT_IN_RESULTS:
        config.pop(name, None)
    if not config["frontier"]["variants"]:
        config.pop("frontier")
    config["data"].pop("batch_size", None)
    return config


def option_names(parser: LightningArgumentParser) -> list[str]:
    """The options that a parser knows."""
    return [option for action in parser._actions for option in action.option_strings]


def check_numbers(config: Any) -> None:
    """Refuse NaN, which every type and every comparison lets through."""
    for name, value in flatten(config.as_dict()).items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"--{name}: expected a number, found {value}.")


def config_name(config: Any) -> str:
    """The name of the last YAML given with --config, or "default"."""
    files = [Path(str(file)).stem for file in (config.config or []) if file is not None]
    return files[-1] if files else "default"


def check_same_problems(folder: RunFolder, problems: Sequence[Problem]) -> None:
    """Refuse a folder whose results answer other problems than this run's: the file of problems was changed."""
    texts = {problem.id: problem.problem for problem in problems}
    for key, decoder in folder.rows:
        found = folder.rows[key, decoder]["prompt"]
        if texts.get(key) != found:
            now = "no such problem" if key not in texts else repr(texts[key][:40])
            raise UserError(
                f"--run_dir: expected {folder.path} to hold results of these problems, found {key!r} = "
                f"{found[:40]!r} there and {now} now. Choose another --run_dir, or delete that folder."
            )


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM ends a run as Ctrl-C does: Lightning only takes note of it. Ctrl-C works again afterwards."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def given_configs(arguments: Sequence[str] | None) -> list[str]:
    """The files given with --config."""
    files = []
    for index, argument in enumerate(arguments or ()):
        name, equals, value = argument.partition("=")
        if name in ("-c", "--config"):
            files += [value] if equals else list(arguments or ())[index + 1 : index + 2]
    return files


def spell_option(message: str) -> str:
    """The error of a library class with its option as it is written on the command line."""
    found = re.fullmatch(r"`(\w+)` must be (.*), got (.*)\.", message)
    if found:
        name = "model.beta" if found[1] == "beta" else f"model.nabla.dto.{found[1]}"
        return f"--{name}: expected {found[2]}, found {found[3]}."
    if message.startswith("frontier."):
        return f"--{message}"
    return f"--model.{message}" if message.startswith(OPTIONS_OF_MODEL) else message


def explain(message: str, options: Sequence[str], configs: Sequence[str] = ()) -> str:
    """An error of jsonargparse in one line: what, expected, found, what to do."""
    flat = " ".join(message.split())
    for pattern, say in MESSAGES:
        found = re.fullmatch(pattern, flat)
        if found:
            return say(*found.groups()) + " See --help."
    unknown = (
        re.match(r"unrecognized arguments: (\S+)", flat)
        or re.fullmatch(r"Option '(.+)' is not accepted", flat)
        or re.fullmatch(r"Group '(.+)' does not accept option '(.+)'", flat)
    )
    if unknown:
        name = ".".join(unknown.groups())
        name = name.split("=")[0] if name.startswith("-") else f"--{name}"
        close = difflib.get_close_matches(name, options, 1)
        guess = f" Did you mean {close[0]}?" if close else ""
        return f"{name}: expected an option of this command, found an unknown one.{guess} See --help."
    return next((complaint for file in configs if (complaint := yaml_complaint(file))), f"{flat} See --help.")


def yaml_complaint(file: str) -> str | None:
    """What keeps a file from being YAML, or None."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        return f"--config: expected text in UTF-8 in '{file}', found a byte that is none at offset {error.start}."
    except OSError:
        return None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "an error"
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"--config: expected YAML in '{file}', found {problem}{where}. Mend the file."
    if not isinstance(content, dict):
        found = "nothing" if content is None else repr(content)[:40]
        return (
            f"--config: expected options and their values in '{file}', found {found}. Write `data: {{limit: 8}}`, say."
        )
    return None


def type_names(text: str) -> str:
    """Types as jsonargparse prints them, in plain words."""
    names = []
    for literal, plain in re.findall(r"typing\.Literal\[(.*?)\]|<class '(\w+)'>", text):
        names.append(f"one of {literal.replace(chr(39), '')}" if literal else TYPE_NAMES.get(plain, plain))
    return " or ".join(dict.fromkeys(names)) or text


TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list [a,b]",
    "NoneType": "null",
}
MESSAGES: tuple[tuple[str, Callable[..., str]], ...] = (
    (
        r'Parser key "(.+?)": Does not validate against .* Subtypes: \[(.*)\] Errors: .* Given value: (.*)',
        lambda key, types, value: f"--{key}: expected {type_names(types)}, found {value!r}.",
    ),
    (
        r'Parser key "(.+?)": Expected an? (.*)\. Got value: (.*)',
        lambda key, types, value: f"--{key}: expected {type_names(types)}, found {value!r}.",
    ),
    (
        r"Parser key \"(.+?)\": (?:File does not exist|Path is not a file): '(.*)'",
        lambda key, path: f"--{key}: expected a YAML file, found none at '{path}'. Check the path.",
    ),
    (
        r"Parser key \"(.+?)\": Unable to load config '(.*?)'.*",
        lambda key, value: (
            f"--{key}: expected a YAML file, found '{value}'. Its options are written --{key}.NAME VALUE."
        ),
    ),
    (
        r'Linked "(.+?)" must be given via "(.+?)"\.',
        lambda target, source: (
            f"--{target}: expected to be set by --{source}, found it set by itself. Use --{source}."
        ),
    ),
    (
        r"argument (?:-\w/)?(--\S+): expected one argument",
        lambda option: f"{option}: expected a value, found none.",
    ),
)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
