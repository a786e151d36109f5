"""Every YAML that is shipped parses against the real command line; the default one is what runs without options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from nabla_rl.alignment.aligner import PolicyAligner
from nabla_rl.alignment.data import AlignmentData
from nabla_rl.cli import configs
from nabla_rl.cli.align import AlignCLI
from nabla_rl.cli.base import NOT_IN_RESULTS, Complaint, VerbCLI
from nabla_rl.cli.decode import DecodeCLI
from nabla_rl.cli.distill import DistillCLI
from nabla_rl.data.module import ProblemData
from nabla_rl.decoding.module import DecodingModule
from nabla_rl.distillation.data import DistillationData
from nabla_rl.distillation.distiller import PolicyDistiller
from nabla_rl.run_folder import flatten

VERBS: dict[str, tuple[type[VerbCLI], type, type]] = {
    "decode": (DecodeCLI, DecodingModule, ProblemData),
    "align": (AlignCLI, PolicyAligner, AlignmentData),
    "distill": (DistillCLI, PolicyDistiller, DistillationData),
}
FILES = [(verb, file) for verb in VERBS for file in sorted(configs.folder(verb).rglob("*.yaml"))]
NAMES = [f"{verb}/{file.stem}" for verb, file in FILES]


def parse(verb: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options that a command line gives, checked by the classes they are for, without what they build."""
    kind, module, data = VERBS[verb]

    class ParsedOnly(kind):
        def instantiate_classes(self) -> None:
            self.parser.instantiate_classes(self.config.clone())

    return ParsedOnly.read(arguments, module, data).results_config()


@pytest.mark.parametrize(("verb", "file"), FILES, ids=NAMES)
def test_file_parses_and_its_values_arrive(verb, file):
    given = flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    owner = VERBS[verb][0].owner
    # a file for real models leaves the reward model to the user
    named = [f"--{owner}.reward.name", "some/model"] if given.get(f"{owner}.reward.name", 0) is None else []
    config = flatten(parse(verb, ["--config", str(file), *named]))
    for name, value in given.items():
        if name.split(".")[0] not in NOT_IN_RESULTS and name not in ("data.batch_size", f"{owner}.reward.name"):
            assert config[name] == value, name


@pytest.mark.parametrize(("verb", "file"), FILES, ids=NAMES)
def test_file_is_found_by_its_name_and_names_no_folder_of_one_machine(verb, file):
    assert configs.find(verb, file.stem).samefile(file)
    for name, value in flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
        assert not (isinstance(value, str) and Path(value).is_absolute()), name


@pytest.mark.parametrize("verb", VERBS)
def test_without_options_runs_what_the_default_file_says(verb):
    assert parse(verb, []) == parse(verb, ["--config", "default"])


@pytest.mark.parametrize("verb", VERBS)
def test_a_policy_that_is_not_embedded_gets_the_values_for_real_models(verb):
    real = flatten(yaml.safe_load(configs.find(verb, "real").read_text(encoding="utf-8")))
    owner = VERBS[verb][0].owner
    config = flatten(parse(verb, [f"--{owner}.policy.name", "some/model", f"--{owner}.reward.name", "some/model"]))
    for name, value in real.items():
        if name.split(".")[0] not in NOT_IN_RESULTS and name not in ("data.batch_size", f"{owner}.reward.name"):
            assert config[name] == value, name


def test_a_file_with_an_unknown_or_mistyped_option_is_refused(tmp_path):
    """What the tests above rely on."""
    for content, complaint in (
        ("model:\n  betta: 1\n", "--model.betta: expected an option"),
        ("model:\n  beta: much\n", "--model.beta: expected a number, found 'much'"),
        ("data:\n  split: exam\n", "--data.split: expected one of train, validation, test, hard, found 'exam'"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(Complaint, match=complaint):
            parse("decode", ["--config", str(tmp_path / "bad.yaml")])


def test_a_wrong_name_is_met_with_a_guess():
    with pytest.raises(Complaint, match="Did you mean published?"):
        parse("decode", ["--config", "publshed"])
