"""The pictures of the exact study: convergence of both sides, where decoders land, and what the target costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nabla_rl.duality.exact import expected_reward, kl_divergence, tilt
from nabla_rl.duality.study import build_landscape
from nabla_rl.duality.verdicts import KL_BOUND, TV_BOUND, pick

STYLES: dict[str, tuple[str, str, float]] = {
    # name: colour, dash, width. Particles are warm, weights are cool; what ends elsewhere than at ρ* is dashed.
    "Gibbs-with-gradients": ("#d94801", "-", 2.4),
    "discrete Langevin": ("#fd8d3c", "-", 2.4),
    "Langevin on logits": ("#c51b8a", "-", 1.6),
    "Gibbs-with-gradients + independence": ("#7f2704", "-", 2.4),
    "Langevin on logits + independence": ("#7a0177", "-", 1.6),
    "independence Metropolis": ("#969696", "-", 2.2),
    "discrete Langevin, uncorrected": ("#fd8d3c", "--", 1.6),
    "DTO, 100 steps of 0.1": ("#b30000", ":", 2.4),
    "DTO, published": ("#e34a33", ":", 2.4),
    "RL, exact gradient": ("#08519c", "-", 2.4),
    "RL, sampled gradient": ("#4292c6", "-", 2.4),
    "RL, natural gradient": ("#41ae76", "-", 2.4),
}
GROUPS: dict[str, tuple[str, ...]] = {
    # heading of the legend: its curves
    "one particle, by gradients": ("Gibbs-with-gradients", "discrete Langevin", "Langevin on logits"),
    "one particle, with rollouts": (
        "Gibbs-with-gradients + independence",
        "Langevin on logits + independence",
        "independence Metropolis",
    ),
    "one particle, to another law": ("discrete Langevin, uncorrected", "DTO, 100 steps of 0.1", "DTO, published"),
    "weights": ("RL, exact gradient", "RL, sampled gradient", "RL, natural gradient"),
}
TITLES = {
    "table": "a table",
    "letters": "networks: sorting, likely answers close",
    "letters_barrier": "networks: sorting, likely answers apart",
}
LABELS = {"independence Metropolis": "independence Metropolis, no gradient"}
PARTICLE, WEIGHTS = "Gibbs-with-gradients", "RL, sampled gradient"
"""What the price of training is measured between."""
FLOOR = 3e-5


def write_figures(points: Sequence[dict[str, Any]], folder: Path) -> list[tuple[str, Path]]:
    """Every figure as SVG and PNG.

    Returns:
        A caption and the SVG's path for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    betas = sorted({point["beta"] for point in points}, reverse=True)
    main = betas[len(betas) // 2]
    seed = points[0]["seed"]
    points = [point for point in points if point["seed"] == seed]
    written = []
    for beta in [main, *(beta for beta in betas if beta != main)]:
        mine = [point for point in points if point["beta"] == beta]
        caption = (
            f"KL to the tilted policy at λ = {1 / beta:g} against gradients of one sequence: warm, one particle's law "
            "(its cost is paid for each sample); cool, the trained weights' law (paid once). Curves that level out "
            "above the line end at another law. The arrow: what training by samples costs, in samples by "
            "Gibbs-with-gradients."
        )
        written.append((caption, _save(_convergence(mine), folder / f"convergence_lambda_{1 / beta:g}.svg")))
    mine = [point for point in points if point["beta"] == main]
    caption = (
        f"Where decoders land at λ = {1 / main:g}: reward and KL from the policy of their exact output laws. The line "
        "is the best that any law can do, the tilted policies of all strengths."
    )
    written.append((caption, _save(_frontier(mine), folder / "frontier.svg")))
    caption = f"What it takes a particle to come within total variation {TV_BOUND} of the tilted policy, by λ."
    written.append((caption, _save(_cost(points), folder / "cost.svg")))
    return written


def _axes(columns: int, height: float = 4.6, width: float = 4.9):
    # no pyplot: it keeps global state and may look for a display
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _save(figure, path: Path) -> Path:
    import matplotlib

    # fixed ids and no date: the same results draw the same picture
    with matplotlib.rc_context({"svg.hashsalt": "nabla_rl"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)
    return path


def _convergence(points: Sequence[dict[str, Any]]):
    figure, axes = _axes(len(points), height=6.0)
    highest = max(value for point in points for curve in point["curves"].values() for value in curve["kl"])
    for axis, point in zip(axes, points, strict=True):
        for name, (colour, dash, width) in STYLES.items():
            curve = point["curves"].get(name)
            if curve is None:
                continue
            spent, kl = _visible(curve["evaluations"], curve["kl"])
            axis.plot(
                spent, kl, dash, color=colour, linewidth=width, label=name, solid_capstyle="round",
                zorder=3 if curve["side"] == "weights" else 4,
            )  # fmt: skip
        axis.axhline(KL_BOUND, color="#444", linewidth=0.8, zorder=1)
        axis.set(xscale="log", yscale="log", ylim=(FLOOR, 2 * min(highest, 20.0)), xlim=(0.9, 1e6))
        axis.set_title(TITLES.get(point["landscape"], point["landscape"]), loc="left", fontsize=11)
        axis.set_xlabel("gradients of one sequence: for each sample (warm), in all (cool)", fontsize=9)
        axis.minorticks_off()
        _mark_price(axis, point)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    axes[0].set_ylabel(r"KL to the tilted policy $\rho^*$ (nats)")
    axes[0].annotate(
        f"KL = {KL_BOUND:g}", (0.01, KL_BOUND), xycoords=("axes fraction", "data"), va="bottom", fontsize=8,
        color="#444",
    )  # fmt: skip
    _grouped_legend(figure, axes[0])
    figure.suptitle(
        f"Samples moved at test time and weights moved in training head for one law   (λ = {points[0]['lambda']:g})",
        x=0.01, ha="left", fontsize=13,
    )  # fmt: skip
    return figure


def _mark_price(axis, point: dict[str, Any]) -> None:
    """An arrow between the two sides where they cross the line: how many samples training costs."""
    sample, training = (_crossing(point["curves"].get(name)) for name in (PARTICLE, WEIGHTS))
    if sample is None or training is None or abs(math.log10(training / sample)) < 0.5:
        return
    y, ratio = KL_BOUND * 0.62, training / sample
    axis.annotate("", (training, y), (sample, y), arrowprops={"arrowstyle": "<->", "color": "#444", "linewidth": 1.0})
    text = f"training = {ratio:,.0f} samples" if ratio >= 1 else f"training = 1/{1 / ratio:,.0f} sample"
    axis.annotate(
        text, (math.sqrt(sample * training), y), (0, -3), textcoords="offset points", ha="center", va="top",
        fontsize=8, color="#444", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
        zorder=6,
    )  # fmt: skip


def _crossing(curve: dict[str, Any] | None) -> float | None:
    """Where a curve first is below the line."""
    if curve is None:
        return None
    pairs = zip(curve["evaluations"], curve["kl"], strict=True)
    return next((max(spent, 1.0) for spent, kl in pairs if kl <= KL_BOUND), None)


def _grouped_legend(figure, axis) -> None:
    """A column for each group of curves, under its heading."""
    from matplotlib.lines import Line2D

    drawn = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    groups = {heading: [name for name in names if name in drawn] for heading, names in GROUPS.items()}
    most = max(len(names) for names in groups.values())
    nothing = Line2D([], [], color="none")
    handles, labels = [], []
    for heading, names in groups.items():
        handles += [nothing, *(drawn[name] for name in names), *[nothing] * (most - len(names))]
        labels += [heading, *(LABELS.get(name, name) for name in names), *[""] * (most - len(names))]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(groups), fontsize=9, frameon=False)
    for text in legend.get_texts():
        if text.get_text() in groups:
            text.set_fontweight("bold")
            text.set_position((-18, 0))


def _visible(spent: Sequence[float], kl: Sequence[float]) -> tuple[list[float], list[float]]:
    """The part of a curve above the floor. What has cost nothing yet is drawn as a level line up to the first cost."""
    pairs = []
    for k, (x, y) in enumerate(zip(spent, kl, strict=True)):
        pairs.append((max(x, 1.0), max(y, FLOOR / 10)))
        if x == 0 and k + 1 < len(spent):
            pairs.append((max(spent[k + 1], 1.0), max(y, FLOOR / 10)))
        if y < FLOOR / 3:
            break
    return [x for x, _ in pairs], [y for _, y in pairs]


MARKS: dict[str, tuple[str, str, bool]] = {
    # label: colour, marker, filled
    "best of n by reward": ("#756bb1", "o", True),
    "best of n by energy": ("#31a354", "o", True),
    "DTO, published": ("#b30000", "v", False),
    "DTO, 100 steps of 0.1": ("#b30000", "v", True),
    "∇-Reasoner, published": ("#d94801", "P", True),
    "∇-Reasoner, accept by energy": ("#d94801", "s", True),
    "∇-Reasoner, Metropolis, 8 sweeps": ("#d94801", "s", False),
    "loop without gradient, by energy": ("#636363", "D", True),
    "loop without gradient, Metropolis, 8 sweeps": ("#636363", "D", False),
}


def _frontier(points: Sequence[dict[str, Any]]):
    figure, axes = _axes(len(points), height=5.4)
    for axis, point in zip(axes, points, strict=True):
        landscape = build_landscape(point["landscape"], point["seed"])
        strengths = [0.0, *(10 ** (k / 10) for k in range(-20, 25))]
        laws = [tilt(landscape.logps, landscape.rewards, s) for s in strengths]
        frontier = [
            (float(kl_divergence(law, landscape.logps)), float(expected_reward(law, landscape.rewards)))
            for law in laws
        ]
        axis.plot(*zip(*frontier, strict=True), color="#222", linewidth=2, label="tilted policies", zorder=2)
        right = 1.15 * max(place["policy_kl"] for place in point["placements"])
        for strength in (1, 2, 5, 10):
            law = tilt(landscape.logps, landscape.rewards, strength)
            x, y = float(kl_divergence(law, landscape.logps)), float(expected_reward(law, landscape.rewards))
            axis.plot(x, y, "|", color="#222", markersize=10, zorder=3)
            if x > 0.05 * right and abs(x - point["target"]["policy_kl"]) > 0.02 * right:
                axis.annotate(f"λ={strength}", (x, y), (-2, 6), textcoords="offset points", ha="right", fontsize=8)
        axis.plot(
            point["target"]["policy_kl"], point["target"]["reward"], "*", color="#ffbf00", markersize=17,
            markeredgecolor="#222", label=r"$\rho^*$", zorder=6,
        )  # fmt: skip
        for place in point["placements"]:
            label = _frontier_label(place["name"])
            if label not in MARKS:
                continue
            colour, mark, filled = MARKS[label]
            x, y = place["policy_kl"], place["reward"]
            axis.plot(
                x, y, mark, color=colour, markersize=7, markerfacecolor=colour if filled else "white", label=label,
                zorder=5, linestyle="none",
            )  # fmt: skip
            if place["name"].startswith("best"):
                number = place["name"].split()[2]
                axis.annotate(number, (x, y), (5, -9), textcoords="offset points", fontsize=7, color=colour)
        shown = [reward for divergence, reward in frontier if divergence < right]
        lowest = min([frontier[0][1], *(place["reward"] for place in point["placements"])])
        margin = 0.08 * (max(shown) - lowest)
        axis.set_ylim(lowest - margin, max(shown) + 2 * margin)
        axis.set_title(TITLES.get(point["landscape"], point["landscape"]), loc="left", fontsize=11)
        axis.set(xlabel="KL(law‖policy), nats", xlim=(-0.03 * right, right))
    axes[0].set_ylabel("expected reward")
    found = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False,
    )  # fmt: skip
    figure.suptitle(f"Where decoders land, exactly   (λ = {points[0]['lambda']:g})", x=0.01, ha="left", fontsize=13)
    return figure


