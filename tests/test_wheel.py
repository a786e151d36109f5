"""A wheel runs with the settings of a checkout: its files, and the configuration that each verb resolves."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERBS = ("decode", "align", "distill")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An empty folder with the wheel in it, and nothing else of this project."""
    made, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    quiet = ["-q", "--disable-pip-version-check", "--no-deps"]
    build = [sys.executable, "-m", "pip", "wheel", *quiet, "--no-build-isolation", "-w", str(made), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = made.glob("nabla_rl-*.whl")
    install = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(target), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def resolved(verb: str, where: Path, folder: Path) -> str:
    """What `nabla-rl config VERB` prints with the package from `where`."""
    code = "import sys, nabla_rl; from nabla_rl.cli.app import main; print(nabla_rl.__file__, file=sys.stderr); "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}main(['config', {verb!r}])"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(where)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(where) in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_wheel_has_the_checkouts_defaults(verb, installed, tmp_path):
    ours, theirs = resolved(verb, installed, tmp_path), resolved(verb, ROOT, tmp_path)
    assert ours == theirs
    assert "tiny-policy" in ours  # the shipped default file was read


@pytest.mark.slow
def test_a_wheel_has_every_file(installed):
    for folder, place in (("configs", "nabla_rl/configs"), ("nabla_rl/assets", "nabla_rl/assets")):
        files = {file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*") if file.is_file()}
        assert files and all((installed / place / file).is_file() for file in files)


def test_every_folder_with_code_is_a_package_that_ships():
    with (ROOT / "pyproject.toml").open("rb") as file:
        named = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    rooms = {str(init.parent.relative_to(ROOT)).replace("/", ".") for init in (ROOT / "nabla_rl").rglob("__init__.py")}
    assert named == rooms | {"nabla_rl.configs"}
