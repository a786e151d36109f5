"""From dotted options to the arguments of plain functions and classes, checked by their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from nabla_rl.decoding.run import plain
from nabla_rl.studies.base import Options, guess
from nabla_rl.types import UserError

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


class OptionReader:
    """Reads options that are named as a verb names them; nothing of a command line is in it.

    Args:
        verb: The verb, for the messages.
        parts: Section → the class or function whose arguments its options are, such as `data` → `ProblemData`.
        values: Name → type and default of single options, such as `model.beta` → (float, 1.0).
        defaults: Dotted defaults in place of the signatures' own.
        loaders: Section → a class whose `load` has further options.
    """

    def __init__(
        self,
        verb: str,
        parts: Mapping[str, Any],
        values: Mapping[str, tuple[Any, Any]],
        defaults: Mapping[str, Any],
        *,
        loaders: Mapping[str, type] = MappingProxyType({}),
    ):
        self.verb = verb
        self.parser = ArgumentParser(exit_on_error=False)
        for section, part in parts.items():
            self.parser.add_class_arguments(part, section)
        for section, kind in loaders.items():
            self.parser.add_method_arguments(kind, "load", section, skip={"options", "device", "argument"})
        for name, (kind, default) in values.items():
            self.parser.add_argument(f"--{name}", type=kind, default=default)
        self.parser.set_defaults(dict(defaults))
        names = [action.dest for action in self.parser._actions if action.dest != "help"]
        self.known = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]

    def parse(self, options: Options) -> Any:
        """All options with their defaults, as the parser has them.

        Raises:
            UserError: There is no such option, or its value has another type; the error names the study file's place.
        """
        for name in options:
            if name not in self.known:
                raise UserError(
                    options.place(name), f"an option of {self.verb}", "an unknown one", guess(name, self.known)
                )
        try:
            return self.parser.parse_object(nested(options))
        except ArgumentError as error:
            for name, value in options.items():
                if not self._accepts({name: value}):
                    raise UserError(options.place(name), self._expected(name), repr(value)) from error
            raise UserError(f"options of {self.verb}", "options that go together", str(error)) from error

    def build(self, parsed: Any, options: Options) -> Any:
        """The objects that the options stand for."""
        with options.placing():
            return self.parser.instantiate(parsed)

    def plain(self, parsed: Any) -> dict[str, Any]:
        """All options as plain values."""
        return plain(parsed.as_dict())

    def _accepts(self, option: Mapping[str, Any]) -> bool:
        try:
            self.parser.parse_object(nested(option))
        except ArgumentError:
            return False
        return True

    def _expected(self, name: str) -> str:
        action = next(action for action in self.parser._actions if action.dest == name)
        return type_words(getattr(action, "_typehint", None))


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping of dotted names as nested mappings."""
    tree: dict[str, Any] = {}
    for name, value in options.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def type_words(hint: Any) -> str:
    """A type in plain words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_words(each) for each in inner))
    if origin in (list, tuple) or hint in (list, tuple) or origin is Sequence:
        return "a list"
    return PLAIN.get(hint, getattr(hint, "__name__", "a value of another type"))
