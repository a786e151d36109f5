"""The benchmarks are run by hand; that they still run is tested with their smallest sizes, as what they use moves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_a_benchmark_starts_and_says_what_it_measures(file: Path):
    done = subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--json" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [file.stem for file in BENCHMARKS if file.stem != "gpu"])
def test_a_benchmark_runs_to_its_end(name: str, tmp_path: Path):
    command = [
        sys.executable,
        str(BENCHMARKS[0].with_name(f"{name}.py")),
        "--quick",
        "--json",
        str(tmp_path / "r.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.json").stat().st_size > 2
