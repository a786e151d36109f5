"""Studies call functions: no command line, no other process, no captured output."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nabla_rl.report
import nabla_rl.studies

STUDIES = sorted(Path(nabla_rl.studies.__path__[0]).glob("*.py"))
REPORT = sorted(Path(nabla_rl.report.__path__[0]).glob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module that a file imports, at its head or within a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_study_composes_no_command_line(file):
    assert not {name for name in imports(file) if name.startswith("nabla_rl.cli")}
    assert not imports(file) & {"subprocess", "contextlib.redirect_stdout", "io.StringIO", "sys"}
    text = file.read_text(encoding="utf-8")
    for word in ("redirect_stdout", "subprocess", "sys.argv", "parse_args", '"--model', "'--model", 'f"--{'):
        assert word not in text.replace('add_argument(f"--{name}"', ""), word


@pytest.mark.parametrize("file", REPORT, ids=lambda file: file.stem)
def test_a_report_knows_no_study(file):
    assert not {name for name in imports(file) if name.startswith(("nabla_rl.studies", "nabla_rl.cli", "lightning"))}
