"""Studies of training: the distill command at every point, the align command as its rival, on the same problems."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.metrics.paired import bootstrap_interval, paired_difference
from nabla_rl.report.amortisation import recovered_share
from nabla_rl.report.summary import mean
from nabla_rl.studies.base import VARIANT, AbstractStudy, Point, Report, Row
from nabla_rl.types import UserError

OWN = ("command", "against", "data_of")
"""What a variant says to the study; its other names are options of its command."""
PARTS = {"distill": ("model", "data", "teacher", "trainer", "engine"), "align": ("model", "data", "trainer", "engine")}
HELD_OUT = ("data.family", "data.eval_split", "data.eval_limit", "data.problem_seed")
"""Options that decide what is held out: those of `fixed` that an align variant takes, too."""

COSTS = ("rows", "step", "data_flops", "training_flops", "answer_flops", "teacher_flops", "crossing", "seconds")
"""Columns of the table that are means over seeds."""


@dataclass(frozen=True)
class DistillGrid(AbstractStudy):
    """A training for every variant and seed, each in a run folder of its own.

    Accuracy is that of greedy answers to the same held-out problems. Beside the options of its command a variant has
    `command` (distill, the default, or align), `against` (the label that it is held to; the first one by default) and
    `data_of` (a label before it, whose decoded problems it learns from, where both have the same teacher).
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Dotted options of the distill command that all points share."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Label → dotted options and the study's own."""

    def check(self, points: Sequence[Point]) -> None:
        if not self.variants or list(points[0].values) != [VARIANT]:
            raise UserError("--grid: expected none with a distill study, only --variants. See configs/ablate/.")
        labels = list(self.variants)
        for place, (label, variant) in enumerate(self.variants.items()):
            command = variant.get("command", "distill")
            if command not in PARTS:
                raise UserError(f"--variants: expected command distill or align, found {command!r} in {label!r}.")
            for name in ("against", "data_of"):
                known = labels if name == "against" else labels[:place]
                if name in variant and variant[name] not in known:
                    raise UserError(
                        f"--variants: expected {name} in {label!r} to be one of {', '.join(known) or 'none yet'}, "
                        f"found {variant[name]!r}."
                    )
            check_options("--variants", variant.keys() - set(OWN), command)
        check_options("--fixed", self.fixed, "distill")

    def options(self, label: str) -> dict[str, Any]:
        """The options of a variant's command, dotted."""
        variant = self.variants[label]
        own = {name: value for name, value in variant.items() if name not in OWN}
        if variant.get("command") == "align":
            return {name: value for name, value in self.fixed.items() if name in HELD_OUT} | own
        return {**self.fixed, **own}

    def run(self, point: Point, folder: Path) -> list[Row]:
        label = point.values[VARIANT]
        run_dir = folder / "points" / point.id
        train = self._align if self.variants[label].get("command") == "align" else self._distill
        return [{"decoder": "greedy", "values": dict(point.values), "seed": point.seed, **train(point, run_dir)}]

    def _distill(self, point: Point, run_dir: Path) -> Row:
        from nabla_rl.cli import distill as distill_cli

        label = point.values[VARIANT]
        options, source = self.options(label), self.variants[label].get("data_of")
        if source is not None:
            other = run_dir.parent / Point({VARIANT: source}, point.seed).id
            options["data.results"] = [str(other / "data" / "decode")]
            # the same teacher on the same problems: its answers are there
            if not (run_dir / "eval" / "teacher").exists():
                shutil.copytree(other / "eval" / "teacher", run_dir / "eval" / "teacher")
        run_command(distill_cli.main, options, point.seed, run_dir)
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        decoder = summary["teacher"]["decoder"]
        before = "teacher" if not (run_dir / "eval" / "before").is_dir() else "before"
        made, training = summary["data"], summary["training"]
        return {
            "right": right_of(run_dir / "eval" / "student", "greedy"),
            "before": right_of(run_dir / "eval" / before, "greedy"),
            "teacher": right_of(run_dir / "eval" / "teacher", decoder),
            "rows": made["counts"]["kept"], "step": training["best_step"],
            "data_flops": made["decode_flops"] + made["target_flops"], "training_flops": training["flops"],
            "answer_flops": summary["amortisation"]["student_flops"],
            "teacher_flops": summary["amortisation"]["teacher_flops"],
            "crossing": summary["amortisation"]["crossing"],
            "seconds": made["decode_seconds"] + training["seconds"],
        }  # fmt: skip

    def _align(self, point: Point, run_dir: Path) -> Row:
        from nabla_rl.cli import align as align_cli
        from nabla_rl.cli import decode as decode_cli

        options = self.options(point.values[VARIANT])
        held_out = {name: options[name] for name in HELD_OUT if name in options}
        # its own figures are of samples: a few problems will do, as all are answered greedily below
        run_command(align_cli.main, {**options, "data.eval_limit": 8}, point.seed, run_dir)
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        renamed = {"data.eval_split": "data.split", "data.eval_limit": "data.limit"}
        answering = {
            **{renamed.get(name, name): value for name, value in held_out.items()},
            "model.policy.name": options.get("model.policy.name", "tiny-policy"),
            "model.policy.adapter": str(run_dir / "adapter"),
            "model.sampling.max_new_tokens": options["model.rl.max_completion_length"],
            "model.decoders": ["greedy"], "model.gold.name": None, "data.batch_size": 64,
        }  # fmt: skip
        answering |= {name: options[name] for name in ("model.reward.name",) if name in options}
        run_command(decode_cli.main, answering, point.seed, run_dir / "eval" / "student")
        return {
            "right": right_of(run_dir / "eval" / "student", "greedy"),
            "data_flops": 0.0, "training_flops": summary["flops"], "seconds": summary["seconds"],
        }  # fmt: skip

    def report(self, rows: Sequence[Row], folder: Path) -> Report:
        table = []
        for label in dict.fromkeys(row["values"][VARIANT] for row in rows):
            group = [row for row in rows if row["values"][VARIANT] == label]
            against = self.variants[label].get("against", next(iter(self.variants)))
            reference = [row for row in rows if row["values"][VARIANT] == against]
            table.append({VARIANT: label, **figures(group), **compared(group, reference, same=against == label)})
        return Report(table)


