"""The page and the summary of a decode run, from lines made by hand."""

from __future__ import annotations

import json

import pytest

from nabla_rl.report.decoded import SENTENCES, finish, write_report
from nabla_rl.report.summary import summarise
from nabla_rl.run_folder import RunFolder
from tests.report.lines import Page, edit, line


def page_of(tmp_path, results, decoders=("greedy",), **more) -> Page:
    rows = summarise(results, decoders)
    return Page(write_report(tmp_path / "r.html", "t", rows, results, **more).read_text(encoding="utf-8"))


def test_a_problem_has_its_question_once_the_expected_answer_and_every_completion(tmp_path):
    completions = ["\n  first\n\nsecond ", "<pre>x</pre>" * 200]
    results = [
        line("p0", "greedy", completion=completions[0], answer="its own", correct=False),
        line("p0", "beam", completion=completions[1], answer=None, correct=True, finished=False),
    ]
    page = page_of(tmp_path, results, ("greedy", "beam"))
    assert page.pres == completions
    assert page.text.count("2 < p0?") == 1
    assert page.text.count("Expected answer: yes & no") == 1
    assert "answer its own" in page.text and "no answer found, cut off at the maximum length" in page.text
    assert page.text.count("✗ wrong") == 1 and page.text.count("✓ right") == 1
    assert page.text.count("2.0e9 FLOPs") == 2


def test_without_an_expected_answer_nothing_is_right_or_wrong(tmp_path):
    text = page_of(tmp_path, [line(expected=None, correct=None)]).text
    assert "Expected" not in text and "✓" not in text and "✗" not in text
    assert "answer yes" in text


def test_rewards_are_shown_where_they_are_known(tmp_path):
    text = page_of(tmp_path, [line(reward=-1.256, gold_reward=None)]).text
    assert "reward −1.26 · 2.0e9 FLOPs" in text and "gold reward" not in text
    text = page_of(tmp_path, [line(reward=None, gold_reward=0.5)]).text
    assert "gold reward 0.50" in text and " −" not in text


def test_edits_say_what_changed_where_and_whether_it_was_kept(tmp_path):
    trace = [
        edit(accepted=False, position=5, old_token="\n", new_token=""),
        edit(old_token=" a", new_token="b", reward_before=-1.0, reward_after=0.126),
        edit(accepted=False, reward_after=None),
    ]
    text = page_of(tmp_path, [line(trace=trace)]).text
    assert "3 edits tried, 1 accepted" in text and "2 rejected edits" in text
    assert "1. position 5: ↵ → (special token) reward −1.00 → 0.13 ✗" in text
    assert "2. position 3: ␣a → b reward −1.00 → 0.13 ✓" in text
    assert "reward −1.00 → – ✗" in text


@pytest.mark.parametrize("accepted", [True, False])
def test_one_of_anything_is_in_the_singular(tmp_path, accepted):
    text = page_of(tmp_path, [line(trace=[edit(accepted=accepted)])]).text
    assert f"1 edit tried, {int(accepted)} accepted" in text
    assert "1 rollout" in text and "1 rollouts" not in text and "1 edits" not in text
    assert ("1 rejected edit" in text) is not accepted


def test_only_the_first_problems_are_shown_with_all_their_decoders(tmp_path):
    results = [line(f"q{i}", d, completion=f"t{i}{d}") for d in "ab" for i in range(9)]
    page = page_of(tmp_path, results, "ab", max_problems=2)
    assert "The first 2 of 9 problems" in page.text
    assert page.pres == ["t0a", "t0b", "t1a", "t1b"]
    assert "The first" not in page_of(tmp_path, results[:1], "a").text


def test_what_was_run_and_what_each_decoder_does(tmp_path):
    results = [line("p", name) for name in ("nabla", "my.Own")]
    page = page_of(tmp_path, results, ("nabla", "my.Own"), described={"policy": "some/model", "β": 0.5})
    for text in ("some/model", "β", "0.5", SENTENCES["nabla"]):
        assert text in page.text
    assert SENTENCES["greedy"] not in page.text
    page = page_of(tmp_path, results, ("nabla", "my.Own"), sentences={"my.Own": "Does its own thing."})
    assert "Does its own thing." in page.text and SENTENCES["nabla"] not in page.text


def test_a_column_that_cannot_vary_is_left_out(tmp_path):
    every = [line("p", "edit_search", proposals=3, accepted=3, trace=[edit()] * 3), line("p")]
    some = [line("p", "edit_search", proposals=3, accepted=1), line("p")]
    assert "acceptance rate" not in page_of(tmp_path, every, ("edit_search", "greedy")).cells
    assert "acceptance rate" in page_of(tmp_path, some, ("edit_search", "greedy")).cells


def test_accelerations_of_the_loop_are_told(tmp_path):
    counts = {"skipped": 30, "visited": 10, "unchanged": 4, "dto_steps": 100, "dto_evaluations": 9, "probes": 1}
    text = page_of(tmp_path, [line("p", "nabla", counts=counts)], ("nabla",)).text
    assert "skipped 75% of the positions" in text and "40% of the others" in text and "90% of its gradient" in text


def test_missing_pieces_leave_a_page(tmp_path):
    assert "finished no problem" in page_of(tmp_path, [], ()).text
    ungraded = page_of(tmp_path, [line(correct=None)])
    assert "svg" not in {name for name, _ in ungraded.tags}
    rows = [{"decoder": "greedy", "accuracy": 1.0}]
    page = Page(write_report(tmp_path / "r.html", "t", rows).read_text(encoding="utf-8"))
    assert "svg" in {name for name, _ in page.tags}


def test_finish_is_over_the_problems_that_every_decoder_has_finished(tmp_path):
    results = [line("a"), line("a", "beam", correct=True), line("b", completion="not yet")]
    folder = RunFolder(tmp_path / "run", {"seed": 7, "model": {"policy": {"name": "p"}}})
    folder.append([{**row, "config": folder.config_hash} for row in results])
    summary = finish(folder, ["a", "b"], ["greedy", "beam"], more={"seed": 7})
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["problems"] == 1 and summary["seed"] == 7
    rows = summarise(results[:2], ["greedy", "beam"])
    assert summary["rows"] == rows and summary["accelerations"] is None
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "decode: run" in page.text and page.pres == ["greedy says yes", "beam says yes"]
