"""A decoder on many problems side by side against the same problems one at a time, with the embedded models.

Both give the same answers, which is checked: the share of problems whose whole result (tokens and rollouts tried) is
equal is printed. The figure is the median ratio over interleaved repetitions in one run, of the process's own seconds
(all threads added up; one by default), or with `--wall` of wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from _common import parser, ratio, table, write_json  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from nabla_rl.data.problems import Problem  # noqa: E402
from nabla_rl.data.tiny import FAMILIES, generate  # noqa: E402
from nabla_rl.decoding import DECODERS, Decoded, Sampling, Setting  # noqa: E402
from nabla_rl.ledger import Ledger  # noqa: E402
from nabla_rl.models.loading import ASSETS, load_policy  # noqa: E402
from nabla_rl.rewards.loading import load_reward  # noqa: E402

GOAL = 3


def embedded(family: str) -> bool:
    """Are there both models of a family?"""
    return all((ASSETS / family / name / "model.safetensors").is_file() for name in ("tiny-policy", "tiny-reward"))


def choose_family(wanted: str) -> str:
    """The family, or the first one that has its models, with a word about it."""
    if embedded(wanted):
        return wanted
    others = [name for name in FAMILIES if embedded(name)]
    if not others:
        raise SystemExit("batching: no family has tiny-policy and tiny-reward in nabla_rl/assets. Run `make models`.")
    print(f"batching: no tiny-policy and tiny-reward for '{wanted}' in nabla_rl/assets: taking '{others[0]}'.")
    return others[0]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--family", choices=sorted(FAMILIES), default="words")
    options.add_argument("--problems", type=int, default=64)
    options.add_argument(
        "--decoder", choices=sorted(DECODERS), default="edit_search", help="which decoder is batched",
    )  # fmt: skip
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--wall", action="store_true", help="measure wall-clock time: for a machine of one's own")
    options.add_argument(
        "--profile", action="store_true", help="print where batched decoding spends its time, and stop"
    )
    args = options.parse_args()
    if args.quick:
        args.problems, args.repetitions = 8, 1
    args.family = choose_family(args.family)
    family, device = FAMILIES[args.family], torch.device("cpu")
    disable_progress_bar()
    policy = load_policy(f"{args.family}/tiny-policy", device=device)
    reward = load_reward(f"{args.family}/tiny-reward", device=device)
    problems = list(itertools.islice(generate(family, "validation", 0), args.problems))
    sampling = Sampling(max_new_tokens=family.max_new_tokens)
    decoder = DECODERS[args.decoder]()

    def decode(some: list[Problem]) -> list[Decoded]:
        return decoder.decode(some, Setting(policy, reward, Ledger(len(some)), sampling=sampling))

    def batched() -> list[Decoded]:
        return decode(problems)

    def one_at_a_time() -> list[Decoded]:
        return [decode([problem])[0] for problem in problems]

    if args.profile:
        profile(batched, args)
        return
    clock = time.perf_counter if args.wall else time.process_time
    works = {"one at a time": one_at_a_time, "batched": batched}
    times: dict[str, list[float]] = {name: [] for name in works}
    results = {}
    decode(problems[:2])  # warm-up
    for repetition in range(args.repetitions):
        for name in list(works)[:: 1 if repetition % 2 == 0 else -1]:
            start = clock()
            results[name] = works[name]()
            times[name].append(clock() - start)
    same = sum(
        a.ids == b.ids and [c.ids for c in a.rollouts] == [c.ids for c in b.rollouts]
        for a, b in zip(*results.values(), strict=True)
    )
    middle, low, high = ratio(times, "one at a time", "batched")
    print(
        f"{args.decoder} on {args.problems} problems of '{args.family}'; "
        f"{torch.get_num_threads()} thread(s), {args.repetitions} repetitions, "
        f"{'wall' if args.wall else 'process'} time"
    )
    rows = [[name, *(f"{f(seconds):.2f}" for f in (min, max))] for name, seconds in times.items()]
    table(["", "fastest s", "slowest s"], rows)
    print(f"batched is {middle:.2f} times as fast (from {low:.2f} to {high:.2f}); goal: at least {GOAL} times")
    print(f"the same result for {same} of {args.problems} problems")
    figures = {"seconds": times, "speedup": middle, "same_results": same}
    kept = {name: value for name, value in vars(args).items() if name != "json"}
    write_json(args.json, "batching", {"options": kept, **figures})


def profile(work, args: argparse.Namespace) -> None:
    """Where the time goes, by function."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(work)
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
