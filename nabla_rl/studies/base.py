"""Studies: what a point of a grid does, and what all points together say."""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch

from nabla_rl.duality.settings import ExactSettings
from nabla_rl.duality.study import LANDSCAPES, run_point
from nabla_rl.duality.verdicts import verdicts
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.metrics.paired import paired_difference
from nabla_rl.report.summary import mean, summarise
from nabla_rl.types import UserError

VARIANT = "variant"
"""The grid's name for the labels of `DecodeGrid.variants`."""

StudyName = Literal["duality_exact", "decode", "distill", "measured"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One setting of everything that varies."""

    values: Mapping[str, Any]
    seed: int

    @property
    def id(self) -> str:
        """A name for it, which is also a folder's."""
        words = [f"{name.rpartition('.')[2]}={value}" for name, value in self.values.items()]
        return "_".join([*words, f"seed={self.seed}"]).replace("/", "-").replace(" ", "")


@dataclass
class Report:
    """What a study has found.

    Attributes:
        rows: the table, plain values; a key with `_low` and `_high` beside it has an interval.
        claims: rows with claim, holds, and a text for each landscape; empty for a study that claims nothing.
        figures: captions and SVG files.
        summary: anything else worth keeping.
        tables: further tables, each with its heading.
        shown: columns that the terminal has room for; empty: all.
    """

    rows: list[Row]
    claims: list[Row] = field(default_factory=list)
    figures: list[tuple[str, Path]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    tables: list[tuple[str, list[Row]]] = field(default_factory=list)
    shown: Sequence[str] = ()


@contextmanager
def silently() -> Iterator[None]:
    """Within, what another command prints is not shown."""
    with redirect_stdout(StringIO()):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes on one thread: on small tensors several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_points(grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> list[Point]:
    """Every combination of the grid's values, for every seed; the last name varies fastest."""
    if not grid:
        raise UserError("--grid: expected dotted names and lists of their values, found none. See configs/ablate/.")
    for name, values in grid.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"--grid: expected a list of values for {name}, found {values!r}. Write [a, b].")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds: expected different whole numbers, found {list(seeds)}.")
    combinations = itertools.product(*grid.values())
    points = [Point(dict(zip(grid, values, strict=True)), seed) for values in combinations for seed in seeds]
    twice = next((p.id for k, p in enumerate(points) if any(p.id == q.id for q in points[:k])), None)
    if twice is not None:
        raise UserError(f"--grid: expected values that differ, found {twice} twice.")
    return points


class AbstractStudy(ABC):
    """A kind of study."""

    @abstractmethod
    def check(self, points: Sequence[Point]) -> None:
        """Refuse points that cannot be run, before any is."""

    @abstractmethod
    def run(self, point: Point, folder: Path) -> list[Row]:
        """Do one point, with `folder` for its own files; rows carry `decoder`, a name that is theirs alone."""

    @abstractmethod
    def report(self, rows: Sequence[Row], folder: Path) -> Report:
        """What the rows of all finished points say; figures are written under `folder`."""


@dataclass(frozen=True)
class DualityExact(AbstractStudy):
    """Samplers, RL and decoders against the exact tilted policy."""

    settings: ExactSettings = field(default_factory=ExactSettings)

    def check(self, points: Sequence[Point]) -> None:
        for name in points[0].values:
            if name not in ("landscape", "beta"):
                raise UserError(f"--grid: expected landscape and beta for duality_exact, found {name!r}.")
        for point in points:
            landscape, beta = point.values.get("landscape"), point.values.get("beta")
            if landscape not in LANDSCAPES:
                raise UserError(f"--grid: expected landscapes among {', '.join(LANDSCAPES)}, found {landscape!r}.")
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
                raise UserError(f"--grid: expected positive, finite numbers for beta, found {beta!r}.")

    def run(self, point: Point, folder: Path) -> list[Row]:
        with one_thread():
            result = run_point(point.values["landscape"], float(point.values["beta"]), point.seed, self.settings)
        return [{"decoder": "duality_exact", **result}]

    def report(self, rows: Sequence[Row], folder: Path) -> Report:
        from nabla_rl.duality.figures import write_figures

        # a result line has null where a number was infinite
        points = [_restored(row) for row in rows]
        found = verdicts(points)
        claims: dict[str, Row] = {}
        for verdict in found:
            row = claims.setdefault(verdict.claim, {"claim": verdict.claim, "holds": True})
            row["holds"] = row["holds"] and verdict.holds
            row[verdict.landscape] = verdict.text
        table = [row for point in points for row in _flat(point)]
        summary = {"verdicts": [{**v._asdict(), "text": v.text} for v in found]}
        return Report(table, list(claims.values()), write_figures(points, folder / "figures"), summary)


@dataclass(frozen=True)
class DecodeGrid(AbstractStudy):
    """The decode command at every point, as a run folder of its own."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Dotted options of the decode command that all points share."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Label → dotted options; the grid's `variant` goes through the labels. The first is what others are held to."""

    def check(self, points: Sequence[Point]) -> None:
        varied = [name for name in points[0].values if name != VARIANT]
        for name in (*varied, *self.fixed, *(name for options in self.variants.values() for name in options)):
            if name.split(".")[0] not in ("model", "data", "trainer"):
                raise UserError(
                    f"--grid: expected dotted options of decode.py (model.… or data.…), found {name!r}. See "
                    "scripts/decode.py --help."
                )
        both = [name for name in self.fixed if name in points[0].values]
        if both:
            raise UserError(f"--fixed: expected options that the grid does not vary, found {both[0]}.")

    def arguments(self, point: Point, run_dir: Path) -> list[str]:
        """The decode command's own command line."""
        values = {name: value for name, value in point.values.items() if name != VARIANT}
        chosen = self.variants.get(point.values.get(VARIANT, ""), {})
        options = {**self.fixed, **values, **chosen, "seed": point.seed, "run_dir": str(run_dir)}
        return [text for name, value in options.items() for text in (f"--{name}", as_text(value))]

    def run(self, point: Point, folder: Path) -> list[Row]:
        from nabla_rl.cli import decode as decode_cli

        run_dir = folder / "points" / point.id
        with silently():
            decode_cli.main(self.arguments(point, run_dir))
        lines = (run_dir / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        results = [json.loads(line) for line in lines]
        rows = []
        for name in dict.fromkeys(result["decoder"] for result in results):
            mine = [result for result in results if result["decoder"] == name]
            kept = {"corrects": "correct", "rewards": "reward", "gold_rewards": "gold_reward", "seconds": "seconds"}
            rows.append(
                {
                    "decoder": name,
                    "values": dict(point.values),
                    "seed": point.seed,
                    "problems": [result["id"] for result in mine],
                    **{name: [result[key] for result in mine] for name, key in kept.items()},
                    "flops": [result["cost"]["flops"] for result in mine],
                    "acceptance_rate": summarise(mine, [name])[0]["acceptance_rate"],
                    "proposal_kl": _proposal_kl(mine),
                }
            )
        return rows

    def report(self, rows: Sequence[Row], folder: Path) -> Report:
        from nabla_rl.report.grid import write_grid_figure

        table = [
            _over_seeds(group) | _against(group, rows, next(iter(self.variants), None)) for group in _groups(rows)
        ]
        figures = write_grid_figure(table, [name for name in rows[0]["values"]], folder / "figures") if table else []
        return Report(table, figures=figures)


def _proposal_kl(results: Sequence[Row]) -> float | None:
    """How far the laws that new tokens were drawn from are from the policy, mean over positions of all problems."""
    parts = [(r["proposal_kl"], r["counts"]["visited"]) for r in results if r.get("proposal_kl") is not None]
    return sum(kl * count for kl, count in parts) / sum(count for _, count in parts) if parts else None


def _against(group: Sequence[Row], rows: Sequence[Row], first: str | None) -> Row:
    """How a variant differs from the first one on the same problems: accuracy with its bootstrap interval, and the
    share of FLOPs it saves (negative: it costs more)."""
    values = group[0]["values"]
    if first is None or values[VARIANT] == first:
        return {}
    other = [
        row for row in rows if row["decoder"] == group[0]["decoder"] and row["values"] == {**values, VARIANT: first}
    ]
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
    from nabla_rl.metrics import wilson_interval

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


def _flat(point: Row) -> list[Row]:
    """The table's lines of one exact point."""
    common = {"landscape": point["landscape"], "lambda": point["lambda"], "beta": point["beta"], "seed": point["seed"]}
    lines = []
    for row in point["samplers"]:
        line = {**common, "kind": "sampler", **{k: v for k, v in row.items() if k != "measured"}}
        measured = row.get("measured") or {}
        if row["law"] == "measured":
            line |= {
                "tv_low": max(0.0, measured["tv"] - measured["iid_tv"] - 1.96 * measured["iid_tv_spread"]),
                "tv_high": measured["tv"],
            }
        names = ("acceptance", "effective_samples_per_step", "r_hat", "iid_tv")
        lines.append(line | {k: measured.get(k) for k in names})
    lines += [{**common, "kind": "rl", **row} for row in point["training"]]
    for row in point["placements"]:
        values = {("kl" if k == "reverse_kl" else k): v for k, v in row.items()}
        lines.append({**common, "kind": "decoder", "law": "exact", **values})
    return lines


def _restored(row: Row) -> Row:
    """Infinite divergences and strengths, which JSON does not have, where a line has null for them."""
    infinite = ("reverse_kl", "forward_kl", "lambda_eff", "kl_at_lambda_eff", "objective_gap", "kl")
    places = [
        {k: math.inf if v is None and k in infinite else v for k, v in place.items()} for place in row["placements"]
    ]
    curves = {
        name: {**curve, "kl": [math.inf if v is None else v for v in curve["kl"]]}
        for name, curve in row["curves"].items()
    }
    return {**row, "placements": places, "curves": curves}


def finite(value: Any) -> Any:
    """A plain value as JSON can hold it: null for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def as_text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