def _frontier_label(name: str) -> str:
    return f"best of n {name.split(maxsplit=3)[3]}" if name.startswith("best") else name


def _cost(points: Sequence[dict[str, Any]]):
    names = list(dict.fromkeys(point["landscape"] for point in points))
    figure, axes = _axes(len(names), height=4.4)
    chains = [
        "Gibbs-with-gradients", "discrete Langevin", "Gibbs-with-gradients + independence", "independence Metropolis",
    ]  # fmt: skip
    for axis, name in zip(axes, names, strict=True):
        mine = sorted((point for point in points if point["landscape"] == name), key=lambda point: point["lambda"])
        for chain in chains:
            colour, dash, width = STYLES[chain]
            values = [pick(point["samplers"], chain)["evaluations_to_tv"] for point in mine]
            axis.plot(
                [point["lambda"] for point in mine], [math.nan if v is None else v for v in values], "o" + dash,
                color=colour, linewidth=width, label=LABELS.get(chain, chain),
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="λ = 1/β")
        axis.set_xticks([point["lambda"] for point in mine], [f"{point['lambda']:g}" for point in mine])
        axis.minorticks_off()
        axis.set_title(TITLES.get(name, name), loc="left", fontsize=11)
    axes[0].set_ylabel(f"gradients (or rollouts) to TV {TV_BOUND:g}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle("The price of one sample of the tilted policy (no point: not reached)", x=0.01, ha="left")
    return figure
