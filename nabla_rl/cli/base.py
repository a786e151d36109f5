"""What every command has in common: options from YAML and the command line, help, and errors in one line.

Below this package errors name settings as Python has them (`sampling.top_p`); here alone they are spelled as options
(`--model.sampling.top_p`).
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from nabla_rl.cli import configs
from nabla_rl.decoding import DECODERS
from nabla_rl.decoding.base import AbstractDecoder
from nabla_rl.decoding.run import decoder_class
from nabla_rl.models.loading import is_embedded, qualified
from nabla_rl.rewards.loading import REWARDS, reward_class
from nabla_rl.run_folder import flatten
from nabla_rl.types import UserError

TABLE_WIDTH = 100
NOT_IN_RESULTS = ("config", "run_dir", "trainer", "seed_everything")
FULL_PRECISION = (None, 32, "32", "32-true")
SECTIONS = ("model", "data", "trainer")
"""Where a setting that an error names is looked for first."""


class Complaint(Exception):
    """An error of the input, spelled as the command line has it."""


# Errors


def spell(name: str, options: Iterable[str]) -> str | None:
    """The option that a setting is set by; None where there is no such option."""
    known = [option.removeprefix("--") for option in options]
    for wanted in (name, *(f"{section}.{name}" for section in SECTIONS)):
        if wanted in known:
            return f"--{wanted}"
    longer = sorted((option for option in known if option.endswith(f".{name}")), key=lambda o: (o.count("."), o))
    if longer:
        return f"--{longer[0]}"
    inner = sorted(option for option in known if option.startswith((f"{name}.", f"model.{name}.")))
    if inner:
        return f"--{inner[0].partition(name)[0]}{name}"
    parent, dot, last = name.rpartition(".")  # an option that may be null has no options of its own
    above = spell(parent, options) if dot else None
    return None if above is None else f"{above}.{last}"


def spelled(error: UserError, options: Sequence[str]) -> str:
    """An error with its settings as options, where they are options."""
    return error.told(lambda name: spell(name, options) or name, lambda name: spell(name, options) or name)


@contextmanager
def spelling(parser: ArgumentParser) -> Iterator[None]:
    """Within, errors of settings are complaints about the parser's options."""
    try:
        yield
    except UserError as error:
        raise Complaint(spelled(error, option_names(parser))) from error


@contextmanager
def before_parsing() -> Iterator[None]:
    """Within, settings are options already: there is no parser yet to ask."""
    try:
        yield
    except UserError as error:
        raise Complaint(error.told(lambda name: f"--{name}", lambda name: f"--{name}")) from error


def option_names(parser: ArgumentParser) -> list[str]:
    """The options that a parser knows."""
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def explain(message: str, options: Sequence[str], files: Sequence[str] = ()) -> str:
    """An error of the parser in one line: what, expected, found, what to do."""
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
        return f"{name}: expected an option of this command, found an unknown one.{similar(name, options)} See --help."
    return next((complaint for file in files if (complaint := yaml_complaint(file))), f"{flat} See --help.")


def similar(name: str, options: Sequence[str]) -> str:
    """A guess at what was meant, or nothing: an option that ends alike, or that looks alike."""
    last = name.rpartition(".")[2].removeprefix("--")
    same = [option for option in options if option.rpartition(".")[2].removeprefix("--") == last]
    close = difflib.get_close_matches(name, same or options, 1, 0.0 if same else 0.6)
    return f" Did you mean {close[0]}?" if close else ""


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
    """Types as the parser prints them, in plain words."""
    names = []
    for literal, plain in re.findall(r"typing\.Literal\[(.*?)\]|(?:<class '|\b)(\w+)(?:'>|\[\w+\])", text):
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
"""The parser reports its errors as text alone."""


# Options


def given_configs(arguments: Sequence[str] | None) -> list[str]:
    """The files given with --config."""
    files = []
    for index, argument in enumerate(arguments or ()):
        name, equals, value = argument.partition("=")
        if name in ("-c", "--config"):
            files += [value] if equals else list(arguments or ())[index + 1 : index + 2]
    return files


