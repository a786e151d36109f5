"""Make one of the embedded tiny models: `python scripts/train_tiny.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nabla_rl.cli.app import train_tiny  # noqa: E402

if __name__ == "__main__":
    sys.exit(train_tiny())
