"""Seconds a problem of the default decoder and of best-of-8, in one run, and what they are spent on.

    python benchmarks/where_time_goes.py
    python benchmarks/where_time_goes.py --family sorting

Greedy decoding, best-of-8, the default loop (`configs/decode/default.yaml`) and the published one with one step take
turns on the same validation problems, with the embedded models on one thread. Seconds are this process's own, medians
over the turns. The shares are the ledger's, of the last turn; `between` is what passes through neither model
(choosing, padding, turning tokens into text).
"""

from __future__ import annotations

import statistics
import sys
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import interleave, parser, table, write_json  # noqa: E402

from nabla_rl.data.tiny import FAMILIES, generate  # noqa: E402
from nabla_rl.decoding import AbstractDecoder, BestOfN, EditSearch, Greedy, Nabla, Sampling, Setting  # noqa: E402
from nabla_rl.ledger import Ledger, Stopwatch  # noqa: E402
from nabla_rl.models.loading import load_policy  # noqa: E402
from nabla_rl.rewards.loading import load_reward  # noqa: E402

TOKENS = {"words": 88, "sorting": 20}
TEMPERATURE = {"words": 0.8, "sorting": 1.0}


def shares(ledger: Ledger, seconds: float) -> dict[str, float]:
    """The share of `seconds` in each phase and model (forward and backward apart), and in neither."""
    spent = {
        f"{phase}, {model}{'' if direction == 'forward' else ' backward'}": float(account[:, 4].sum()) / seconds
        for (phase, model, direction), account in ledger.rows.items()
    }
    spent["between"] = 1 - sum(spent.values())
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def main() -> None:
    """Print a line and a table of shares for each decoder."""
    options = parser(__doc__)
    options.add_argument("--family", choices=sorted(FAMILIES), default="words")
    options.add_argument("--problems", type=int, default=64)
    options.add_argument("--repeats", type=int, default=5)
    asked = options.parse_args()
    if asked.quick:
        asked.problems, asked.repeats = 4, 1
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    problems = list(islice(generate(FAMILIES[asked.family], "validation", 0), asked.problems))
    policy = load_policy(f"{asked.family}/tiny-policy", device=cpu)
    reward = load_reward(f"{asked.family}/tiny-reward", device=cpu)
    sampling = Sampling(TEMPERATURE[asked.family], max_new_tokens=TOKENS[asked.family])
    decoders: dict[str, AbstractDecoder] = {
        "greedy": Greedy(),
        "best-of-8": BestOfN(8),
        "edit search": EditSearch(),
        "∇-Reasoner": Nabla(),
    }
    spent: dict[str, dict[str, float]] = {}

    def run(name: str) -> None:
        ledger, watch = Ledger(len(problems)), Stopwatch(cpu)
        decoders[name].decode(problems, Setting(policy, reward, ledger, sampling=sampling))
        spent[name] = shares(ledger, watch.seconds())

    times = interleave({name: lambda name=name: run(name) for name in decoders}, asked.repeats, cpu, warmup=1)
    seconds = {name: statistics.median(found) / len(problems) for name, found in times.items()}
    for name in decoders:
        print(f"{name}: {seconds[name]:.4f} s a problem, {seconds[name] / seconds['best-of-8']:.2f} of best-of-8")
        table(("spent on", "share"), [(what, f"{share:.0%}") for what, share in spent[name].items() if share >= 0.005])
        print()
    write_json(asked.json, f"where_time_goes_{asked.family}", {"seconds": seconds, "shares": spent})


if __name__ == "__main__":
    main()
