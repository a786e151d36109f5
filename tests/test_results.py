"""Every measured number on the front pages is a stored one: tables are parsed and held against docs/results/*.json."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
MARKED = re.compile(r"<!-- table: (\w+) -->\n\n((?:\|.*\n)+)")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e\d+)?")
STORED = sorted(file.stem for file in RESULTS.glob("*.json"))
FRONTIERS = [name for name in STORED if name.startswith("frontier_")]


def script(name: str) -> ModuleType:
    """A script of docs/results, which is no package."""
    spec = importlib.util.spec_from_file_location(f"results_{name}", RESULTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def tables() -> list[tuple[str, str, str]]:
    """Page, name and text of every marked table."""
    pages = {"README.md": README, "docs/results.md": PAGE}
    return [(page, *found) for page, file in pages.items() for found in MARKED.findall(file.read_text("utf-8"))]


def numbers(cell: Any) -> list[float]:
    """What a stored cell has to say, in the order in which it is printed."""
    if cell is None or isinstance(cell, str):
        return []
    if not isinstance(cell, dict):
        return [float(cell)]
    return [float(cell[name]) for name in ("value", "low", "high", "flops") if name in cell]


def is_rounded(printed: str, value: float) -> bool:
    """Whether a printed number is the value, to the digits that are printed."""
    mantissa, _, power = printed.partition("e")
    places = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(power or 0) - places)
    return abs(float(printed) - value) <= unit * (0.5 + 1e-6)


@pytest.mark.parametrize(("page", "name", "text"), tables(), ids=lambda part: part if len(part) < 40 else "")
def test_a_table_prints_the_stored_numbers(page, name, text):
    """Cell by cell: every number that is stored is printed, rounded, and nothing else is."""
    content = script("tables").table(name)
    header, _, *lines = [[entry.strip() for entry in line.strip().strip("|").split("|")] for line in text.splitlines()]
    assert header == [column for column, _ in content["columns"]]
    assert len(lines) == len(content["rows"]), f"{page}, table {name}: rows"
    for line, row in zip(lines, content["rows"], strict=True):
        for printed, cell, (column, kind) in zip(line, row, content["columns"], strict=True):
            if isinstance(cell, str):
                assert printed == cell
                continue
            found, wanted = NUMBER.findall(printed), numbers(cell)
            scale = 100 if kind == "share" else 1
            assert len(found) == len(wanted), f"{page}, table {name}, {row[0]}, {column}: {printed!r} for {cell}"
            assert all(is_rounded(one, scale * other) for one, other in zip(found, wanted, strict=True)), (
                f"{page}, table {name}, {row[0]}, {column}: {printed!r} for {cell}"
            )


def test_every_measurement_is_shown_and_says_where_it_is_from():
    """No file without a table, a command and a commit."""
    shown = {name for _, name, _ in tables()}
    assert shown == {*STORED, *script("tables").DERIVED} - set(FRONTIERS)
    for name in STORED:
        assert stored(name)["set_up"] and stored(name)["command"] and stored(name)["commit"], name


def test_no_table_of_these_pages_is_unmarked():
    for page in (README, PAGE):
        rest = MARKED.sub("", page.read_text("utf-8"))
        assert not re.search(r"^\|.*\d", rest, flags=re.MULTILINE), f"{page.name}: a table that no test sees"


def section(page: Path, heading: str) -> str:
    return page.read_text("utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_numbers_in_what_we_found_stand_in_a_table():
    """Percentages, points and accuracies of the front page's findings are those of a table of the results page."""
    printed = {number.lstrip("+") for _, _, text in tables() for number in NUMBER.findall(text)}
    named = re.findall(r"(?<![\w-])(?:\d+\.\d+|\d+(?=%))(?![\w-])", section(README, "What we found"))
    assert named and set(named) <= printed, set(named) - printed


def test_the_first_table_is_short():
    text = next(text for page, name, text in tables() if name == "front_page")
    assert len(text.splitlines()) - 2 <= 7


def test_the_readme_is_short():
    """At most 700 words outside code blocks."""
    text = re.sub(r"^```.*?^```", "", README.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    assert len(text.split()) <= 700, len(text.split())


@pytest.mark.parametrize("name", FRONTIERS)
def test_a_frontier_is_a_frontier(name):
    """Costs rise along a line, and an accuracy lies within its interval."""
    for label, decoder in stored(name)["decoders"].items():
        points = decoder["points"]
        assert points, label
        assert [p["flops"] for p in points] == sorted(p["flops"] for p in points), label
        assert all(p["low"] <= p["accuracy"] <= p["high"] for p in points), label


def test_the_figure_is_drawn_from_the_stored_points():
    """Its lines have the very points, and the file on the page shows as many markers."""
    figure = script("figure")
    drawn = figure.draw()
    for axes, (family, _) in zip(drawn.axes, figure.PANELS, strict=True):
        decoders = stored(f"frontier_{family}")["decoders"]
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for key, label, *_ in figure.LINES:
            assert lines[label] == [[p["flops"], p["accuracy"]] for p in decoders[key]["points"]]
    assert len(figure.LINES) == 5
    assert (ROOT / "docs" / "figures" / "accuracy_flops.svg").is_file()
    assert "docs/figures/accuracy_flops." in README.read_text("utf-8")


def test_the_figure_on_disk_is_the_one_that_the_script_draws(tmp_path, monkeypatch):
    """Its lines' coordinates are those of a fresh drawing; fonts and versions may differ."""
    figure = script("figure")
    monkeypatch.setattr(figure, "OUT", tmp_path)
    figure.main()
    kept = (ROOT / "docs" / "figures" / "accuracy_flops.svg").read_text("utf-8")
    assert marks(kept) == marks((tmp_path / "accuracy_flops.svg").read_text("utf-8"))


def marks(svg: str) -> list[tuple[float, float]]:
    """Where markers stand, to a tenth of a point."""
    return [
        (round(float(x), 1), round(float(y), 1)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)
    ]
