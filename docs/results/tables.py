"""Write the tables of README.md and docs/results.md from the stored measurements: python docs/results/tables.py

A page names a table by a comment, `<!-- table: NAME -->`, and the table after it is replaced. NAME is a file of this
folder, or a key of `DERIVED`, whose tables are read off the two frontiers.
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
MARK = re.compile(r"(<!-- table: (\w+) -->\n)\n*(?:\|.*\n)*\n?")

FRONT_PAGE = (
    ("greedy", "greedy", None),
    ("best-of-8", "best_of_n", 8),
    ("best-of-32", "best_of_n", 32),
    ("∇-Reasoner as published", "published", None),
    ("edit search by gradient", "edit_search_taught", None),
    ("edit search by exact values", "edit_search", None),
    ("the reward model's own language model, greedy", "strong_greedy", None),
)
"""Rows of the first page's table: label, decoder of the frontiers, number of rollouts (None is its last point)."""
FRONTIERS = (
    ("greedy", "greedy", None),
    ("self-consistency, 32 samples", "self_consistency", 32),
    ("best-of-8 by energy", "best_of_n", 8),
    ("best-of-32 by energy", "best_of_n", 32),
    ("beam search by token, width 2", "beam_2", None),
    ("∇-Reasoner, `--config published`", "published", None),
    ("the same, gradient threshold in the paper's units", "published_threshold", None),
    ("edit search without values, same positions", "twin_located", None),
    ("edit search by a taught gradient", "edit_search_taught", None),
    ("edit search by exact values (default)", "edit_search", None),
    ("tiny-strong, greedy", "strong_greedy", None),
)
"""The same of the results page."""

Cell = Any
"""A number, a text, None, or a value with its interval (low, high) and its cost (flops)."""


def read(name: str) -> dict[str, Any]:
    """A stored measurement."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def front_page() -> dict[str, Any]:
    """The table of the first page, read off the frontiers."""
    words, sorting = _decoders("words"), _decoders("sorting")
    columns = [["", "text"], ["word problems", "accuracy"], ["sorting letters", "accuracy"]]
    rows = [[label, _point(words[key], n), _point(sorting[key], n)] for label, key, n in FRONT_PAGE]
    return {"columns": columns, "rows": rows}


def frontiers() -> dict[str, Any]:
    """The same for more decoders, with sequential calls."""
    families = {family: _decoders(family) for family in ("words", "sorting")}
    columns = [["decoder", "text"]]
    for family in families:
        columns += [[family, "accuracy"], [f"{family}, sequential calls", "calls"]]
    rows = []
    for label, key, n in FRONTIERS:
        found = [_point(decoders[key], n) for decoders in families.values()]
        rows.append([label, *(part for one in found for part in (one, one["sequential_calls"]))])
    return {"columns": columns, "rows": rows}


def _decoders(family: str) -> dict[str, Any]:
    return read(f"frontier_{family}")["decoders"]


def _point(decoder: dict[str, Any], rollouts: int | None) -> dict[str, Any]:
    points = decoder["points"]
    found = points[-1] if rollouts is None else next(p for p in points if p["rollouts"] == rollouts)
    return {"value": found["accuracy"]} | {name: found[name] for name in ("low", "high", "flops", "sequential_calls")}


DERIVED = {"front_page": front_page, "frontiers": frontiers}
"""Tables that are read off several files."""


def table(name: str) -> dict[str, Any]:
    """A table by its name: columns with their kinds, and rows of cells."""
    return DERIVED[name]() if name in DERIVED else read(name)


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
    "calls": (".0f", ""),
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
    return MARK.sub(lambda match: f"{match[1]}\n{made(match[2])}\n", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewrite(page.read_text(encoding="utf-8")), encoding="utf-8")
