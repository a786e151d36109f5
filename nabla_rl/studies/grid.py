"""The decode study: the decoders of `nabla-rl decode` at every point, each point in a run folder of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.metrics import wilson_interval
from nabla_rl.metrics.paired import paired_difference
from nabla_rl.report.rows import Report, Row
from nabla_rl.report.summary import mean, summarise
from nabla_rl.run_folder import flatten
from nabla_rl.studies.base import VARIANT, Design, Point, PointStudy, Watch
from nabla_rl.studies.jobs import SECTIONS, Decoding, Models, decode_into, read_decoding

SHOWN = ("decoder", "accuracy", "mean_reward", "flops", "difference", "flops_saved")
"""Columns that the terminal has room for, beside those of the grid."""
KEPT = {"corrects": "correct", "rewards": "reward", "gold_rewards": "gold_reward", "seconds": "seconds"}
"""What a point's rows keep of every answer."""


@dataclass
class DecodeGrid(PointStudy):
    """Decoding at every point of a grid; where there are variants, the first is what the others are compared with."""

    design: Design
    models: Models = field(default_factory=Models)

    def __post_init__(self) -> None:
        """Refuse options that no point can have."""
        self.design.check_sections(SECTIONS, "decode")
        for label in self.design.variants:
            self.design.words(label, ())
        self.points = self.design.points()
        for point in {json.dumps(dict(point.values)): point for point in self.points}.values():
            self.decoding(point)

    def decisive(self) -> Row:
        variants = {label: flatten(given) for label, given in self.design.variants.items()}
        return {"study": "decode", "fixed": flatten(self.design.fixed), "variants": variants}

    def decoding(self, point: Point) -> Decoding:
        """What a point decodes, and how."""
        return read_decoding(self.design.options(point, "decode"), seed=point.seed)

    def run_point(self, point: Point, path: Path, watch: Watch) -> list[Row]:
        decoding = self.decoding(point)
        results = decode_into(path / "points" / point.id, decoding, self.models, watch)
        rows = []
        for name in decoding.decoders:
            mine = [result for result in results if result["decoder"] == name]
            rows.append(
                {
                    "decoder": name,
                    "values": dict(point.values),
                    "seed": point.seed,
                    "problems": [result["id"] for result in mine],
                    **{kept: [result[key] for result in mine] for kept, key in KEPT.items()},
                    "flops": [result["cost"]["flops"] for result in mine],
                    "acceptance_rate": summarise(mine, [name])[0]["acceptance_rate"],
                    "proposal_kl": _proposal_kl(mine),
                }
            )
        return rows

    def report_rows(self, rows: Sequence[Row], path: Path) -> Report:
        from nabla_rl.report.grid import write_grid_figure

        first = next(iter(self.design.variants), None)
        table = [_over_seeds(group) | _against(group, rows, first) for group in _groups(rows)]
        names = list(rows[0]["values"])
        figures = write_grid_figure(table, names, path / "figures")
        return Report(table, figures=figures, shown=(*names, *SHOWN))


def _proposal_kl(results: Sequence[Row]) -> float | None:
    """KL of the distributions that new tokens were drawn from to the policy, mean over positions of all problems."""
    parts = [(r["proposal_kl"], r["counts"]["visited"]) for r in results if r.get("proposal_kl") is not None]
    return sum(kl * count for kl, count in parts) / sum(count for _, count in parts) if parts else None


def _against(group: Sequence[Row], rows: Sequence[Row], first: str | None) -> Row:
    """How a variant differs from the first one on the same problems: accuracy with its bootstrap interval, and the
    share of FLOPs it saves (negative: it costs more)."""
    values = group[0]["values"]
    if first is None or values[VARIANT] == first:
        return {}
    there = [row for row in rows if row["values"] == {**values, VARIANT: first}]
    same = [row for row in there if row["decoder"] == group[0]["decoder"]]
    # a variant with another decoder is compared with the first one's only decoder
    other = same or (there if len({row["decoder"] for row in there}) == 1 else [])
    row: Row = {}
    mine, theirs = _by_problem(group, "corrects"), _by_problem(other, "corrects")
    shared = sorted(mine.keys() & theirs.keys())
    if shared:
        pair = [torch.tensor([part[key] for key in shared])[:, None] for part in (mine, theirs)]
        found = [float(x) for x in paired_difference(*pair, generator=seeded_generator("variants"))]
        row |= dict(zip(("difference", "difference_low", "difference_high"), found, strict=True))
    flops = [mean([value for member in part for value in member["flops"]]) for part in (group, other)]
    if flops[0] is not None and flops[1]:
        row["flops_saved"] = 1 - flops[0] / flops[1]
    return row


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that differ in nothing but their seed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row["values"], row["decoder"]], sort_keys=True), []).append(row)
    return list(groups.values())


def _over_seeds(group: Sequence[Row]) -> Row:
    """One line of the table: accuracy with its 95% Wilson interval, rewards with 1.96 standard errors of problems.

    A problem counts once: its answers under several seeds are averaged before the intervals are taken.
    """
    row: Row = {**group[0]["values"], "decoder": group[0]["decoder"], "seeds": len(group)}
    row["problems"] = len(set(group[0]["problems"]))
    correct = list(_by_problem(group, "corrects").values())
    if correct:
        accuracy = sum(correct) / len(correct)
        # between whole numbers of right answers, as averages over seeds are
        low, high = wilson_interval(round(sum(correct)), len(correct))
        row |= {"accuracy": accuracy, "accuracy_low": min(float(low), accuracy)}
        row["accuracy_high"] = max(float(high), accuracy)
    for name, key in (("mean_reward", "rewards"), ("gold_reward", "gold_rewards")):
        values = list(_by_problem(group, key).values())
        row[name] = mean(values)
        if len(values) > 1:
            centre = sum(values) / len(values)
            error = math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))
            row |= {f"{name}_low": centre - 1.96 * error, f"{name}_high": centre + 1.96 * error}
    for name, key in (("flops", "flops"), ("seconds", "seconds")):
        row[name] = mean([value for member in group for value in member[key]])
    row["acceptance_rate"] = mean([member["acceptance_rate"] for member in group])
    row["proposal_kl"] = mean([member.get("proposal_kl") for member in group])
    return row


def _by_problem(group: Sequence[Row], key: str) -> dict[str, float]:
    """The mean over seeds of every problem that has a value."""
    found: dict[str, list[float]] = {}
    for row in group:
        for problem, value in zip(row["problems"], row[key], strict=True):
            if value is not None:
                found.setdefault(problem, []).append(float(value))
    return {problem: sum(values) / len(values) for problem, values in found.items()}
