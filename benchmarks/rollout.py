"""What a decoded token costs beyond the model's own arithmetic: the short cached step against transformers' forward.

    python benchmarks/rollout.py

Decodes the same problems with the embedded models twice in turn, once with every one-token step taken through the
model's own forward (a hook on it asks for that), once the short way (`nabla_rl.models.stepping`). Answers must be the
same; CPU seconds a problem and their ratio are medians over repetitions.
"""

from __future__ import annotations

import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from _common import parser, write_json  # noqa: E402

from nabla_rl.data.problems import Problem  # noqa: E402
from nabla_rl.data.tiny import FAMILIES, generate  # noqa: E402
from nabla_rl.decoding import AbstractDecoder, BestOfN, Decoded, EditSearch, Greedy, Sampling, Setting  # noqa: E402
from nabla_rl.ledger import Ledger  # noqa: E402
from nabla_rl.models.loading import load_policy  # noqa: E402
from nabla_rl.models.policy import Policy  # noqa: E402
from nabla_rl.rewards.base import AbstractReward  # noqa: E402
from nabla_rl.rewards.loading import load_reward  # noqa: E402

TOKENS = {"words": 88, "sorting": 20}


def timed(
    decoder: AbstractDecoder,
    batches: list[list[Problem]],
    policy: Policy,
    reward: AbstractReward,
    sampling: Sampling,
) -> tuple[float, list[Decoded]]:
    """CPU seconds a problem, and the answers."""
    start = time.process_time()
    found: list[Decoded] = []
    for batch in batches:
        found += decoder.decode(batch, Setting(policy, reward, Ledger(len(batch)), sampling=sampling))
    return (time.process_time() - start) / len(found), found


def main() -> None:
    """Print a line for each family and decoder."""
    options = parser(__doc__)
    options.add_argument("--problems", type=int, default=64)
    options.add_argument("--batch_size", type=int, default=16)
    options.add_argument("--repeats", type=int, default=5)
    asked = options.parse_args()
    if asked.quick:
        asked.problems, asked.repeats = 4, 1
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    figures: dict[str, dict[str, float]] = {}
    for name, width in TOKENS.items():
        problems = list(islice(generate(FAMILIES[name], "validation", 0), asked.problems))
        batches = [problems[at : at + asked.batch_size] for at in range(0, len(problems), asked.batch_size)]
        policy = load_policy(f"{name}/tiny-policy", device=cpu)
        reward = load_reward(f"{name}/tiny-reward", device=cpu)
        assert reward is not None
        decoders: dict[str, AbstractDecoder] = {
            "greedy": Greedy(),
            "edit search": EditSearch(),
            "best-of-8": BestOfN(8),
        }
        sampling = Sampling(max_new_tokens=width)

        for label, decoder in decoders.items():
            seconds: dict[bool, list[float]] = {True: [], False: []}
            answers = {}
            for _ in range(asked.repeats):
                for short in (True, False):
                    handle = None if short else policy.backbone.base.register_forward_hook(lambda *_: None)
                    spent, answers[short] = timed(decoder, batches, policy, reward, sampling)
                    seconds[short].append(spent)
                    if handle is not None:
                        handle.remove()
            assert [one.ids for one in answers[True]] == [one.ids for one in answers[False]]
            before, after = (statistics.median(seconds[short]) for short in (False, True))
            print(f"{name:8} {label:12} {before:.4f} s -> {after:.4f} s a problem, ratio {before / after:.2f}")
            figures[f"{name}, {label}"] = {"before": before, "after": after, "ratio": before / after}
    write_json(asked.json, "rollout", figures)


if __name__ == "__main__":
    main()
