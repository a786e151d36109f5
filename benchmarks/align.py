"""Training steps of this package's engine against TRL's own trainer: the same policy, judge, LoRA, batch and settings.

Each engine runs in a process of its own, in turns, so that its peak memory is its own too. What is timed is whole
optimiser steps as a user has them (sampling, rewards, reference, loss, backward, step), after a warm-up; the figure is
completions a second of the process's own time (all threads added up; one by default), or with `--wall` of wall-clock
time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import resource  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from _common import parser, ratio, table, write_json  # noqa: E402

GOAL = 1.2
ENGINES = ("lightning", "trl")
WARMUP = 2


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the timed steps of one engine, and this process's peak memory."""
    import lightning as L
    from transformers import TrainerCallback

    from nabla_rl.alignment.aligner import PolicyAligner
    from nabla_rl.alignment.config import RLConfig
    from nabla_rl.alignment.data import AlignmentData
    from nabla_rl.alignment.trl_engine import build_trl_trainer
    from nabla_rl.cli.app import quiet
    from nabla_rl.data.tiny import FAMILIES

    quiet()
    clock = time.perf_counter if args.wall else time.process_time
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = WARMUP + args.steps
    rl = RLConfig(
        num_generations=args.generations, per_device_train_batch_size=args.batch, max_steps=steps, learning_rate=1e-4,
        max_completion_length=FAMILIES[args.family].max_new_tokens, save_steps=10**9, report_to="none",
        log_completions=False,
    )  # fmt: skip
    module = PolicyAligner(rl=rl, algorithm=args.algorithm, family=args.family)
    module.prepare(device, AlignmentData(family=args.family, eval_limit=1))
    times: list[float] = []
    if args.engine == "trl":

        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__):
                times.append(clock())

        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trl_trainer(module, Path(folder), save_strategy="no", logging_strategy="no")
            trainer.add_callback(Clock())
            trainer.train()
    else:

        class Tick(L.Callback):
            def on_train_batch_end(self, *_, **__):
                times.append(clock())

        L.Trainer(
            max_steps=steps, max_epochs=-1, accelerator=device.type, devices=1, logger=False, callbacks=[Tick()],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        ).fit(module)  # fmt: skip
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": times[-1] - times[WARMUP - 1], "memory_mb": memory}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--family", choices=("sorting", "words"), default="sorting")
    options.add_argument("--algorithm", choices=("rloo", "grpo"), default="rloo")
    options.add_argument("--batch", type=int, default=128, help="completions a step")
    options.add_argument("--generations", type=int, default=8)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--wall", action="store_true", help="measure wall-clock time: for a machine of one's own")
    options.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.quick:
        args.batch, args.steps, args.repetitions = 16, 2, 1
    if args.engine:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for repetition in range(args.repetitions):
        for name in ENGINES[:: 1 if repetition % 2 == 0 else -1]:
            arguments = [f"--{key}={getattr(args, key)}" for key in "family algorithm batch generations steps".split()]
            arguments += ["--wall"] * args.wall
            done = subprocess.run(
                [sys.executable, __file__, f"--engine={name}", *arguments], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"align: {name} failed\n{done.stderr}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    memory = {name: statistics.median(run["memory_mb"] for run in runs) for name, runs in found.items()}
    completions = args.batch * args.steps
    print(
        f"{args.algorithm} on '{args.family}', {args.batch} completions a step in groups of {args.generations}, "
        f"{args.steps} steps, {args.repetitions} repetitions, {torch.get_num_threads()} thread(s), "
        f"{'wall' if args.wall else 'process'} time"
    )
    rows = [
        [name, *(f"{completions / pick(times):.1f}" for pick in (max, statistics.median, min)), f"{memory[name]:.0f}"]
        for name, times in seconds.items()
    ]
    table(["completions/s", "slowest", "median", "fastest", "peak MiB"], rows)
    middle, low, high = ratio(seconds, "trl", "lightning")
    print(f"the lightning engine is {middle:.2f} times as fast (from {low:.2f} to {high:.2f}); goal: {GOAL} times")
    kept = {name: value for name, value in vars(args).items() if name not in ("json", "engine")}
    write_json(args.json, "align", {"options": kept, "seconds": seconds, "memory_mb": memory, "speedup": middle})


if __name__ == "__main__":
    main()
