"""From results to a set: what each filter takes, that nothing held out is learned from, and what is written."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from typing import Any

import pytest
from datasets import load_dataset

from nabla_rl.data.problems import extract_line
from nabla_rl.data.tiny import FAMILIES, SPLITS, generate, split_of
from nabla_rl.distillation.rows import (
    Filters,
    HeldOut,
    agreement,
    build_rows,
    problem_key,
    read_results,
    read_set,
    select_results,
    write_set,
)
from nabla_rl.types import UserError

NOTHING = HeldOut([])


def result(prompt: str = "cab", completion: str = "abc", **changes: Any) -> dict[str, Any]:
    rollouts = [("acb", -1.0), (completion, 2.0)]
    return {
        "id": prompt, "decoder": "nabla", "prompt": prompt, "completion": completion, "reward": 2.0, "correct": True,
        "finished": True, "rollouts": [{"text": text, "reward": reward, "logps": -1.0} for text, reward in rollouts],
        "cost": {"flops": 10.0}, **changes,
    }  # fmt: skip


def select(*results: dict[str, Any], held_out: HeldOut = NOTHING, **filters: Any):
    return select_results(results, Filters(**filters), extract_line, held_out)


# Filters

REFUSED = {
    "unfinished": ({"finished": False}, {}),
    "reward": ({"reward": -0.1}, {}),
    "verifier": ({"correct": False}, {"accept": ["verifier"]}),
    "agreement": ({}, {"accept": ["agreement"], "min_agreement": 0.6}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_filter_takes_what_it_should_and_counts_it(name):
    changes, filters = REFUSED[name]
    good = result("hgf", "fgh", rollouts=[{"text": "fgh", "reward": 2.0, "logps": -1.0}])
    kept, counts = select(good, result(**changes), **filters)
    assert kept == [good] and counts == {"read": 2, name: 1}


def test_an_answer_of_unknown_truth_does_not_pass_the_verifier():
    kept, counts = select(result("hgf"), result(correct=None), accept=["verifier"])
    assert len(kept) == 1 and counts["verifier"] == 1


def test_all_filters_in_force_must_pass():
    kept, _ = select(result("hgf"), result(correct=False), result("zy", reward=-1.0), accept=["reward", "verifier"])
    assert [one["prompt"] for one in kept] == ["hgf"]


def test_agreement_is_the_share_of_rollouts_with_the_answer():
    assert agreement(result(), extract_line) == 0.5
    assert agreement(result(completion=" "), extract_line) == 0.0


def test_the_same_answer_to_the_same_prompt_is_taken_once():
    kept, counts = select(result(), result(), result(completion="other"))
    assert len(kept) == 2 and counts["duplicate"] == 1


@pytest.mark.parametrize("name", REFUSED)
def test_an_empty_set_says_which_filter_emptied_it(name):
    changes, filters = REFUSED[name]
    with pytest.raises(UserError) as error:
        select(result(**changes), result("hgf", **changes), **filters)
    message = str(error.value)
    assert f"the filter `{name}` took 2" in message and "none of 2 left" in message and "\n" not in message


# Decontamination


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_key_read_from_the_text_has_the_problems_split(family, split):
    for problem in islice(generate(FAMILIES[family], split, "keys"), 100):
        key = problem_key(family, problem.problem)
        assert key is not None
        assert split_of(key) == ("test" if split == "hard" else split), problem.problem


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["validation", "test", "hard"])
def test_no_held_out_problem_passes_whatever_its_wording(family, split):
    held_out = HeldOut([], family)
    problems = list(islice(generate(FAMILIES[family], split, "held"), 50))
    assert all(problem.problem in held_out for problem in problems)
    if family == "sorting":
        assert all("".join(reversed(problem.problem)) in held_out for problem in problems)
    training = list(islice(generate(FAMILIES[family], "train", "held"), 50))
    assert not any(problem.problem in held_out for problem in training)
    rows = [result(p.problem, p.answer) for p in (*problems[:5], *training[:5])]
    kept, counts = select(*rows, held_out=held_out)
    assert counts["contaminated"] == 5 and [row["prompt"] for row in kept] == [p.problem for p in training[:5]]


def test_prompts_of_ones_own_are_compared_by_text_and_by_words_in_a_row():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    held_out = HeldOut(["What is  1+1?", " ".join(words)])
    assert "what is 1+1?" in held_out and "What is 1+2?" not in held_out
    assert f"Before it: {' '.join(words[:13])}, and after" not in held_out  # "thirteen," is another word
    assert f"Before it: {' '.join(words[:13])} and after" in held_out
    assert " ".join(words[:12]) not in held_out


@pytest.mark.parametrize("text", ["", "3 + 4", "How many apples does Ada have?"])
def test_a_text_that_is_no_word_problem_has_no_key(text):
    assert problem_key("words", text) is None


# Rows


def test_sft_rows_are_prompts_and_completions():
    counts = Counter(read=1)
    assert build_rows("sft", [result()], counts, beta=1.0) == [{"id": "cab", "prompt": "cab", "completion": "abc"}]
    assert counts["kept"] == 1


def test_pairs_are_the_first_rollout_against_the_answer():
    same, worse = result("hgf"), result("zy")
    same["rollouts"] = same["rollouts"][1:]
    worse["rollouts"][0]["reward"] = 3.0
    counts = Counter(read=3)
    rows = build_rows("preference", [result(), same, worse], counts, beta=1.0)
    assert rows == [{"id": "cab", "prompt": "cab", "chosen": "abc", "rejected": "acb"}]
    assert counts["unchanged"] == 1 and counts["not_preferred"] == 1


def test_without_any_pair_the_reason_is_named():
    same = result()
    same["rollouts"] = same["rollouts"][1:]
    with pytest.raises(UserError, match="the filter `unchanged` took 1"):
        build_rows("preference", [same], Counter(read=1), beta=1.0)


def test_weights_of_a_prompts_rollouts_sum_to_one():
    doubled = result()
    doubled["rollouts"] = [*doubled["rollouts"], doubled["rollouts"][0]]
    counts = Counter(read=2)
    rows = build_rows("weighted", [doubled, result("hgf")], counts, beta=3.0)
    assert [row["completion"] for row in rows] == ["acb", "abc"] * 2 and counts["duplicate_rollout"] == 1
    assert rows[0]["weight"] + rows[1]["weight"] == pytest.approx(1.0)
    assert rows[1]["weight"] / rows[0]["weight"] == pytest.approx(2.718281828)


# Files


def test_the_set_is_written_as_jsonl_and_as_a_folder_that_datasets_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = build_rows("sft", [result(), result("h\u2028g", "gh")], counts := Counter(read=3), beta=1.0)
    write_set(tmp_path / "data", rows, counts, title="Some answers")
    assert read_set(tmp_path / "data") == rows
    loaded = load_dataset(str(tmp_path / "data" / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == rows
    card = (tmp_path / "data" / "dataset" / "README.md").read_text()
    assert "# Some answers" in card and "| read | 3 |" in card and "`completion`" in card


def test_results_are_read_from_files_and_folders_of_one_decoder(tmp_path):
    lines = [result(), result("hgf", decoder="greedy")]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "cut')
    assert read_results([tmp_path]) == lines
    assert read_results([file], "greedy") == lines[1:]
    with pytest.raises(UserError, match="expected answers of beam, found greedy, nabla"):
        read_results([file], "beam")


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "as JSON, found '{'"), ("[]", "expected a result, found"), ('{"id": 1}', "found no field `decoder`")],
)
def test_a_malformed_line_is_named(line, said, tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(result()) + "\n" + line + "\n")
    with pytest.raises(UserError, match="results.jsonl, line 2") as error:
        read_results([tmp_path])
    assert said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="data.results: expected results.jsonl"):
        read_results([tmp_path / "none"])


@pytest.mark.parametrize("options", [{"min_agreement": 1.5}, {"min_reward": float("nan")}])
def test_bad_filters_are_refused(options):
    with pytest.raises(UserError, match="data.filters.min_"):
        Filters(**options)
