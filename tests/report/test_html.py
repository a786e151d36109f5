from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from nabla_rl.report import write_report

EVIL = "<script>alert('x')</script> & \"$\\frac{$ --> ]]>"

SUMMARY = [
    {"decoder": "greedy", "accuracy": 0.25, "accuracy_low": 0.1, "accuracy_high": 0.5, "flops": 2e9, "seconds": 0.5},
    {"decoder": EVIL, "accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.9, "flops": 3e11, "seconds": None},
    {"decoder": "unfinished", "accuracy": None},
]
EDIT = {
    "position": 3,
    "old_token": "7",
    "new_token": "<8>",
    "reward_before": -1.0,
    "reward_after": 0.123456,
    "accepted": True,
    "gradient_norm": 0.5,
    "entropy": None,
    "outcome": "converged",
}
RESULTS = [
    {"id": "p0", "decoder": "greedy", "problem": "2 < 3?", "answer": "yes & no", "text": "no", "correct": False},
    {
        "id": "p0",
        "decoder": "nabla",
        "text": EVIL,
        "correct": True,
        "reward": 1.25,
        "trace": [EDIT, {**EDIT, "position": 5, "accepted": False}],
    },
]


class Page(HTMLParser):
    """Tags opened and closed, their attributes, and the text between."""

    VOID = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = write_report(tmp_path_factory.mktemp("run") / "deep" / "report.html", EVIL, SUMMARY, RESULTS)
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


def test_everything_from_outside_is_escaped(page):
    assert "<script" not in page
    text = Page(page).text
    assert text.count(EVIL) == 4  # title, heading, table, completion


def test_page_holds_table_samples_and_trace(page):
    text = Page(page).text
    for expected in ("0.250 [0.10, 0.50]", "3.0e+11", "2 < 3?", "yes & no", "right", "wrong", "reward 1.25", "<8>"):
        assert expected in text
    assert "2 edits tried, 1 accepted" in text
    assert "0.1235" in text and "outcome" in text and "converged" in text
    assert page.count('<tr class="rejected">') == 1


def test_only_the_first_problems_are_shown_with_all_their_decoders(tmp_path):
    results = [{"id": f"q{i}", "decoder": d, "text": f"t{i}{d}"} for d in "ab" for i in range(9)]
    text = Page(write_report(tmp_path / "r.html", "t", [], results, max_problems=2).read_text(encoding="utf-8")).text
    assert "The first 2 of 9 problems" in text
    assert all(f"t{i}{d}" in text for d in "ab" for i in (0, 1))
    assert "t2a" not in text


def test_same_run_writes_the_same_page(tmp_path):
    pages = [write_report(tmp_path / name, "t", SUMMARY, RESULTS).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_missing_pieces_leave_a_page(tmp_path):
    assert "finished no problem" in write_report(tmp_path / "r.html", "t", []).read_text(encoding="utf-8")
    no_flops = [{"decoder": "greedy", "accuracy": 1.0}]
    assert "<svg" in write_report(tmp_path / "r.html", "t", no_flops, [{}]).read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]
