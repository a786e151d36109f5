"""The command line answers a question about itself without the heavy libraries, and guesses what was meant."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nabla_rl.cli import app


def test_help_imports_no_heavy_library():
    code = (
        "import sys; from nabla_rl.cli import app; assert app.main(['--help']) == 0; "
        "print([name for name in ('torch', 'lightning', 'transformers', 'trl', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() and done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("verb", "guess"), [("decod", "decode"), ("train_tiny", "train-tiny"), ("aling", "align"), ("ablat", "ablate")]
)
def test_a_mistyped_verb_is_met_with_a_guess(verb, guess, capsys):
    assert app.main([verb]) == 2
    assert f"Did you mean {guess}?" in capsys.readouterr().err


def test_config_wants_a_verb(capsys):
    assert app.main(["config", "decod"]) == 2
    assert "expected one of decode, align, distill" in capsys.readouterr().err


@pytest.mark.parametrize("verb", app.CONFIGURED)
def test_help_of_every_verb_fits_in_100_columns(verb, capsys):
    with pytest.raises(SystemExit):
        app.main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 100] == []
    assert sum(line.startswith("  --") for line in lines) > 40
