"""The page itself: it loads nothing, escapes everything, and holds tables, facts and figures."""

from __future__ import annotations

import re

import pytest

from nabla_rl.report.decoded import write_report
from nabla_rl.report.html import facts, rows_table, write_page
from nabla_rl.run_folder import as_user_error
from nabla_rl.types import UserError
from tests.report.lines import EVIL, Page, edit, line

SUMMARY = [
    {"decoder": "greedy", "accuracy": 0.25, "accuracy_low": 0.1, "accuracy_high": 0.5, "flops": 2e9, "seconds": 0.5},
    {"decoder": EVIL, "accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.9, "flops": 3e11, "seconds": None},
    {"decoder": "unfinished", "accuracy": None},
]
EVIL_LINE = line(
    EVIL,
    EVIL,
    prompt=EVIL,
    completion=EVIL,
    answer=EVIL,
    expected=EVIL,
    trace=[edit(old_token=EVIL, new_token=EVIL)],
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("run") / "deep" / "report.html"
    sentences = {"greedy": EVIL}
    write_report(path, EVIL, SUMMARY, [EVIL_LINE], described={EVIL: EVIL}, sentences=sentences)
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_loads_nothing(page):
    tags = Page(page).tags
    names = {name for name, _ in tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed"}
    assert "svg" in names
    for _, attributes in tags:
        for key in ("href", "xlink:href", "src"):
            assert (attributes.get(key) or "#").startswith("#")
    assert not re.search(r"url\((?!['\"]?#)|@import", page)
    # The only addresses left are the names of SVG's namespaces, which are never fetched.
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    policy = next(attributes["content"] for name, attributes in tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_everything_from_outside_is_escaped(page):
    assert "<script" not in page
    shown = EVIL.replace(" ", "␣")
    # title, heading, name and value of what was run, sentence, table, id, question, expected, decoder, completion,
    # answer
    assert Page(page).text.count(EVIL) == 12
    assert Page(page).text.count(shown) == 2  # both tokens of the edit


def test_same_run_writes_the_same_page(tmp_path):
    pages = [write_report(tmp_path / name, "t", SUMMARY, [line()]).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_a_page_replaces_the_older_one_and_leaves_nothing_else(tmp_path):
    write_page(tmp_path / "r.html", "old", ["<p>old</p>"])
    path = write_page(tmp_path / "r.html", "new", ["", "<p>new</p>"])
    text = path.read_text(encoding="utf-8")
    assert "new" in text and "old" not in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


def test_rows_table_has_the_cells_of_the_terminal_and_no_empty_columns():
    cells = Page(rows_table(SUMMARY, ["decoder", "accuracy", "gold_reward", "flops"])).cells
    assert cells[:3] == ["decoder", "accuracy", "FLOPs"]
    assert cells[3:6] == ["greedy", "0.250 [0.10, 0.50]", "2.0e9"]


def test_facts_show_names_and_values_in_order():
    text = Page(facts({"policy": "a", "β": 0.5, "reward model": None})).text
    assert text.split("\n") == ["", "policya", "β0.5", "reward model–", ""]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir"), as_user_error(tmp_path):
        write_page(tmp_path / "file" / "r.html", "t", [])
