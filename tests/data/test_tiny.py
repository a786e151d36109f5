"""The embedded world: honest splits, reproducible draws, a tokenizer that loses nothing, solutions that are right."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import FAMILIES, MAX_VALUE, SPLITS, build_tokenizer, generate, split_of
from nabla_rl.models.loading import ASSETS

EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


def draw(family: str, split: str, count: int, seed: int = 0) -> list[Problem]:
    return list(islice(generate(FAMILIES[family], split, seed), count))


def equations(problem: Problem) -> list[tuple[int, str, int, int]]:
    assert problem.solution is not None
    *lines, _ = problem.solution.split("\n")
    matches = [EQUATION.fullmatch(line) for line in lines]
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in matches if m is not None]


def key_of(problem: Problem) -> str:
    """What makes the problem the problem, read back from its text: start, operations and operands, or letters."""
    if problem.solution == problem.answer:
        return "".join(sorted(problem.problem))
    steps = equations(problem)
    return str(steps[0][0]) + "".join(f"{operation}{n}" for _, operation, n, _ in steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_evaluation_problem_occurs_in_training(family):
    """Neither its text nor its operands, among many more training problems than evaluation ones, of several seeds."""
    training = [problem for seed in (0, 1) for problem in draw(family, "train", 10_000, seed)]
    texts, keys = {p.problem for p in training}, {key_of(p) for p in training}
    for split in ("validation", "test", "hard"):
        for problem in (p for seed in (0, 3) for p in draw(family, split, 300, seed)):
            assert problem.problem not in texts
            assert key_of(problem) not in keys


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_and_test_are_disjoint(family):
    keys = {split: {key_of(p) for p in draw(family, split, 500)} for split in ("validation", "test", "hard")}
    assert not keys["validation"] & keys["test"]
    assert not keys["hard"] & (keys["validation"] | keys["test"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_split_is_decided_by_the_key_alone(family, split):
    bucket = "test" if split == "hard" else split
    assert {split_of(key_of(problem)) for problem in draw(family, split, 200, seed=5)} == {bucket}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_problems_another_seed_others(family, split):
    first, again, other = draw(family, split, 100), draw(family, split, 100), draw(family, split, 100, seed=1)
    assert first == again
    assert not {p.id for p in first} & {p.id for p in other}
    assert len({p.problem for p in first} & {p.problem for p in other}) < 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["validation", "test", "hard"])
def test_evaluation_problems_are_distinct(family, split):
    problems = draw(family, split, 500)
    assert len({p.id for p in problems}) == len({p.problem for p in problems}) == 500


def test_a_longer_draw_begins_with_the_shorter_one():
    assert draw("words", "test", 20)[:7] == draw("words", "test", 7)


def test_hard_has_more_steps_than_training_ever_has():
    steps = {split: {len(equations(p)) for p in draw("words", split, 1000)} for split in SPLITS}
    assert steps["train"] == steps["test"] == steps["validation"] == {2, 3, 4, 5}
    assert steps["hard"] == {6, 7, 8}
    letters = {split: {len(p.problem) for p in draw("sorting", split, 1000)} for split in SPLITS}
    assert letters["train"] == letters["test"] == letters["validation"] == set(range(8, 13))
    assert letters["hard"] == set(range(13, 17))


@pytest.mark.parametrize("split", SPLITS)
def test_word_problem_solutions_are_right_line_by_line(split):
    apply = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for problem in draw("words", split, 500):
        steps, numbers = equations(problem), [int(n) for n in re.findall(r"\d+", problem.problem)]
        assert [steps[0][0], *(n for _, _, n, _ in steps)] == numbers  # the numbers of the text, in its order
        for value, operation, n, after in steps:
            assert apply[operation](value, n) == after
            assert 1 <= after <= MAX_VALUE
        for before, after in zip(steps, steps[1:], strict=False):
            assert before[3] == after[0]
        assert problem.answer == str(steps[-1][3])
        assert problem.solution is not None and problem.solution.endswith(f"\n\\boxed{{{problem.answer}}}")


def test_sorting_solutions_are_sorted():
    for problem in draw("sorting", "test", 200):
        assert problem.answer == problem.solution == "".join(sorted(problem.problem))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_solutions_grade_as_right_and_others_as_wrong(family):
    problems = draw(family.name, "test", 300)
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        assert problem.solution is not None and other.solution is not None
        assert family.grade(problem.solution, problem.answer)
        assert family.grade(other.solution, problem.answer) == (other.answer == problem.answer)
        assert family.extract(problem.solution) == problem.answer
        assert not family.grade("", problem.answer)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_tokenizer_round_trip_is_exact_without_unknown_tokens(family, split):
    tokenizer = build_tokenizer(family)
    problems = draw(family.name, split, 1000)
    texts = [f"{p.problem}\n{p.solution}" for p in problems]
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_prompt_and_solution_tokenize_apart_as_together(family):
    """A completion is appended to its prompt as tokens; the texts' border must be a border of tokens too."""
    tokenizer = build_tokenizer(family)
    for p in draw(family.name, "test", 200):
        prompt, completion = tokenizer(f"{p.problem}\n").input_ids, tokenizer(p.solution).input_ids[1:]
        assert prompt + completion == tokenizer(f"{p.problem}\n{p.solution}").input_ids


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_solutions_fit_the_family_s_length(family, split):
    tokenizer = build_tokenizer(family)
    lengths = [len(tokenizer(p.solution).input_ids) for p in draw(family.name, split, 500)]  # with <bos> for <eos>
    assert max(lengths) <= family.max_new_tokens


def test_digits_and_letters_are_tokens_of_their_own():
    words, sorting = build_tokenizer(FAMILIES["words"]), build_tokenizer(FAMILIES["sorting"])
    assert words.convert_ids_to_tokens(words("12*3=36").input_ids[1:]) == list("12*3=36")
    assert sorting.convert_ids_to_tokens(sorting("hello").input_ids[1:]) == list("hello")
    assert words.convert_ids_to_tokens(words("\\boxed{7}").input_ids[1:]) == ["\\boxed{", "7", "}"]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_vocabulary_has_no_duplicates_and_special_tokens_come_first(family):
    vocabulary = build_tokenizer(family).get_vocab()
    assert sorted(vocabulary.values()) == list(range(4 + len(family.tokens)))
    assert [vocabulary[token] for token in ("<pad>", "<bos>", "<eos>", "<unk>")] == [0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_embedded_models_speak_the_vocabulary_of_the_code(family):
    """A word added to the templates would shift every id of the trained models without a word."""
    from transformers import AutoTokenizer

    folders = [folder for folder in sorted((ASSETS / family.name).glob("tiny-*")) if (folder / "config.json").exists()]
    if not folders:
        pytest.skip("no embedded models of this family")
    for folder in folders:
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer(family).get_vocab(), folder
