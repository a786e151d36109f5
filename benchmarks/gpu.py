"""A DTO step on a GPU: a 7B-shaped policy and a 4B-shaped judge (random weights, bfloat16), completions of 512 tokens.

For each batch size: seconds of one gradient step (`nabla_rl.dto.step`, caching off, prompts cached), over the whole
vocabulary and on a support of 64 tokens; the ratio to the two models' own forward and backward passes (`_common.Bare`
with look-ups: over the whole vocabulary, and interleaved with the step that it is compared with); the operations of
the models, by the ledger's formulas, per second, as a share of this card's own rate for a large bfloat16 matrix
product, measured first; and the peak of allocated memory beyond weights and cached prompts, DTO's state included.

Without a GPU it says so and ends. `--tiny` runs the same code with small shapes, on a CPU if need be, where the memory
column stays empty.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _common import (
    Bare,
    build_objective,
    clock,
    interleave,
    parser,
    policy_and_reward,
    random_ids,
    ratio,
    table,
    write_json,
)

from nabla_rl import dto
from nabla_rl.decoding.objective import Objective
from nabla_rl.dto import DTOConfig, DTOState

POLICY = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
JUDGE = {
    "vocab_size": 152_064, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
CONFIG = DTOConfig(caching=False, num_steps=10**6)


def matmul_rate(device: torch.device, width: int) -> float:
    """Operations per second of a square bfloat16 product, the best of 20."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleave({"product": lambda: a @ b}, 20, device, warmup=5)
    return 2 * width**3 / min(times["product"])


def start(objective: Objective, ids: torch.Tensor, support: int | None) -> DTOState:
    """DTO's first state at the tokens `ids`; with a support, on them and on random others."""
    batch, length = ids.shape
    vocab, device = objective.policy.vocab_size, ids.device
    if support is None:
        objective.support, width, index = None, vocab, ids
    else:
        others = torch.randint(4, vocab, (batch, length, support - 1), device=device)
        objective.support, width = torch.cat([ids[..., None], others], -1), support
        index = torch.zeros_like(ids)
    logits = torch.randn(batch, length, width, device=device)
    return dto.init(logits.scatter_(-1, index[..., None], 10.0), objective.mask, CONFIG)


def operations(objective: Objective) -> float:
    """What the ledger has booked so far, both models together."""
    return float(sum(row[:, 3].sum() for row in objective.policy_prefix.ledger.rows.values()))


def measure(
    objective: Objective, ids: torch.Tensor, support: int | None, bare: Bare, repetitions: int, device: torch.device
) -> dict[str, Any]:
    """One line of the table."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    held = [start(objective, ids, support)]

    def step() -> None:
        held[0] = dto.step(held[0], objective.log_probs, objective.rewards, CONFIG, donate=True)[0]

    def passes() -> None:
        bare.policy()
        bare.reward()

    booked = operations(objective)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    step()
    booked = operations(objective) - booked
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    if not bool(held[0].finite.all()):
        raise RuntimeError("gpu: the gradient is not finite")
    alone = interleave({"step": step}, repetitions, device)  # the bare passes may not fit beside DTO's state
    line: dict[str, Any] = {"seconds": statistics.median(alone["step"]), "operations": booked, "peak_bytes": peak}
    line["ratio"] = attempt(
        lambda: ratio(interleave({"step": step, "bare": passes}, repetitions, device), "step", "bare")
    )
    return line


def attempt(work: Callable[[], Any]) -> Any:
    """The result, or None where the GPU's memory does not do."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass
    # outside of the handler, which would keep the failed call's tensors
    gc.collect()
    torch.cuda.empty_cache()
    return None


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tiny", action="store_true", help="small shapes, on a CPU if there is no GPU")
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--support", type=int, default=64)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    options.add_argument("--repetitions", type=int, default=5)
    args = options.parse_args()
    tiny = args.tiny or args.quick
    if not torch.cuda.is_available() and not tiny:
        print("gpu: there is no GPU here; --tiny tries the code on a CPU.")
        return
    device, policy_shape, judge_shape, width = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        POLICY,
        JUDGE,
        8192,
    )
    if tiny:
        policy_shape, judge_shape, width = TINY, TINY, 256
        args.length, args.prompt, args.support, args.batches, args.repetitions = 32, 8, 16, [1, 2], 2
    rate = matmul_rate(device, width)
    began = clock(device)
    policy, reward = policy_and_reward(policy_shape, judge_shape, dtype=torch.bfloat16, device=device)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e9 for m in (policy, reward)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}: {rate / 1e12:.3g} Tflop/s in a bfloat16 product of width {width}; policy {sizes[0]:.2f}B, judge "
        f"{sizes[1]:.2f}B, made in {clock(device) - began:.0f} s; completion {args.length}, prompt {args.prompt}, "
        f"vocabulary {policy.vocab_size}"
    )
    rows, figures = [], []
    for batch in args.batches:
        for support in (None, args.support):
            objective = build_objective(policy, reward, batch, args.prompt, args.length)
            ids = random_ids(batch, args.length, policy.vocab_size, device)
            bare = Bare(objective, ids)
            line = attempt(lambda o=objective, i=ids, s=support, b=bare: measure(o, i, s, b, args.repetitions, device))
            shown = [f"{batch}", "all" if support is None else f"{support}"]
            figures.append({"batch": batch, "support": support} | (line or {"out_of_memory": True}))
            if line is None:
                rows.append([*shown, "out of memory", "", "", ""])
                continue
            share = line["operations"] / line["seconds"] / rate
            figures[-1]["share_of_matmul_rate"] = share
            over = "bare: no memory" if line["ratio"] is None else f"{line['ratio'][0]:.3f}"
            peak = "" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 2**30:.2f}"
            rows.append([*shown, f"{1000 * line['seconds']:.1f}", over, f"{100 * share:.0f}%", peak])
            del objective, bare
            gc.collect()
    table(["batch", "tokens", "ms a step", "over bare", "of the rate", "peak GiB"], rows)
    kept = {key: value for key, value in vars(args).items() if key != "json"}
    write_json(args.json, "gpu", {"device": name, "matmul_rate": rate, "options": kept, "steps": figures})


if __name__ == "__main__":
    main()
