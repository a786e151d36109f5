"""Classes by name: one of those that there are, or a class path of the user's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from nabla_rl.types import UserError

T = TypeVar("T")


def import_subclass(name: str, known: Mapping[str, type[T]], base: type[T], *, argument: str) -> type[T]:
    """The class of that name.

    Args:
        name: One of the known names, or a class path such as my_package.MyClass; modules of the working folder count.
        known: The classes that go by a name.
        base: What the class must be a subclass of.
        argument: The setting that errors are about.

    Raises:
        UserError: There is no such name, no such module or class, or it is no subclass of `base`.
    """
    if name in known:
        return known[name]
    names = ", ".join(known)
    module, dot, attribute = name.rpartition(".")
    if not dot or not module:
        close = get_close_matches(name, known, 1)
        guess = f"Did you mean {close[0]}?" if close else "Name one of them, or a class path of your own."
        raise UserError(argument, f"one of {names}, or a class path such as my_package.MyClass", repr(name), guess)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    expected = f"one of {names}, or the class path of a subclass of {base.__name__}"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything while it is imported
        raise UserError(
            argument,
            expected,
            f"{name!r}, which cannot be imported ({type(error).__name__}: {error})",
            "Mend the path or the module.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(argument, expected, f"{name!r}, which is {found!r}", f"Derive it from {base.__name__}.")
    return found
