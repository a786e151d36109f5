"""Carry what decoding found into the weights of a student: `python scripts/distill.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nabla_rl.cli.app import distill  # noqa: E402

if __name__ == "__main__":
    sys.exit(distill())
