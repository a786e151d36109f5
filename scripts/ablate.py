"""Hold the two sides of the duality against each other: `python scripts/ablate.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nabla_rl.cli.app import ablate  # noqa: E402

if __name__ == "__main__":
    sys.exit(ablate())
