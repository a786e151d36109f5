"""The page of a real decode run, as text and as a browser draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from nabla_rl.cli import app as cli
from nabla_rl.report.decoded import COLUMNS, write_report
from nabla_rl.report.html import rows_table, write_page
from nabla_rl.report.summary import summarise
from nabla_rl.report.table import format_cell, format_power, present_columns
from tests.cli.toys_cli import options, read_results, save_models
from tests.report.browser import CHROMIUM, Browser
from tests.report.lines import Page, edit, line

DECODERS = ["greedy", "best_of_n", "self_consistency", "nabla", "edit_search"]


@dataclass
class Run:
    folder: Path
    results: list[dict] = field(default_factory=list)

    @property
    def page(self) -> Path:
        return self.folder / "report.html"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Four problems by models with random weights."""
    models, folder = save_models(tmp_path_factory.mktemp("models")), tmp_path_factory.mktemp("run") / "run"
    more = {"model__decoders": f"[{','.join(DECODERS)}]", "model__edit_search__max_rollouts": 4}
    assert cli.decode(options(models, folder, model__edit_search__min_drop=0.0, **more)) == 0
    return Run(folder, read_results(folder))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_lines_made_by_hand_are_like_those_of_a_run(run):
    made = line()
    for row in run.results:
        assert list(row) == list(made)
        assert list(row["cost"]) == list(made["cost"])
        assert all(list(entry) == list(edit()) for entry in row["trace"])
    assert any(row["trace"] for row in run.results)


def test_the_page_shows_all_that_the_run_has_written(run):
    page = Page(run.page.read_text(encoding="utf-8"))
    assert len(run.results) == 20
    assert page.pres == [row["completion"] for row in run.results]
    for row in run.results[:: len(DECODERS)]:
        assert page.text.count(row["prompt"]) == 1
        assert f"Expected answer: {row['expected']}" in page.text
    right = sum(row["correct"] for row in run.results)
    assert page.text.count("✓ right") == right and page.text.count("✗ wrong") == len(run.results) - right
    for row in run.results:
        assert f"{format_power(row['cost']['flops'])} FLOPs" in page.text
        assert f"reward {row['reward']:.2f}".replace("-", "−") in page.text
        assert row["answer"] is None or f"answer {row['answer']}" in page.text
        for number, entry in enumerate(row["trace"], start=1):
            assert f"{number}. position {entry['position']}: " in page.text


def test_the_table_has_every_decoder_with_the_cells_of_its_summary(run):
    cells = Page(run.page.read_text(encoding="utf-8")).cells
    rows = summarise(run.results, DECODERS)
    columns = present_columns(rows, COLUMNS)
    assert cells[len(columns) :] == [format_cell(row, column) for row in rows for column in columns]


def test_the_page_says_what_was_run(run):
    config = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    text = Page(run.page.read_text(encoding="utf-8")).text
    said = [config["model"]["policy"]["name"], config["model"]["reward"]["name"], "β", "seed", "problems finished"]
    assert [entry for entry in said if entry not in text] == []


# As it is drawn

OVERFLOWS = """
[document.documentElement, ...document.querySelectorAll('.scroll, .card, .card pre')]
  .filter(node => node.scrollWidth > node.clientWidth + 1).map(node => node.className || node.tagName)
"""
CONTRASTS = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    const colour = parts(getComputedStyle(node).backgroundColor);
    return colour.length === 4 && colour[3] === 0 && node.parentElement ? behind(node.parentElement) : colour;
  };
  return [...document.querySelectorAll('body *:not(svg, svg *)')].map(node => {
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
})()
"""


def test_a_reader_sees_every_completion(run, browser):
    browser.open(run.page)
    cards = browser.evaluate(
        "[...document.querySelectorAll('.card')].map(card => {"
        "const pre = card.querySelector('pre'), box = pre.getBoundingClientRect();"
        "return {decoder: card.querySelector('h4').innerText, text: pre.textContent, seen: pre.innerText,"
        "visible: pre.checkVisibility() && box.height > 0 && box.left >= 0 && box.right <= innerWidth,"
        "verdict: card.querySelector('.badge').innerText}})"
    )
    assert [card["text"] for card in cards] == [row["completion"] for row in run.results]
    assert all(card["visible"] for card in cards)
    assert [card["seen"].split() for card in cards] == [row["completion"].split() for row in run.results]
    assert [card["decoder"] for card in cards] == [row["decoder"] for row in run.results]
    assert [card["verdict"] for card in cards] == ["✓ right" if row["correct"] else "✗ wrong" for row in run.results]


def test_nothing_is_wider_than_a_window_of_1280_pixels(run, browser):
    browser.open(run.page)
    assert browser.evaluate("innerWidth") == 1280
    assert browser.evaluate("document.querySelectorAll('table').length") == 1
    assert browser.evaluate(OVERFLOWS) == []


def test_the_widest_table_fits_1280_pixels(browser, tmp_path):
    row = {
        "accuracy": 0.53125, "accuracy_low": 0.41, "accuracy_high": 0.65, "mean_reward": -1234.5,
        "gold_reward": -1234.5,
        "rollouts": 123.4, "policy_calls": 1234567.8, "reward_calls": 123456.7, "flops": 1.2e15, "seconds": 12345.6,
        "acceptance_rate": 0.123,
    }  # fmt: skip
    rows = [{"decoder": name, **row} for name in [*DECODERS, "some_package.some_module.SomeDecoderWithALongName"]]
    browser.open(write_report(tmp_path / "r.html", "t", rows))
    assert browser.evaluate("document.querySelectorAll('th').length") == len(COLUMNS)
    assert browser.evaluate(OVERFLOWS) == []


def test_a_table_that_is_too_wide_is_noticed_and_scrolls_by_itself(browser, tmp_path):
    columns = [f"a_wide_column_{number}" for number in range(40)]
    path = write_page(tmp_path / "r.html", "t", [rows_table([dict.fromkeys(columns, 123456)], columns)])
    browser.open(path)
    assert browser.evaluate(OVERFLOWS) == ["scroll"]


def test_on_a_phone_only_the_table_and_the_figure_scroll(run, browser):
    browser.open(run.page, width=390)
    assert set(browser.evaluate(OVERFLOWS)) <= {"scroll"}
    assert browser.evaluate("getComputedStyle(document.querySelector('figure')).overflowX") == "auto"
    assert browser.evaluate("document.querySelector('.card').getBoundingClientRect().width") > 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(run, browser, scheme):
    browser.open(run.page, scheme=scheme)
    ratios = browser.evaluate(CONTRASTS)
    assert len(ratios) > 100 and min(ratios) >= 4.5  # what WCAG 2 asks of text
    red = browser.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert red > 200 if scheme == "light" else red < 50
