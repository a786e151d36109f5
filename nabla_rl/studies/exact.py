"""The exact study: samplers, RL and decoders against the tilted policy, on spaces small enough to list."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nabla_rl.duality.settings import ExactSettings
from nabla_rl.duality.study import LANDSCAPES, run_point
from nabla_rl.duality.verdicts import verdicts
from nabla_rl.report.rows import Report, Row
from nabla_rl.studies.base import Design, Point, PointStudy, Watch, one_thread
from nabla_rl.types import UserError


@dataclass
class DualityExact(PointStudy):
    """Samplers, RL and decoders against the exact tilted policy; the grid is over `landscape` and `beta`."""

    design: Design
    settings: ExactSettings = field(default_factory=ExactSettings)

    def __post_init__(self) -> None:
        """Refuse points that cannot be run."""
        if self.design.fixed or self.design.variants:
            section = "fixed" if self.design.fixed else "variants"
            raise UserError(section, "none with duality_exact", "some", "Use {exact} for the amount of work.")
        self.points = self.design.points()
        for name in self.points[0].values:
            if name not in ("landscape", "beta"):
                raise UserError("grid", "landscape and beta for duality_exact", repr(name))
        for point in self.points:
            landscape, beta = point.values.get("landscape"), point.values.get("beta")
            if landscape not in LANDSCAPES:
                raise UserError("grid.landscape", f"landscapes among {', '.join(LANDSCAPES)}", repr(landscape))
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
                raise UserError("grid.beta", "positive, finite numbers for beta", repr(beta))

    def decisive(self) -> Row:
        return {"study": "duality_exact", "fixed": {}, "variants": {}, "exact": asdict(self.settings)}

    def run_point(self, point: Point, path: Path, watch: Watch) -> list[Row]:
        with one_thread():
            result = run_point(point.values["landscape"], float(point.values["beta"]), point.seed, self.settings)
        return [{"decoder": "duality_exact", **result}]

    def report_rows(self, rows: Sequence[Row], path: Path) -> Report:
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
        return Report(table, list(claims.values()), write_figures(points, path / "figures"), summary)


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
