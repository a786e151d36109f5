"""Write the tables of README.md and docs/results.md from the stored measurements: python docs/results/tables.py

A page names a table by a comment, `<!-- table: NAME -->`; what stands between it and the next empty line after the
table is replaced. NAME is a file of this folder, or `front_page`, which is read off the two frontiers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
MARK = re.compile(r"(<!-- table: (\w+) -->\n)\n?(?:\|.*\n)*")

FRONT_PAGE = (
    ("greedy", "greedy", None),
    ("best-of-8", "best_of_n", 8),
    ("best-of-32", "best_of_n", 32),
    ("∇-Reasoner as published", "published", None),
    ("edit search by gradient", "edit_search_gradient", None),
    ("edit search by exact values", "edit_search", None),
    ("the reward model's own language model, greedy", "strong_greedy", None),
)
"""Rows of the first page's table: label, decoder of the frontier, number of rollouts (None is its last point)."""

Cell = Any
"""A number, a text, None, or a value with its interval (low, high) and its cost (flops)."""


def read(name: str) -> dict[str, Any]:
    """A stored measurement."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def front_page() -> dict[str, Any]:
    """The table of the first page, read off the frontiers."""
    families = {family: read(f"frontier_{family}")["decoders"] for family in ("words", "sorting")}
    rows = [[label, *(_point(found[decoder], n) for found in families.values())] for label, decoder, n in FRONT_PAGE]
    return {"columns": [["", "text"], ["word problems", "accuracy"], ["sorting letters", "accuracy"]], "rows": rows}


def _point(decoder: dict[str, Any], rollouts: int | None) -> Cell:
    points = decoder["points"]
    found = points[-1] if rollouts is None else next(p for p in points if p["rollouts"] == rollouts)
    return {"value": found["accuracy"]} | {name: found[name] for name in ("low", "high", "flops")}


def table(name: str) -> dict[str, Any]:
    """A table by its name: columns with their kinds, and rows of cells."""
    return front_page() if name == "front_page" else read(name)


def scientific(value: float) -> str:
    """4.7e8."""
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(power)}"


KINDS: dict[str, tuple[str, str]] = {
    "text": ("", ""),
    "accuracy": (".3f", ".2f"),
    "share": (".0%", ".0%"),
    "points": ("+.1f", ".1f"),
    "rate": (".2f", ".2f"),
    "rate3": (".3f", ".3f"),
    "percent": ("+.0f", ""),
    "number": ("g", "g"),
}
"""How a column prints a value, and the ends of its interval."""


def cell(content: Cell, kind: str) -> str:
    """A cell as it is printed."""
    if content is None or isinstance(content, str):
        return content or ""
    if kind == "flops":
        return scientific(content)
    whole, ends = KINDS[kind]
    if not isinstance(content, dict):
        return format(content, whole) + ("%" if kind == "percent" else "")
    text = format(content["value"], whole)
    if "low" in content:
        text += f" [{format(content['low'], ends)}, {format(content['high'], ends)}]"
    return text + (f" at {scientific(content['flops'])}" if "flops" in content else "")


def markdown(content: dict[str, Any]) -> str:
    """A table in Markdown."""
    names, kinds = zip(*content["columns"], strict=True)
    lines = [names, ["---"] * len(names)]
    lines += [[cell(entry, kind) for entry, kind in zip(row, kinds, strict=True)] for row in content["rows"]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rewrite(text: str, made: Callable[[str], str] = lambda name: markdown(table(name))) -> str:
    """A page with its tables made anew."""
    return MARK.sub(lambda match: f"{match[1]}\n{made(match[2])}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewrite(page.read_text(encoding="utf-8")), encoding="utf-8")
