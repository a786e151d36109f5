"""Peak memory at a large vocabulary, over the whole of it and on 64 tokens for each position, beyond the models'
weights.

`dto`
    `nabla_rl.dto.run` (4 steps) from given logits, which are there before and after and are not counted: with a
    support, the search for its tokens (one gradient of both models, candidates over the whole vocabulary a few
    positions at a time) is part of it.
`decode`
    `Nabla.decode` of one problem with two rollouts and one optimisation between them, all of it counted: rollouts,
    what the search remembers of them, the probe, DTO.

Each case runs in a process of its own. The figure is the highest resident memory of the process (VmHWM, the system's
own count, so that no allocation is missed) less what was resident before, with models in place and everything warmed
up at a length of 8.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from _common import build_objective, parser, policy_and_reward, random_ids, table, write_json  # noqa: E402

from nabla_rl import dto  # noqa: E402
from nabla_rl.data.problems import Problem  # noqa: E402
from nabla_rl.decoding.base import Sampling, Setting  # noqa: E402
from nabla_rl.decoding.nabla import Nabla  # noqa: E402
from nabla_rl.decoding.objective import choose_support, gradient_candidates  # noqa: E402
from nabla_rl.decoding.probing import GRADIENT_CANDIDATES  # noqa: E402
from nabla_rl.dto import DTOConfig  # noqa: E402
from nabla_rl.ledger import Ledger  # noqa: E402

GOAL = 10
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vocab", type=int, default=152_000)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--support", type=int, default=64)
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--case", help="run one case in this process: dto or decode, a colon, full or support")
    args = options.parse_args()
    if args.quick:
        args.vocab, args.length, args.prompt, args.support = 20_000, 64, 8, 16
    if not STATUS.is_file():
        print("memory: needs /proc/self/status, which this system has not.")
        return
    if args.case:
        print(json.dumps(measure(args)))
        return
    peaks = {
        f"{scope}:{kind}": run_case(args, f"{scope}:{kind}")
        for scope in ("dto", "decode")
        for kind in ("full", "support")
    }
    whole = args.length * args.vocab * 4 / 2**20
    print(
        f"peak memory: vocabulary {args.vocab}, length {args.length}, support {args.support}, hidden {args.hidden}, "
        f"{args.layers} layers, float32; one (length, vocabulary) tensor is {whole:.0f} MiB"
    )
    rows = []
    for scope in ("dto", "decode"):
        full, lean = (peaks[f"{scope}:{kind}"] / 2**20 for kind in ("full", "support"))
        rows.append(
            [scope, f"{full:.0f}", f"{full / whole:.1f}", f"{lean:.0f}", f"{lean / whole:.2f}", f"{full / lean:.1f}"]
        )
    table(["", "full MiB", "in (L, V)", "support MiB", "in (L, V)", "times less"], rows)
    print(f"goal: at least {GOAL} times less")
    kept = {name: value for name, value in vars(args).items() if name not in ("json", "case")}
    write_json(args.json, "memory", {"options": kept, "peak_bytes": peaks})


def run_case(args, case: str) -> int:
    """One case in a child process."""
    command = [sys.executable, __file__, "--case", case]
    for name in ("vocab", "length", "prompt", "support", "hidden", "layers"):
        command += [f"--{name}", str(getattr(args, name))]
    # large blocks go straight back to the system, so that what is resident is what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def measure(args) -> dict[str, int]:
    scope, kind = args.case.split(":")
    shape = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 64,
    }
    policy, reward = policy_and_reward(shape, shape, dtype=torch.float32, device="cpu")
    support = args.support if kind == "support" else None
    work = {"dto": optimise, "decode": decode}[scope]
    work(policy, reward, args.prompt, 8, support)()  # loads code, fills caches
    work = work(policy, reward, args.prompt, args.length, support)
    gc.collect()
    RESET.write_text("5")  # VmHWM starts again from what is resident
    before = resident("VmRSS")
    work()
    return {"peak": resident("VmHWM") - before}


def optimise(policy, reward, prompt: int, length: int, k: int | None):
    objective = build_objective(policy, reward, 1, prompt, length)
    ids = random_ids(1, length, policy.vocab_size, "cpu")
    with torch.no_grad():
        encoded = policy.backbone.encode(objective.policy_prefix, ids[:, :-1], objective.mask[:, 1:])
        logits = policy.logits(encoded.hidden)
        logits.scatter_(-1, ids[..., None], logits.amax(-1, keepdim=True) + 1.0)  # DTO starts at the argmax

    def work() -> None:
        start = logits
        if k is not None:
            candidates = gradient_candidates(objective, ids, logits, 1.0, GRADIENT_CANDIDATES)
            objective.support = choose_support(logits, ids, k, candidates)
            start = logits.gather(-1, objective.support)
        dto.run(start, objective.mask, objective.log_probs, objective.rewards, DTOConfig(num_steps=4))

    return work


def decode(policy, reward, prompt: int, length: int, k: int | None):
    policy.eos_ids.fill_(-1)  # completions run to the maximum length
    sampling, config = Sampling(temperature=1.0, max_new_tokens=length), DTOConfig(num_steps=4)
    decoder = Nabla(dto=config, max_rollouts=2, min_entropy=0.0, support=k)
    problem = Problem("0", "abcdefgh" * (prompt // 8))

    def work() -> None:
        result = decoder.decode([problem], Setting(policy, reward, Ledger(1), sampling=sampling))[0]
        assert len(result.rollouts) == 2 and len(result.ids) == length

    return work


if __name__ == "__main__":
    main()
