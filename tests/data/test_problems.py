"""Reading answers, grading them, and reading problems from a file of the user's own."""

from __future__ import annotations

import json

import pytest

from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import (
    Problem,
    check_unique,
    extract_boxed,
    extract_line,
    grade_boxed,
    grade_exact,
    read_jsonl,
)
from nabla_rl.types import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} and then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\text{a {nested} set}} .", "\\text{a {nested} set}"),
        ("\\boxed{ 7 }", "7"),
        ("\\boxed{}", ""),
        ("\\boxed{1", None),
        ("\\boxed{1} but \\boxed{\\frac{1}{2}", None),
        ("boxed{1}", None),
        ("\\boxed 1", None),
        ("", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(("text", "expected"), [(" abc \n", "abc"), ("a b", "a b"), ("", None), (" \n", None)])
def test_extract_line(text, expected):
    assert extract_line(text) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("\\boxed{12}", "12", True),
        ("\\boxed{012}", "12", True),
        ("\\boxed{-3}", "-3", True),
        ("\\boxed{12}", " 12 ", True),
        ("\\boxed{12}", "13", False),
        ("\\boxed{1/2}", "0.5", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{2/4}", "1/2", True),
        ("\\boxed{1/3}", "1/2", False),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", True),
        ("\\boxed{x+1}", "1+x", True),
        ("the answer is 12", "12", False),
        ("\\boxed{}", "12", False),
        ("\\boxed{nonsense}", "12", False),
        ("\\boxed{1} \\boxed{2}", "1", False),
        ("\\boxed{" + "9" * 5000 + "}", "12", False),
    ],
)
def test_grade_boxed(completion, answer, right):
    assert grade_boxed(completion, answer) is right


def test_grade_exact_ignores_surrounding_blanks_only():
    assert grade_exact("abc\n", " abc")
    assert not grade_exact("ab c", "abc")
    assert not grade_exact("", "abc")


def write(path, *records) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "problems.jsonl"


def test_ids_default_to_line_numbers_and_answers_are_optional(file):
    path = write(file, {"problem": "a", "answer": 3}, "", {"problem": "b"}, {"id": "x", "problem": "c", "answer": "q"})
    problems, complaints = read_jsonl(path)
    assert problems == [Problem("1", "a", "3"), Problem("3", "b"), Problem("x", "c", "q")]
    assert complaints == []


def test_null_id_and_answer_mean_none_is_given(file):
    assert read_jsonl(write(file, {"id": None, "problem": "a", "answer": None}))[0] == [Problem("1", "a")]


def test_numbers_serve_as_ids(file):
    assert read_jsonl(write(file, {"id": 7, "problem": "a"}))[0][0].id == "7"


def test_unicode_line_separators_do_not_end_a_line(file):
    """JSON may hold U+2028 and U+0085 as they are; Python's splitlines would cut there."""
    text = "one\u2028two\u0085three\u2029"
    problems, _ = read_jsonl(write(file, json.dumps({"problem": text}, ensure_ascii=False)))
    assert problems == [Problem("1", text)]


