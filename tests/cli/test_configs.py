"""Every YAML that is shipped parses against the real command line; the default one is what runs without options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from nabla_rl.cli import decode as decode_cli
from nabla_rl.cli.decode import CONFIGS, DecodeCLI
from nabla_rl.data.module import ProblemData
from nabla_rl.decoding.module import Decoding
from nabla_rl.run_folder import flatten
from nabla_rl.types import UserError

FILES = sorted(CONFIGS.rglob("*.yaml"))
DEFAULT = CONFIGS / "default.yaml"


class ParsedOnly(DecodeCLI):
    """Options without what they build, but for the dataclasses and their checks."""

    def instantiate_classes(self) -> None:
        """No trainer, no problems, no models."""
        self.options = self.parser.instantiate_classes(self.config).model


def parse(arguments: Sequence[str], *, defaults: Sequence[str] = ()) -> dict[str, Any]:
    cli = ParsedOnly(
        Decoding,
        ProblemData,
        run=False,
        args=list(arguments),
        seed_everything_default=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={"exit_on_error": False, "default_config_files": list(defaults)},
    )
    return decode_cli.results_config(cli)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_file_parses_and_its_values_arrive(file):
    given = flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    config = flatten(parse(["--config", str(file)]))
    for name, value in given.items():
        if name.split(".")[0] not in decode_cli.NOT_IN_RESULTS and name != "data.batch_size":
            assert config[name] == value, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_file_names_no_folder_of_one_machine(file):
    for name, value in flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
        assert not (isinstance(value, str) and Path(value).is_absolute()), name


@pytest.mark.skipif(not DEFAULT.is_file(), reason="no default configuration in this version")
def test_without_options_runs_what_the_default_file_says():
    assert parse([], defaults=[str(DEFAULT)]) == parse(["--config", str(DEFAULT)])


def test_a_file_with_an_unknown_or_mistyped_option_is_refused(tmp_path):
    """What the tests above rely on."""
    for content, complaint in (
        ("model:\n  betta: 1\n", "--model.betta: expected an option"),
        ("model:\n  beta: much\n", "--model.beta: expected a number, found 'much'"),
        ("data:\n  split: exam\n", "--data.split: expected one of train, validation, test, hard, found 'exam'"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=complaint):
            parse(["--config", str(tmp_path / "bad.yaml")])
