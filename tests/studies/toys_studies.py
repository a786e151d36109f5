"""What the tests of studies share: small studies on the toy models of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nabla_rl.cli import configs
from nabla_rl.cli.ablate import build_parser
from tests.cli import toys_cli

CONFIGS = sorted(configs.folder("ablate").glob("*.yaml"))


def options_of(models: Path, **changes: object) -> dict[str, Any]:
    """The options of a small run as a study file has them."""
    words = toys_cli.options(models, **changes)
    values = dict(zip(words[::2], words[1::2], strict=True))
    plain = {name.removeprefix("--"): yaml.safe_load(value) for name, value in values.items()}
    return {name: None if value == "None" else value for name, value in plain.items()}


def study_options(file: Path) -> Any:
    """A study file as the command reads it."""
    parser = build_parser()
    return parser.instantiate(parser.parse_args(["--config", str(file)]))