@pytest.mark.parametrize("content", ["\ufeff" + '{"problem": "a"}\n', '{"problem": "a"}\r\n', '{"problem": "a"}'])
def test_byte_order_mark_windows_line_ends_and_a_missing_last_line_break(file, content):
    file.write_bytes(content.encode())
    assert read_jsonl(file)[0] == [Problem("1", "a")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{problem: a}", "expected JSON"),
        ('{"problem": "a"', "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"problem": "a", "id": ' + "1" * 5000 + "}", "expected JSON"),
        ('["a"]', "expected an object with the field `problem`"),
        ('{"question": "a"}', "expected the field `problem`, found `question`"),
        ("{}", "expected the field `problem`, found no field"),
        ('{"problem": ""}', "non-empty"),
        ('{"problem": " \\n"}', "non-empty"),
        ('{"problem": 3}', "non-empty string, found 3"),
        ('{"problem": null}', "found None"),
        ('{"problem": "\\ud800"}', "surrogate"),
        ('{"problem": "a", "answer": [1]}', "expected `answer` to be a string or a number"),
        ('{"problem": "a", "id": {}}', "expected `id` to be a string or a number"),
        ('{"problem": "a", "id": "first"}', "expected a new id, found 'first' again (first on line 1)"),
    ],
)
def test_bad_line_is_named_by_number_or_left_out(file, line, complaint):
    path = write(file, {"id": "first", "problem": "good"}, "", line, {"problem": "fine"})
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    message = str(error.value)
    assert f"{path}, line 3: " in message and complaint in message
    assert "Mend the line" in message and "data.skip_bad" in message
    assert len(message) < 400 + len(path)

    problems, complaints = read_jsonl(path, skip_bad=True)
    assert [problem.id for problem in problems] == ["first", "4"]
    assert len(complaints) == 1 and "line 3: " in complaints[0]


def test_the_number_of_bad_lines_is_told(file):
    with pytest.raises(UserError, match=r"line 2: .*\(3 bad lines in all\)"):
        read_jsonl(write(file, {"problem": "a"}, "x", "y", "z"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(file, content):
    file.write_text(content)
    with pytest.raises(UserError, match="expected at least one problem, found none"):
        read_jsonl(file)


def test_nothing_left_after_skipping(file):
    with pytest.raises(UserError, match="expected at least one problem, found none"):
        read_jsonl(write(file, "x"), skip_bad=True)


def test_missing_file_folder_and_other_encodings(tmp_path, file):
    with pytest.raises(UserError, match="expected a JSONL file, found nothing at"):
        read_jsonl(file)
    with pytest.raises(UserError, match="expected a JSONL file, found a folder at"):
        read_jsonl(tmp_path)
    file.write_bytes(b'{"problem": "a"}\n{"problem": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 2: expected text in UTF-8"):
        read_jsonl(file)


def test_check_unique():
    check_unique([Problem("a", "x"), Problem("b", "x")])
    with pytest.raises(UserError, match="'a' twice"):
        check_unique([Problem("a", "x"), Problem("a", "y")])


def test_data_module_reads_a_file_and_says_what_it_leaves_out(file):
    path = write(file, {"problem": "b\na"}, "broken", *({"problem": f"p{n}"} for n in range(5)))
    data = ProblemData(path=path, skip_bad=True, limit=4)
    assert [problem.id for problem in data.problems] == ["1", "3", "4", "5"]
    assert "line 2: expected JSON" in data.notices[0]
    assert "all but the first 4 of 6 problems (data.limit)" in data.notices[1]
    assert ProblemData(limit=3).notices == []


@pytest.mark.parametrize("answers", [None, "boxed", "exact"])
def test_answers_are_read_as_the_family_does_unless_told_otherwise(answers):
    for family, own in (("words", "boxed"), ("sorting", "exact")):
        data = ProblemData(family=family, limit=1, answers=answers)
        boxed = (answers or own) == "boxed"
        assert data.extract("so \\boxed{ab}") == ("ab" if boxed else "so \\boxed{ab}")
        assert data.grade("ab", "ab") is not boxed


@pytest.mark.parametrize("split", ["validation", "test", "hard"])
def test_another_problem_seed_gives_fresh_problems_of_the_same_split(split):
    first, other = (ProblemData(split=split, limit=50, problem_seed=seed).problems for seed in (0, 1))
    assert not {p.id for p in first} & {p.id for p in other}
    assert len({p.problem for p in first} & {p.problem for p in other}) < 3


def test_batches_keep_the_order():
    data = ProblemData(limit=7, batch_size=3)
    batches = list(data.predict_dataloader())
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [problem for batch in batches for problem in batch] == data.problems


@pytest.mark.parametrize("option", ["limit", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_must_be_positive(option, value):
    with pytest.raises(UserError, match=f"data.{option}: expected at least 1, found {value}"):
        ProblemData(**{option: value})
