"""One gradient step of DTO against the two models' own forward and backward passes on the same tokens.

A step is `nabla_rl.dto.step` with caching off: energy and gradient of policy and reward at hard (straight-through)
tokens, the product with the softmax's Jacobian, AdamW on the (length, vocab) logits, and the new argmax. What the bare
passes compute is said in `_common.Bare`; they are timed with embedding look-ups (the least that gives the same
gradient, and the figure that counts) and with dense one-hot tensors (what one writes first). Before anything is timed,
energy and gradient of the two are compared. Prompts are encoded before and cached for all. Ratios are medians over
interleaved repetitions in one run, the order reversed every other time; seconds are the process's own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics  # noqa: E402

import torch  # noqa: E402
from _common import Bare, build_objective, interleave, parser, policy_and_reward, random_ids, ratio, table, write_json  # noqa: E402

from nabla_rl import dto  # noqa: E402
from nabla_rl.dto import DTOConfig  # noqa: E402

GOAL = 1.05


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vocab", type=int, default=32_000)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--repetitions", type=int, default=30)
    options.add_argument("--profile", action="store_true", help="print where a DTO step spends its time, and stop")
    args = options.parse_args()
    if args.quick:
        args.vocab, args.length, args.prompt, args.hidden, args.layers, args.repetitions = 1000, 32, 8, 64, 2, 4

    device = torch.device("cpu")
    heads = args.hidden // 64
    shape = {
        "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": 11 * args.hidden // 4,
        "num_hidden_layers": args.layers, "num_attention_heads": heads, "num_key_value_heads": heads,
    }  # fmt: skip
    policy, reward = policy_and_reward(shape, shape, dtype=torch.float32, device=device)
    objective = build_objective(policy, reward, args.batch, args.prompt, args.length)
    ids = random_ids(args.batch, args.length, args.vocab, device)
    logits = torch.randn(args.batch, args.length, args.vocab, generator=torch.Generator().manual_seed(2))
    logits.scatter_(-1, ids[..., None], 10.0)

    config = DTOConfig(caching=False, num_steps=10**6)
    bare = Bare(objective, ids)
    state = dto.init(logits, objective.mask, config)
    state, _ = dto.step(state, objective.log_probs, objective.rewards, config, donate=True)
    (logps, policy_gradient), (rewards, reward_gradient) = bare.policy(), bare.reward()
    torch.testing.assert_close(state.energy, -rewards - logps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state.gradient, -policy_gradient - reward_gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bare.policy(dense=True)[1], policy_gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bare.reward(dense=True)[1], reward_gradient, rtol=1e-4, atol=1e-4)
    del logps, policy_gradient, rewards, reward_gradient

    held = [state]

    def step() -> None:
        held[0] = dto.step(held[0], objective.log_probs, objective.rewards, config, donate=True)[0]

    def evaluate() -> None:
        held[0] = dto._evaluate(held[0], held[0].finite, objective.log_probs, objective.rewards, config)

    if args.profile:
        from torch.profiler import ProfilerActivity, profile

        step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
            step()
        print(
            prof.key_averages(group_by_input_shape=True).table(
                sort_by="self_cpu_time_total", row_limit=45, max_shapes_column_width=60
            )
        )
        return

    works = {
        "DTO step": step,
        "  its gradient alone": evaluate,
        "bare, look-ups": lambda: (bare.policy(), bare.reward()),
        "bare, dense one-hots": lambda: (bare.policy(dense=True), bare.reward(dense=True)),
    }
    times = interleave(works, args.repetitions, device)
    print(
        f"DTO step: vocabulary {args.vocab}, completion {args.length}, prompt {args.prompt} (cached), "
        f"batch {args.batch}; policy and judge: hidden {args.hidden}, {args.layers} layers, float32; "
        f"{torch.get_num_threads()} thread(s), {args.repetitions} repetitions"
    )
    rows, figures = [], {}
    for name, seconds in times.items():
        against = [ratio(times, name, other) for other in ("bare, look-ups", "bare, dense one-hots")]
        shown = [f"{middle:.3f} [{low:.3f}, {high:.3f}]" for middle, low, high in against]
        rows.append([name, f"{1000 * statistics.median(seconds):.1f}", *shown])
        figures[name.strip()] = {
            "milliseconds": 1000 * statistics.median(seconds),
            "over_bare_lookup": against[0],
            "over_bare_dense": against[1],
        }
    table(["", "ms", "over bare look-ups [quartiles]", "over bare dense [quartiles]"], rows)
    print(f"goal: at most {GOAL} times the bare passes")
    write_json(
        args.json, "dto_step", {"options": {k: v for k, v in vars(args).items() if k != "json"}, "figures": figures}
    )


if __name__ == "__main__":
    main()
