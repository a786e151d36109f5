"""Write down what a frontier run measured: python docs/results/collect.py RUN_FOLDER --out NAME.json --commit ...

A run folder of the frontier study has one folder for each variant and seed, whose `results.jsonl` says after each step
what had been spent and which answer stood. This script reads accuracy off those curves: by the number of rollouts for
decoders that draw them independently, by FLOPs for the others.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.metrics.paired import bootstrap_interval
from nabla_rl.metrics.proportion import wilson_interval

ROLLOUTS = (1, 2, 4, 8, 16, 32)
BUDGETS = tuple(10 ** (power / 12) for power in range(84, 121))
"""From 1e7 to 1e10 FLOPs a problem, twelve to a factor of ten."""
INDEPENDENT = ("best_of_n", "self_consistency")
"""Decoders whose budget is a number of rollouts."""

Line = Mapping[str, Any]
Seeds = Sequence[Sequence[Line]]
"""For each seed one line of results for each problem."""


def point(columns: Seeds, *, rollouts: int | None = None, flops: float = math.inf) -> dict[str, Any]:
    """Accuracy with its 95% interval over problems (bootstrap over several seeds, else Wilson) and costs at a budget.

    The answer at a budget is that of the first step which uses it up, as while decoding; without one it is the last.
    """
    read = [[_at(line, rollouts, flops) for line in column] for column in columns]
    values = torch.tensor(read, dtype=torch.float64).mean(0)  # (problems, 4), seeds averaged
    right = values[:, 0]
    if len(columns) == 1:
        low, high = wilson_interval(float(right.sum()), len(right))
    else:
        _, low, high = bootstrap_interval(right, generator=seeded_generator(0, "results"))
    found = {"accuracy": right.mean(), "low": low, "high": high}
    costs = dict(zip(("rollouts", "flops", "sequential_calls"), values[:, 1:].mean(0), strict=True))
    return {name: float(f"{float(value):.4g}") for name, value in (found | costs).items()}


def _at(line: Line, rollouts: int | None, flops: float) -> list[float]:
    enough = (entry for entry in line["curve"] if entry[0] == rollouts or entry[1] >= flops)
    drawn, spent, calls, _, chosen = next(enough, line["curve"][-1])
    answer = next(answer for answer in line["answers"] if answer["index"] == chosen)
    return [float(answer["correct"]), drawn, spent, calls]


def curve(columns: Seeds, *, independent: bool) -> list[dict[str, Any]]:
    """A decoder's points, cheapest first; budgets below its first answer have none."""
    if independent:
        most = min(len(line["curve"]) for column in columns for line in column)
        return [point(columns, rollouts=n) for n in ROLLOUTS if n <= most]
    firsts = [line["curve"][0][1] for column in columns for line in column]
    found = [point(columns, flops=budget) for budget in BUDGETS if budget >= sum(firsts) / len(firsts)]
    found.append(point(columns))
    return [entry for index, entry in enumerate(found) if index == 0 or entry["flops"] != found[index - 1]["flops"]]


def read_lines(file: Path, decoder: str | None = None) -> list[Line]:
    """Lines of results in the order of their ids; of one decoder where it is named."""
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    chosen = [line for line in lines if decoder in (None, line["decoder"])]
    return sorted(chosen, key=lambda line: line["id"])


def last_answer(line: Line) -> Line:
    """A line of an ordinary run, whose last answer alone is graded, as one of a frontier."""
    last = line["curve"][-1]
    return {**line, "curve": [last], "answers": [{"index": last[-1], "correct": line["correct"]}]}


def collect(sources: Sequence[str]) -> dict[str, Any]:
    """Every variant of run folders: of a frontier, or LABEL=FOLDER:DECODER for one decoder of an ordinary run."""
    runs: dict[str, list[list[Line]]] = {}
    for source in sources:
        label, given, place = source.partition("=")
        if given:
            folder, _, decoder = place.rpartition(":")
            lines = read_lines(Path(folder) / "results.jsonl", decoder)
            runs.setdefault(label, []).append([last_answer(line) for line in lines])
            continue
        for file in sorted(Path(source).glob("*/seed*/results.jsonl")):
            runs.setdefault(file.parts[-3], []).append(read_lines(file))
    counts = {len(column) for columns in runs.values() for column in columns}
    if len(counts) != 1:
        raise SystemExit(f"expected every variant to have the same problems, found {sorted(counts)}")
    decoders = {
        label: {"seeds": len(columns), "points": curve(columns, independent=label in INDEPENDENT)}
        for label, columns in runs.items()
    }
    return {"problems": counts.pop(), "decoders": decoders}


def main() -> None:
    """Collect run folders into one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="+", help="frontier's run folder, or LABEL=FOLDER:DECODER of an ordinary run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", required=True, help="commit that was run")
    parser.add_argument("--command", required=True, help="command that was run")
    parser.add_argument("--set-up", required=True, help="problems, seeds and settings in a sentence")
    given = parser.parse_args()
    found = {"set_up": given.set_up, "command": given.command, "commit": given.commit, **collect(given.source)}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