def with_found_configs(arguments: Sequence[str], verb: str) -> list[str]:
    """The command line with the path of each shipped file in the place of its name."""
    found, expects = [], False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if expects:
            argument, expects = str(configs.find(verb, argument)), False
        elif name in ("-c", "--config"):
            expects = not equals
            argument = f"{name}={configs.find(verb, value)}" if equals else argument
        found.append(argument)
    return found


def glimpse(arguments: Sequence[str], files: Sequence[str | Path]) -> dict[str, Any]:
    """What options will be, dotted, as far as files and command line say: enough to know which options there are."""
    seen: dict[str, Any] = {}
    for file in [*files, *given_configs(arguments)]:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser will say so
        if isinstance(content, Mapping):
            seen |= flatten(content)
    for word, after in zip(arguments, [*arguments, "--"][1:], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--") and (equals or not after.startswith("--")):
            value = value if equals else after
            try:
                seen[name[2:]] = yaml.safe_load(value)
            except yaml.YAMLError:
                seen[name[2:]] = value
    return seen


class VerbCLI(LightningCLI):
    """The options of a command, from YAML and the command line.

    Attributes:
        verb: The command's name.
        owner: The section that has policy, reward model and decoders.
        names_decoders: The option of that section that names decoders.
        beta_option: The option that β comes from.
        precisions: What --trainer.precision may be.
        description: What --help begins with.
    """

    verb: ClassVar[str]
    owner: ClassVar[str] = "model"
    names_decoders: ClassVar[str] = "decoders"
    beta_option: ClassVar[str] = "model.beta"
    precisions: ClassVar[tuple[Any, ...]] = FULL_PRECISION
    description: ClassVar[str] = ""

    @classmethod
    def read(cls, arguments: Sequence[str], module: type, data: type, *, prints_config: bool = False) -> VerbCLI:
        """The objects that a command line asks for; --help and `prints_config` print what they say and exit."""
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        with before_parsing():
            arguments, topic = without_help(with_found_configs(arguments, cls.verb))
        files, note = cls.default_files(arguments)
        cls.seen = glimpse(arguments, files)
        cls.topic, cls.note, cls.prints_config = topic, note, prints_config
        return cls(
            module,
            data,
            run=False,
            args=arguments,
            seed_everything_default=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"nabla-rl {cls.verb}",
                "default_config_files": [str(file) for file in files],
                "exit_on_error": False,
            },
        )

    @classmethod
    def default_files(cls, arguments: Sequence[str]) -> tuple[list[Path], str | None]:
        """The files that hold the defaults, and a line that says which: a policy that is not embedded has no embedded
        reward models and none of the tiny world's limits."""
        own = configs.default(cls.verb)
        files = [own] if own is not None else []
        seen = glimpse(arguments, files)
        policy = seen.get(f"{cls.owner}.policy.name")
        real = configs.default(cls.verb, "real")
        if (
            not isinstance(policy, str)
            or real is None
            or is_embedded(qualified(policy, seen.get("data.family", "words")))
        ):
            return files, None
        given = glimpse(arguments, ())
        chosen = flatten(yaml.safe_load(real.read_text(encoding="utf-8")))
        told = ", ".join(
            f"{name.partition('.')[2]} {'null' if value is None else value}"
            for name, value in chosen.items()
            if name not in given
        )
        note = f"{policy} is not embedded: {told} (configs/{cls.verb}/real.yaml; your options win)"
        return [*files, real], note if told else None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own options, those of decoders and rewards, and tie what must agree."""
        parser.add_argument("--seed", type=int, default=0, help="Random seed.")
        where = f"runs/{self.verb}/<config name>"
        parser.add_argument("--run_dir", type=str, default=None, help=f"Folder of the results; null is {where}.")
        self.add_options(parser)
        self.add_own_options(parser, self.owner, self.names_decoders)
        parser.link_arguments("data.family", f"{self.owner}.family")
        parser.link_arguments("seed", f"{self.owner}.seed")

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add what only this command has."""

    def used_decoders(self) -> Sequence[str]:
        """The decoders of a run that names none."""
        return ()

    def add_own_options(self, parser: LightningArgumentParser, section: str, names: str) -> None:
        """The options of every decoder and of every kind of reward, a stranger's among them where it is named."""
        self.decoders = dict(DECODERS)
        named = self.seen.get(f"{section}.{names}") or []
        for name in [named] if isinstance(named, str) else named:
            if isinstance(name, str) and name not in self.decoders:
                with before_parsing():
                    kind = decoder_class(name, argument=f"{section}.{names}")
                self.decoders[kind.name] = kind
        for name, kind in self.decoders.items():
            parser.add_class_arguments(kind, f"{section}.{name}")
        parser.link_arguments(self.beta_option, f"{section}.nabla.dto.beta", compute_fn=usable_beta)
        for role in ("reward", "gold"):
            given = self.seen.get(f"{section}.{role}.kind")
            if isinstance(given, str) and given not in REWARDS:
                with before_parsing():
                    reward = reward_class(given, argument=f"{section}.{role}.kind")
                parser.add_method_arguments(
                    reward, "load", f"{section}.{given.rpartition('.')[2]}", skip={"options", "device", "argument"}
                )

    def setup_parser(self, add_subcommands: bool, main_kwargs: dict, subparser_kwargs: dict) -> None:
        """Set the parser up, and answer a call for help."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        self.parser.set_defaults(self.trainer_settings())
        if self.topic is not None:
            print(help_text(self, self.topic))  # noqa: T201
            raise SystemExit(0)

    def trainer_settings(self) -> dict[str, Any]:
        """What Lightning's trainer is not asked to do."""
        return {
            "trainer.logger": False,
            "trainer.enable_checkpointing": False,
            "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False,
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is wrong is said in this project's words."""
        with quiet_arguments():
            try:
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                raise Complaint(explain(str(error), option_names(parser), given_configs(args))) from error
            except UnicodeDecodeError as error:
                raise Complaint(explain("Problems parsing config", (), given_configs(args))) from error

    def before_instantiate_classes(self) -> None:
        """Refuse what a type cannot: values that are no numbers, and precisions beside the models' own types."""
        if self.prints_config:
            print(config_text(self))  # noqa: T201
            raise SystemExit(0)
        check_numbers(self.config)
        if self.config.trainer.precision not in self.precisions:
            raise Complaint(
                f"--trainer.precision: expected none, found {self.config.trainer.precision}. Weights have their own "
                f"types: use --{self.owner}.policy.dtype and --{self.owner}.reward.dtype."
            )

    def instantiate_classes(self) -> None:
        """Build everything; errors name the option as it is written on the command line."""
        with spelling(self.parser):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; what it cannot do on this machine is an error of the input."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            found = " ".join(str(error).split())[:240]
            raise Complaint(
                f"--trainer: expected options that work here, found: {found} See --help trainer."
            ) from error

    def results_config(self) -> dict[str, Any]:
        """What decides the results: the whole configuration, less where and on what it runs."""
        return plain_config(self.parser, self.config)

    def folder(self, default: str = "default") -> Path:
        """Where the results go."""
        return Path(self.config.run_dir or Path("runs") / self.verb / config_name(self.config, default))


def usable_beta(beta: float) -> float:
    """β of DTO; a β that it cannot take is refused, or allowed, where it is given."""
    return beta if beta > 0 else 1.0


@contextmanager
def quiet_arguments() -> Iterator[None]:
    """Within, Lightning does not warn that its arguments are handed over rather than read from the process."""
    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = before


def check_numbers(config: Any) -> None:
    """Refuse NaN, which every type and every comparison lets through."""
    for name, value in flatten(config.as_dict()).items():
        if isinstance(value, float) and math.isnan(value):
            raise Complaint(f"--{name}: expected a number, found {value}.")


def plain_config(parser: ArgumentParser, parsed: Any) -> dict[str, Any]:
    """Options that a parser has read, less where and on what a run works."""
    config = yaml.safe_load(parser.dump(parsed, skip_link_targets=False, skip_none=False))
    for name in NOT_IN_RESULTS:
        config.pop(name, None)
    config.get("data", {}).pop("batch_size", None)
    return config


def config_name(config: Any, default: str = "default") -> str:
    """The name of the last YAML given with --config."""
    files = [Path(str(file)).stem for file in (config.config or []) if file is not None]
    files = [name for name in files if name != "real"]
    return files[-1] if files else default


# Help


def without_help(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The command line without --help, and what it asks help on: "" for the whole command, None for nothing."""
    rest, topic = [], None
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            topic = words.pop(0) if words and not words[0].startswith("-") else ""
        else:
            rest.append(word)
    return rest, topic


def help_text(cli: VerbCLI, topic: str) -> str:
    """The help of a command, or of one group of its options: two lines an option, its name with the default, and what
    it means."""
    parser, hidden = cli.parser, hidden_groups(cli)
    shown = [action for action in parser._actions if is_option(action)]
    groups = sorted({group for action in shown if (group := group_of(action, cli))} | set(hidden))
    if topic and topic not in groups:
        close = difflib.get_close_matches(topic, groups, 1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise Complaint(f"--help: expected one of {', '.join(groups)}, found {topic!r}.{guess}")
    if topic:
        lines = [f"usage: nabla-rl {cli.verb} [--config NAME] [--OPTION VALUE ...]", "", f"{topic}:"]
        shown = [action for action in shown if group_of(action, cli) == topic]
    else:
        lines = [f"usage: nabla-rl {cli.verb} [--config NAME] [--OPTION VALUE ...]", "", cli.description.strip(), ""]
        shown = [action for action in shown if group_of(action, cli) not in hidden]
    heading = None
    for action in sorted(shown, key=lambda action: heading_of(action, cli) or ""):
        if heading_of(action, cli) != heading:
            heading = heading_of(action, cli)
            lines += ["", f"{heading}:"]
        lines += option_help(action, parser)
    if not topic and hidden:
        lines += ["", "more options:"]
        lines += [f"  --help {name:<18}{text}" for name, text in sorted(hidden.items())]
    return "\n".join(lines)


def is_option(action: argparse.Action) -> bool:
    """Whether a user may set it by itself."""
    name = next((option for option in action.option_strings if option.startswith("--")), "")
    return (
        bool(name)
        and action.help != argparse.SUPPRESS
        and name not in ("--help", "--print_config", "--seed_everything")
        and not (
            name.endswith(".help")
            or type(action).__name__ in ("_ActionConfigLoad", "ActionLink", "_ActionHelpClassPath")
        )
    )


def group_of(action: argparse.Action, cli: VerbCLI) -> str | None:
    """The group that --help shows an option in: a decoder's, a reward's own, the trainer's; None for the rest."""
    parts = action.dest.split(".")
    if parts[0] == "trainer":
        return "trainer"
    if parts[0] == cli.owner and len(parts) > 2 and (parts[1] in cli.decoders):
        return parts[1]
    return None


def heading_of(action: argparse.Action, cli: VerbCLI) -> str | None:
    """The heading that an option stands under: none for the run's own, a decoder's name, or the section."""
    section, dot, _ = action.dest.partition(".")
    group = group_of(action, cli)
    return f"{section}, {group}" if dot and group and group != section else section if dot else None


def hidden_groups(cli: VerbCLI) -> dict[str, str]:
    """Groups that the plain help leaves out: the trainer, and decoders that this run does not use."""
    hidden = {"trainer": "Lightning's trainer: devices, precision, strategy"}
    used = cli.seen.get(f"{cli.owner}.{cli.names_decoders}") or cli.used_decoders()
    names = {str(name).rpartition(".")[2] for name in ([used] if isinstance(used, str) else used)}
    for name, kind in cli.decoders.items():
        if name not in names and kind.__name__ not in names and has_options(kind):
            hidden[name] = first_line(kind)
    return hidden


def has_options(kind: type[AbstractDecoder]) -> bool:
    """Whether a decoder has options of its own."""
    return is_dataclass(kind) and bool(fields(kind))


def first_line(kind: type) -> str:
    """The first line of a class's documentation, without its full stop."""
    return re.split(r"[:;,.]", (kind.__doc__ or kind.__name__).strip())[0]


def option_help(action: argparse.Action, parser: ArgumentParser) -> list[str]:
    """Two lines: the option with its default, and what it means."""
    name = next(option for option in action.option_strings if option.startswith("--"))
    default = parser.get_default(action.dest) if action.dest in _defaults(parser) else None
    kind = choices_of(action)
    value = "null" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
    text = " ".join(str(action.help or "").replace("%%", "%").split())
    text = re.sub(r" ?\((?:required|type: .*|default: .*)\)$", "", text)
    return [f"  {name} {kind + ' ' if kind else ''}[{value}]", f"      {text}"]


def _defaults(parser: ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}


def choices_of(action: argparse.Action) -> str:
    """The values of an option that has few."""
    kind = getattr(action, "_typehint", None)
    literals = re.findall(r"Literal\[(.*?)\]", str(kind))
    return "{" + ",".join(part.strip().strip("'\"") for part in literals[0].split(",")) + "}" if literals else ""


def config_text(cli: VerbCLI) -> str:
    """The configuration as commented YAML, without the trainer's options."""
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    for name in ("config", "trainer", "seed_everything"):
        config.pop(name, None)
    meaning = {
        action.dest: " ".join(str(action.help or "").replace("%%", "%").split())
        for action in cli.parser._actions
        if is_option(action)
    }
    lines = [f"# The options of `nabla-rl {cli.verb}`: save this as mine.yaml, change it, and run"]
    lines += [f"#   nabla-rl {cli.verb} --config mine.yaml"]
    return "\n".join([*lines, *commented(config, meaning)])


def commented(values: Mapping[str, Any], meaning: Mapping[str, str], prefix: str = "") -> list[str]:
    """Nested values as lines of YAML, each with its meaning before it."""
    lines: list[str] = []
    pad = "  " * prefix.count(".")
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{pad}{name}:", *commented(value, meaning, f"{prefix}{name}.")]
            continue
        text = re.sub(r" ?\((?:required|type: .*|default: .*)\)$", "", meaning.get(f"{prefix}{name}", ""))
        if text:
            lines.append(f"{pad}# {text}")
        dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
        lines.append(f"{pad}{name}: {dumped.removesuffix('...' + chr(10)).strip()}")
    return lines


# Around a run


def wide_console() -> Console:
    """A console that does not squeeze the table, also where the output is not a terminal."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


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


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


SMALL = 50_000_000
"""Weights below which one thread is faster than two that wait for each other."""


def choose_threads(*models: torch.nn.Module | None) -> None:
    """Compute on one thread where all models are small and on the CPU, unless OMP_NUM_THREADS says otherwise."""
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in models if model is not None]
    on_cpu = all(next(m.parameters(), torch.zeros(())).device.type == "cpu" for m in models if m is not None)
    if on_cpu and "OMP_NUM_THREADS" not in os.environ and max(sizes, default=0) < SMALL:
        torch.set_num_threads(1)


def tell(notices: Iterable[str | None], level: str = "warning") -> None:
    """Print notices to the error stream, one line each."""
    for notice in notices:
        if notice:
            print(f"{level}: {notice}", file=sys.stderr)  # noqa: T201