def check_options(where: str, names: Iterable[str], command: str) -> None:
    """Refuse what cannot be an option of that command."""
    for name in sorted(names):
        if name.split(".")[0] not in PARTS[command]:
            raise UserError(
                f"{where}: expected dotted options of {command}.py, found {name!r}. See scripts/{command}.py --help."
            )


def run_command(main: Any, options: Mapping[str, Any], seed: int, run_dir: Path) -> None:
    """A command with these dotted options, its tables kept off the screen."""
    given = {**options, "seed": seed, "run_dir": str(run_dir)}
    texts = [text if isinstance(text, str) else json.dumps(text) for text in given.values()]
    with redirect_stdout(StringIO()):
        main([word for name, text in zip(given, texts, strict=True) for word in (f"--{name}", text)])


def right_of(folder: Path, decoder: str) -> dict[str, bool]:
    """Of a decode run's folder: problem → whether the decoder's answer is right."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    results = [json.loads(line) for line in lines]
    return {r["id"]: r["correct"] for r in results if r["decoder"] == decoder and r["correct"] is not None}


def figures(group: Sequence[Row]) -> Row:
    """What a variant's seeds say together: accuracy with its bootstrap interval over problems, and what it cost."""
    problems = sorted(set.intersection(*(set(row["right"]) for row in group)))
    value, low, high = bootstrap_interval(over_seeds(group, "right", problems), generator=seeded_generator("accuracy"))
    line: Row = {
        "seeds": len(group), "problems": len(problems), "accuracy": float(value), "accuracy_low": float(low),
        "accuracy_high": float(high),
    }  # fmt: skip
    for name in COSTS:
        line[name] = mean([row.get(name) for row in group])
    return line


def compared(group: Sequence[Row], reference: Sequence[Row], *, same: bool) -> Row:
    """A variant beside the one that it is held to: paired difference, and the share of that one's teacher's gain over
    its student's own greedy answers. Both are over problems, each averaged over seeds first."""
    if not reference:
        return {}
    sets = [
        *(row["right"] for row in group),
        *(row[name] for row in reference for name in ("right", "before", "teacher")),
    ]
    problems = sorted(set.intersection(*map(set, sets)))
    if not problems:
        return {}
    after = over_seeds(group, "right", problems)
    before, teacher = (over_seeds(reference, name, problems) for name in ("before", "teacher"))
    line: Row = {"before": float(before.mean()), "teacher": float(teacher.mean())}
    found = recovered_share(before, after, teacher)
    line |= {"recovered": found["value"], "recovered_low": found["low"], "recovered_high": found["high"]}
    if not same:
        other = over_seeds(reference, "right", problems)
        difference = paired_difference(after[:, None], other[:, None], generator=seeded_generator("variants"))
        names = ("difference", "difference_low", "difference_high")
        line |= dict(zip(names, map(float, difference), strict=True))
    return line


def over_seeds(group: Sequence[Row], name: str, problems: Sequence[str]) -> Tensor:
    """The share of seeds whose answer is right, for every problem."""
    return torch.tensor([[float(row[name][problem]) for problem in problems] for row in group]).double().mean(0)
