"""The YAML files that are shipped, by verb and name.

They stand in configs/ at the top of the repository, and in a wheel as the package `nabla_rl.configs`.
"""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from nabla_rl.types import UserError

CHECKOUT = Path(__file__).parents[2] / "configs"


def root() -> Path:
    """The folder of all files: the checkout's own where the package lies in one, else the installed package's."""
    if (CHECKOUT / "decode" / "default.yaml").is_file():
        return CHECKOUT
    spec = find_spec("nabla_rl.configs")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("config", "the files of nabla_rl.configs beside the package", "none", "Install it anew.")
    return Path(next(iter(spec.submodule_search_locations)))


def folder(verb: str) -> Path:
    """The folder of a verb's files."""
    return root() / verb


def default(verb: str, name: str = "default") -> Path | None:
    """A shipped file, where there is one."""
    file = folder(verb) / f"{name}.yaml"
    return file if file.is_file() else None


def find(verb: str, name: str) -> Path:
    """The file that --config NAME means: a path, or the name of a shipped file such as `published`."""
    if Path(name).is_file() or name.endswith((".yaml", ".yml")) or name.startswith((".", "/", "~")):
        return Path(name)
    found = default(verb, name)
    if found is None:
        known = sorted(str(file.relative_to(folder(verb)).with_suffix("")) for file in folder(verb).rglob("*.yaml"))
        close = difflib.get_close_matches(name, known, 1)
        guess = f"Did you mean {close[0]}?" if close else ""
        listed = ", ".join(known)
        shipped = f"one of the shipped ones: {listed}" if len(listed) < 160 else f"the name of one in configs/{verb}"
        raise UserError("config", f"a YAML file or {shipped}", repr(name), guess)
    return found
