"""Studies of training: distillation for every variant and seed, alignment as its rival, on the same problems."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.metrics.paired import bootstrap_interval, paired_difference
from nabla_rl.report.amortisation import recovered_share
from nabla_rl.report.rows import Report, Row
from nabla_rl.report.summary import mean
from nabla_rl.run_folder import flatten
from nabla_rl.studies.base import VARIANT, Design, Options, Point, PointStudy, Watch
from nabla_rl.studies.jobs import Models, decode_into, read_decoding
from nabla_rl.studies.trainings import READERS, SECTIONS, check_command, right_answers, train
from nabla_rl.types import UserError

WORDS = ("command", "against", "data_of")
"""What a variant says to the study; its other names are options of its command."""
HELD_OUT = ("data.family", "data.eval_split", "data.eval_limit", "data.problem_seed")
"""Options that decide what is held out: those of `fixed` that an align variant takes too."""
COSTS = ("rows", "step", "data_flops", "training_flops", "answer_flops", "teacher_flops", "crossing", "seconds")
"""Columns of the table that are means over seeds."""
RENAMED = {"data.eval_split": "data.split", "data.eval_limit": "data.limit"}
"""How decoding calls the options of what is held out."""


@dataclass
class DistillGrid(PointStudy):
    """A training for every variant and seed, each in a run folder of its own.

    Accuracy is that of greedy answers to the same held-out problems. Beside the options of its command a variant has
    `command` (distill, the default, or align), `against` (the label that it is compared with; the first one by
    default) and `data_of` (a label before it, whose decoded problems it learns from, where both have the same
    teacher).
    """

    design: Design
    models: Models = field(default_factory=Models)

    def __post_init__(self) -> None:
        """Refuse variants that cannot be run, before any is."""
        if not self.design.variants or self.design.grid:
            raise UserError("grid", "none with a distill study", str(list(self.design.grid)), "Use {variants}.")
        self.points = self.design.points()
        labels = list(self.design.variants)
        for place, label in enumerate(labels):
            words = self.words(label)
            check_command(words["command"], f"variants.{label}.command")
            for name, known in (("against", labels), ("data_of", labels[:place])):
                if name in words and words[name] not in known:
                    expected = f"one of {', '.join(known)}" if known else "none for the first variant"
                    raise UserError(f"variants.{label}.{name}", expected, repr(words[name]))
        self.design.check_sections(SECTIONS["distill"], "distill")
        for label in labels:
            READERS[self.words(label)["command"]](self.options(label), seed=0)

    def words(self, label: str) -> Row:
        """What a variant says to the study."""
        return {"command": "distill", **self.design.words(label, WORDS)}

    def options(self, label: str) -> Options:
        """The options of a variant's command."""
        command, fixed = self.words(label)["command"], flatten(self.design.fixed)
        if command == "align":
            fixed = {name: value for name, value in fixed.items() if name in HELD_OUT}
        return self.design.default(command) | Options(fixed, "fixed") | self.design.options_of(label)

    def decisive(self) -> Row:
        variants = {label: flatten(given) for label, given in self.design.variants.items()}
        return {"study": "distill", "fixed": flatten(self.design.fixed), "variants": variants}

    def run_point(self, point: Point, path: Path, watch: Watch) -> list[Row]:
        words, run_dir = self.words(point.label), path / "points" / point.id
        watch.step(0, 2, words["command"])
        if words["command"] == "align":
            found = self._align(point, run_dir, watch)
        else:
            found = self._distill(point, run_dir, words.get("data_of"), watch)
        return [{"decoder": "greedy", "values": dict(point.values), "seed": point.seed, **found}]

    def _distill(self, point: Point, run_dir: Path, source: str | None, watch: Watch) -> Row:
        options = self.options(point.label)
        if source is not None:
            other = run_dir.parent / Point({VARIANT: source}, point.seed).id
            options = options | Options({"data.results": [str(other / "data" / "decode")]}, f"variants.{point.label}")
            # the same teacher on the same problems: its answers are there
            if not (run_dir / "eval" / "teacher").exists():
                shutil.copytree(other / "eval" / "teacher", run_dir / "eval" / "teacher")
        summary = train("distill", options, seed=point.seed, folder=run_dir, watch=watch)
        made, training, paid = summary["data"], summary["training"], summary["amortisation"]
        before = "before" if (run_dir / "eval" / "before").is_dir() else "teacher"
        return {
            "right": right_answers(run_dir / "eval" / "student", "greedy"),
            "before": right_answers(run_dir / "eval" / before, "greedy"),
            "teacher": right_answers(run_dir / "eval" / "teacher", summary["teacher"]["decoder"]),
            "rows": made["counts"]["kept"], "step": training["best_step"],
            "data_flops": made["decode_flops"] + made["target_flops"], "training_flops": training["flops"],
            "answer_flops": paid["student_flops"], "teacher_flops": paid["teacher_flops"],
            "crossing": paid["crossing"], "seconds": made["decode_seconds"] + training["seconds"],
        }  # fmt: skip

    def _align(self, point: Point, run_dir: Path, watch: Watch) -> Row:
        options = self.options(point.label)
        # its own figures are of samples: a few problems will do, as all are answered greedily below
        few = Options({"data.eval_limit": 8}, f"variants.{point.label}")
        summary = train("align", options | few, seed=point.seed, folder=run_dir, watch=watch)
        watch.step(1, 2, "answering the held-out problems")
        answering = {RENAMED.get(name, name): options[name] for name in HELD_OUT if name in options}
        answering |= {
            "model.policy.name": options.get("model.policy.name", "tiny-policy"),
            "model.policy.adapter": str(run_dir / "adapter"),
            "model.sampling.max_new_tokens": options["model.rl.max_completion_length"],
            "model.reward.name": None, "model.gold.name": None, "data.batch_size": 64,
        }  # fmt: skip
        decoding = read_decoding(Options(answering), seed=point.seed, decoders=["greedy"])
        answers = decode_into(run_dir / "eval" / "student", decoding, self.models, Watch())
        return {
            "right": {row["id"]: row["correct"] for row in answers if row["correct"] is not None},
            "data_flops": 0.0, "training_flops": summary["flops"], "seconds": summary["seconds"],
        }  # fmt: skip

    def report_rows(self, rows: Sequence[Row], path: Path) -> Report:
        table = []
        for label in dict.fromkeys(row["values"][VARIANT] for row in rows):
            group = [row for row in rows if row["values"][VARIANT] == label]
            against = self.words(label).get("against", next(iter(self.design.variants)))
            reference = [row for row in rows if row["values"][VARIANT] == against]
            table.append({VARIANT: label, **figures(group), **compared(group, reference, same=against == label)})
        return Report(table)


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
