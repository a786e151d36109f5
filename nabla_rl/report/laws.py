"""The figures of a measured study: reward and KL of every distribution, and the measures that no method optimises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

CURVES: dict[str, tuple[str, str, str]] = {
    # curve: colour, marker, name. Test time is warm, weights are cool, the policy's own samples are grey or green.
    "align": ("#08519c", "o", "aligned weights (β)"),
    "align long": ("#08306b", "h", "aligned weights, 1000 steps (β)"),
    "align steps": ("#4292c6", "o", "RL steps"),
    "distil": ("#41ae76", "^", "distilled weights"),
    "distil steps": ("#41ae76", "^", "distillation steps"),
    "nabla": ("#d94801", "s", "∇-Reasoner (β)"),
    "nabla rounds": ("#d94801", "s", "∇-Reasoner, rollouts"),
    "loop": ("#fd8d3c", "D", "∇-Reasoner's loop of DTO (β)"),
    "loop metropolis": ("#fdae6b", "d", "the loop, Metropolis (β)"),
    "loop metropolis, no gradient": ("#bdbdbd", "d", "the same without a gradient (β)"),
    "dto steps": ("#b30000", "v", "DTO steps"),
    "split": ("#7f2704", "P", "half in weights, ∇ for the rest"),
    "split loop": ("#7f2704", "X", "half in weights, the loop for the rest"),
    "split pool": ("#54278f", "p", "half in weights, tilted for the rest"),
    "greedy": ("#636363", "*", "greedy"),
    "policy": ("#222222", "*", "the policy"),
    "best of n by reward": ("#756bb1", ".", "best of n by reward"),
    "best of n by energy": ("#9e9ac8", ".", "best of n by energy"),
}
TILTED = "tilted"
STEPS = ("align steps", "distil steps", "dto steps", "nabla rounds")
"""Curves along a process, shown in the second figure; all others are distributions, shown in the first."""


def write_measured_figures(rows: Sequence[Row], folder: Path) -> list[tuple[str, Path]]:
    """Draw both figures for each family of problems.

    Returns:
        A caption and the SVG's path for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        if any(row["curve"] not in (*STEPS, "policy", "greedy") for row in mine):
            caption = (
                f"{family}: the gain of each distribution against its KL from the policy. The line is the best that "
                "any distribution can reach (tilted policies, from reweighted draws of the policy; faint where more "
                "than a tenth of the problems rest on fewer than 8 draws). Crosses are 95% intervals over problems. "
                "A distribution without a density is a bar from the least KL that its reward needs to the largest "
                "that its likelihood allows, -log π of its answers. A deterministic decoder has the upper end, and a "
                "filled mark there."
            )
            written.append((caption, _save(_frontier(mine, str(family)), folder / f"reward_kl_{family}.svg")))
        if any(row["curve"] in STEPS for row in mine):
            caption = (
                f"{family}: the reward that is optimised (horizontal) against the gold reward, which is not, and "
                "against accuracy. Numbers are steps, rollouts or n. A line that turns down is over-optimised."
            )
            written.append((caption, _save(_climbing(mine, str(family)), folder / f"over_optimisation_{family}.svg")))
    return written


def _new(columns: int):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * columns, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _save(figure, path: Path) -> Path:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "nabla_rl"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)
    return path


def _series(rows: Sequence[Row], curve: str) -> list[Row]:
    """The rows of a curve in order of β or steps."""
    mine = [row for row in rows if row["curve"] == curve]
    return sorted(mine, key=lambda row: -row["beta"] if row["at"] is None and row["beta"] else row["at"] or 0)


def _error(row: Row, name: str) -> list[list[float]]:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return [[0.0 if low is None else row[name] - low], [0.0 if high is None else high - row[name]]]


