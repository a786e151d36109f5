"""Decode problems with ∇-Reasoner and its rivals: `python scripts/decode.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nabla_rl.cli.app import decode  # noqa: E402

if __name__ == "__main__":
    sys.exit(decode())
