"""The command line answers a question about itself at once."""

from __future__ import annotations

import subprocess
import sys
import time


def test_help_comes_within_three_seconds():
    """The best of three: the claim is about the imports behind `--help`, not about what else the machine is doing."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "nabla_rl.cli.app", "--help"], capture_output=True, text=True, timeout=120
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3, f"--help took {min(seconds):.1f} s"
