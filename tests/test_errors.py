"""Errors have structure: a setting by its name in Python, what was expected and found; the command line alone has
options."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from nabla_rl.cli.base import spell, spelled
from nabla_rl.types import UserError

PACKAGE = Path(__file__).parents[1] / "nabla_rl"
BELOW = sorted(file for file in PACKAGE.rglob("*.py") if "cli" not in file.relative_to(PACKAGE).parts)
OPTIONS = [
    "--model.beta",
    "--model.rl.beta",
    "--model.sampling.top_p",
    "--model.nabla.dto.tau",
    "--data.path",
    "--run_dir",
]


def test_the_line_says_what_where_and_what_to_do():
    error = UserError("sampling.top_p", "a number in (0, 1]", "2", "Use {beta} = 1, or none.")
    assert str(error) == "sampling.top_p: expected a number in (0, 1], found 2. Use `beta` = 1, or none."
    assert (error.option, error.expected, error.found) == ("sampling.top_p", "a number in (0, 1]", "2")
    assert str(UserError("beta", "a number", "x")) == "beta: expected a number, found x."


def test_settings_are_renamed_and_texts_of_the_user_are_not():
    error = UserError("beta", "less than {limit}", "{beta} or so", "Lower {beta}.").within("teacher")
    assert str(error) == "teacher.beta: expected less than `teacher.limit`, found {beta} or so. Lower `teacher.beta`."
    assert UserError("problem 'p1'", "a", "b").within("teacher").option == "problem 'p1'"


def test_a_long_or_hostile_text_stays_one_printable_line_of_400_characters():
    line = str(UserError("data.path", "a file", "\x1b[31m" + "x" * 5000 + "\n", "Check the path."))
    assert len(line) <= UserError.LIMIT and line.isprintable() and line.endswith("Check the path.")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("beta", "--model.beta"),
        ("rl.beta", "--model.rl.beta"),
        ("tau", "--model.nabla.dto.tau"),
        ("data.path", "--data.path"),
        ("run_dir", "--run_dir"),
        ("problem 'p1'", None),
    ],
)
def test_the_command_line_spells_settings(name, option):
    assert spell(name, OPTIONS) == option


def test_an_error_on_the_command_line():
    error = UserError("tau", "a positive number", "0", "Or set {sampling.top_p}.")
    said = "--model.nabla.dto.tau: expected a positive number, found 0. Or set --model.sampling.top_p."
    assert spelled(error, OPTIONS) == said


@pytest.mark.parametrize("file", BELOW, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_message_below_the_command_line_spells_an_option(file):
    """Nor is a message taken apart, or one text replaced by another in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
            assert len(node.args) >= 3, f"line {node.lineno}: option, expected and found are three things"
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            assert not any(isinstance(text, str) and "--" in text for text in texts), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in ("replace", "partition", "split"):
            source = ast.unparse(node.value)
            assert source not in ("str(error)", "message"), f"line {node.lineno}: {source}"
