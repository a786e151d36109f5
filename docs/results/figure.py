"""Draw docs/figures/accuracy_flops.svg and .png from the stored frontiers: python docs/results/figure.py"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "nabla_rl"
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

HERE = Path(__file__).parent
OUT = HERE.parent / "figures"
LINES = (
    ("edit_search", "edit search by exact values", "#0072B2", "o"),
    ("edit_search_taught", "edit search by gradient", "#56B4E9", "s"),
    ("beam_2", "beam search, width 2", "#009E73", "^"),
    ("best_of_n", "best-of-n", "#E69F00", "D"),
    ("published", "∇-Reasoner as published", "#D55E00", "v"),
)
"""Decoder, label, colour (Okabe and Ito's) and marker of each line."""
POINTS = (
    ("greedy", "greedy", "X"),
    ("strong_greedy", "the reward model's own language model, greedy", "*"),
)
"""What is one point: decoder, label and marker."""
PANELS = (("words", "word problems"), ("sorting", "sorting letters"))


def series(points: list[dict[str, Any]]) -> tuple[list[float], ...]:
    """What a line shows: FLOPs, accuracy, and both ends of its interval."""
    return tuple([point[name] for point in points] for name in ("flops", "accuracy", "low", "high"))  # pyright: ignore


def draw() -> plt.Figure:  # pyright: ignore
    """Two panels, accuracy against FLOPs, with 95% intervals as bands."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True, layout="constrained")
    for axes, (family, title) in zip(panels, PANELS, strict=True):
        decoders = json.loads((HERE / f"frontier_{family}.json").read_text(encoding="utf-8"))["decoders"]
        for key, label, colour, marker in LINES:
            flops, accuracy, low, high = series(decoders[key]["points"])
            axes.fill_between(flops, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(flops, accuracy, marker=marker, color=colour, label=label, markersize=4)
        for key, label, marker in POINTS:
            last = decoders[key]["points"][-1]
            axes.plot(last["flops"], last["accuracy"], marker, color="black", label=label, markersize=8)
        axes.set(xscale="log", xlabel="FLOPs per problem, policy and reward model", title=title, ylim=(0.4, 1.03))
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_xlim()
        axes.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on test problems")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Write both files."""
    figure = draw()
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "accuracy_flops.svg", metadata={"Date": None})
    figure.savefig(OUT / "accuracy_flops.png", dpi=144, metadata={"Software": None})


if __name__ == "__main__":
    main()
