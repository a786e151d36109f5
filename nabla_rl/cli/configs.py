"""The YAML files that are shipped, by verb and name."""

from __future__ import annotations

import difflib
from pathlib import Path

from nabla_rl.types import UserError


def folder(verb: str) -> Path:
    """The folder of a verb's files."""
    return Path(__file__).parents[2] / "configs" / verb


def default(verb: str, name: str = "default") -> Path | None:
    """A shipped file, where there is one."""
    file = folder(verb) / f"{name}.yaml"
    return file if file.is_file() else None


def find(verb: str, name: str) -> Path:
    """The file that --config NAME means."""
    if Path(name).is_file() or name.endswith((".yaml", ".yml")):
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