def _frontier(rows: Sequence[Row], family: str):
    metrics = [("reward", "reward (optimised)"), ("accuracy", "accuracy")]
    metrics += [("gold_reward", "gold reward (not optimised)")] if rows[0].get("gold_reward") is not None else []
    figure, axes = _new(len(metrics))
    for axis, (metric, label) in zip(axes, metrics, strict=True):
        tilted = _series(rows, TILTED)
        start = [row for row in rows if row["curve"] == "policy"]
        line = [(0.0, row[metric]) for row in start] + [(row["kl"], row[metric]) for row in tilted]
        sure = 1 + sum(row["few_draws"] <= 0.1 for row in tilted)
        if len(line) > 1:
            axis.plot(*zip(*line, strict=True), color="#222222", linewidth=1.4, alpha=0.35, zorder=2)
            axis.plot(
                *zip(*line[:sure], strict=True), color="#222222", linewidth=2.0, label="tilted policies", zorder=2
            )
        for row in tilted:
            axis.plot(row["kl"], row[metric], "|", color="#222222", markersize=9, zorder=3)
            axis.annotate(
                f"{row['beta']:g}", (row["kl"], row[metric]), (0, 7), textcoords="offset points", fontsize=7,
                ha="center", color="#222222",
            )  # fmt: skip
        for curve, (colour, marker, name) in CURVES.items():
            if curve not in STEPS:
                _draw(axis, _series(rows, curve), metric, colour, marker, name)
        axis.set(xlabel="KL from the policy, nats a completion", ylabel=label)
    _legend(figure, axes[0])
    figure.suptitle(
        f"{family}: gain of each distribution, and its distance from the policy", x=0.01, ha="left", fontsize=13
    )
    return figure


def _draw(axis, series: Sequence[Row], metric: str, colour: str, marker: str, name: str) -> None:
    """Draw one curve: distributions with a density as points in order, the others as bars between their bounds."""
    known = [row for row in series if row.get("kl") is not None]
    if len(known) > 1:
        axis.plot([row["kl"] for row in known], [row[metric] for row in known], color=colour, linewidth=1.0, alpha=0.6)
    for k, row in enumerate(series):
        label = name if k == 0 else None
        y, text = row[metric], f"{row['at'] or row['beta'] or '':g}" if row["at"] or row["beta"] else ""
        if row.get("kl") is not None:
            axis.errorbar(
                row["kl"], y, _error(row, metric), _error(row, "kl"), fmt=marker, color=colour, markersize=6,
                linewidth=1, label=label, zorder=5,
            )  # fmt: skip
            x = row["kl"]
        else:
            low, x = row.get("kl_from") or 0.0, row["kl_to"]
            axis.plot([low, x], [y, y], color=colour, linewidth=1.1, alpha=0.55, zorder=3)
            axis.plot(low, y, "|", color=colour, markersize=7, zorder=3)
            exact = "upper end" in row["kl_by"]
            axis.errorbar(
                x, y, _error(row, metric), fmt=marker, color=colour, markersize=6, linewidth=1, label=label, zorder=5,
                markerfacecolor=colour if exact else "white",
            )  # fmt: skip
        axis.annotate(text, (x, y), (6, -9), textcoords="offset points", fontsize=7, color=colour)


def _climbing(rows: Sequence[Row], family: str):
    metrics = [("gold_reward", "gold reward")] if rows[0].get("gold_reward") is not None else []
    metrics += [("accuracy", "accuracy")]
    figure, axes = _new(len(metrics))
    curves = (*STEPS, "best of n by reward", "best of n by energy", "policy")
    for axis, (metric, label) in zip(axes, metrics, strict=True):
        for curve in curves:
            colour, marker, name = CURVES[curve]
            series = [row for row in rows if row["curve"] == "policy" and curve in STEPS] + _series(rows, curve)
            if not any(row["curve"] == curve for row in series):
                continue
            axis.plot([row["reward"] for row in series], [row[metric] for row in series], color=colour, alpha=0.7)
            for row in series:
                if row["curve"] != curve:
                    continue
                last = row is series[-1]
                axis.errorbar(
                    row["reward"], row[metric], _error(row, metric), _error(row, "reward"), fmt=marker, color=colour,
                    markersize=6, elinewidth=0.7, label=name if last else None, zorder=4,
                )  # fmt: skip
                if row["at"] is not None and not math.isnan(row["at"]):
                    axis.annotate(
                        f"{row['at']:g}", (row["reward"], row[metric]), (6, -9), textcoords="offset points",
                        fontsize=7, color=colour,
                    )  # fmt: skip
        axis.set(xlabel="reward (optimised)", ylabel=label)
    _legend(figure, axes[0])
    figure.suptitle(f"{family}: does accuracy rise with the reward?", x=0.01, ha="left", fontsize=13)
    return figure


def _legend(figure, axis) -> None:
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
