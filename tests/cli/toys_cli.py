"""Runs of the decode command on tiny random models, kept small enough to be made by the dozen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import toys_hf

ROOT = Path(__file__).parents[2]
DECODERS = ("greedy", "best_of_n", "self_consistency", "nabla", "edit_search")


def save_models(folder: Path) -> Path:
    """A policy, a reward and a second judge with random weights, each in a folder of its own."""
    for name, model in (
        ("policy", toys_hf.build_llama(eos_token_id=[2, 9, 17])),
        ("reward", toys_hf.build_classifier()),
        ("gold", toys_hf.build_classifier(seed=2)),
    ):
        save(model, folder / name)
    return folder


def save(model, folder: Path, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or toys_hf.tokenizer()).save_pretrained(folder)
    return folder


def options(models: Path, run_dir: Path | None = None, **changes: object) -> list[str]:
    """The command line of a small run; `changes` are options with a double underscore for the dot."""
    values: dict[str, object] = {
        "data.family": "sorting",
        "data.limit": 4,
        "data.batch_size": 2,
        "model.policy.name": models / "policy",
        "model.reward.name": models / "reward",
        "model.gold.name": models / "gold",
        "model.sampling.max_new_tokens": 10,
        "model.best_of_n.n": 3,
        "model.self_consistency.n": 3,
        "model.nabla.max_rollouts": 3,
        "model.nabla.dto.num_steps": 4,
        "model.nabla.dto.step_size": 0.5,
        "model.edit_search.max_rollouts": 3,
        # what a policy that is not embedded would else be given
        "model.edit_search.alternatives": 8,
        "model.edit_search.min_drop": 0.05,
        "model.beta": 1.0,
        "model.sampling.temperature": 0.8,
    }
    if run_dir is not None:
        values["run_dir"] = run_dir
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def start(arguments: list[str], **more) -> subprocess.Popen:
    """Decoding as a user runs it."""
    return start_script("decode", arguments, **more)


def start_script(verb: str, arguments: list[str], **more) -> subprocess.Popen:
    """A script as a user runs it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{verb}.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        # a shell lets its background jobs ignore Ctrl-C, and what they start inherits it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


def read_results(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def timeless_results(run_dir: Path) -> list[dict]:
    """The lines without what no two runs share."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in read_results(run_dir)]
    for row in rows:
        row["curve"] = [[*point[:3], *point[4:]] for point in row["curve"]]
    return rows


def read_summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def timeless_summary(run_dir: Path) -> dict:
    summary = read_summary(run_dir)
    del summary["peak_memory_mb"]
    for row in summary["rows"]:
        del row["seconds"]
    return summary
