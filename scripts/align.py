"""Move a policy's weights towards the tilted policy, by reinforcement learning: `python scripts/align.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nabla_rl.cli.app import align  # noqa: E402

if __name__ == "__main__":
    sys.exit(align())
