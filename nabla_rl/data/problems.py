r"""Problems: what is asked, how a prompt is written, how an answer is graded.

A problem comes from the embedded tiny world (`nabla_rl.data.tiny`) or from a JSONL file of the user's own. Grading is
exact: math-verify for `\boxed{}` answers, string equality for the sorting family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_rl.types import UserError

Grader = Callable[[str, str], bool]
"""`grader(completion, answer)`: is the completion's final answer right?"""
Extract = Callable[[str], str | None]
"""Reads the answer out of a completion: what votes are counted over."""


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is None where it is unknown: such a problem is decoded but not graded."""

    id: str
    problem: str
    answer: str | None = None
    solution: str | None = None


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of `text` (braces balanced), or None where that one is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for index in range(begin, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[begin:index].strip()
    return None


def extract_line(text: str) -> str | None:
    """The completion without surrounding blanks: the whole completion is the answer (the sorting family)."""
    return text.strip() or None


def grade_boxed(completion: str, answer: str) -> bool:
    """Is the last boxed answer mathematically equal to `answer`, by math-verify? Plain integers skip the parser."""
    found = extract_boxed(completion)
    if found is None:
        return False
    plain = re.compile(r"-?[0-9]{1,1000}")
    if plain.fullmatch(found) and plain.fullmatch(answer.strip()):
        return int(found) == int(answer)
    from math_verify import parse, verify

    gold = parse(f"${answer}$")
    return bool(gold) and verify(gold, parse(f"$\\boxed{{{found}}}$"))


def grade_exact(completion: str, answer: str) -> bool:
    """Is the completion, without surrounding blanks, the answer to the letter?"""
    return completion.strip() == answer.strip()


def as_problems(
    given: str | Path | Problem | Sequence[str | Problem], *, limit: int | None = None, argument: str = "problems"
) -> list[Problem]:
    """Problems from texts, `Problem`s, or the path of a JSONL file; a text's id is its number, from 1.

    `argument` is the setting that errors name.

    Raises:
        UserError: There is none, one is no text, or two have one id.
    """
    if isinstance(given, Path) or (isinstance(given, str) and (given.endswith(".jsonl") or Path(given).is_file())):
        problems = read_jsonl(given, argument=argument)[0]
    else:
        listed = [given] if isinstance(given, (str, Problem)) else list(given)
        problems = []
        for number, one in enumerate(listed, start=1):
            if isinstance(one, str) and one.strip():
                one = Problem(str(number), one)
            if not isinstance(one, Problem):
                raise UserError(argument, "texts that are not empty, Problems, or a path", repr(one))
            problems.append(one)
        check_unique(problems)
    if not problems:
        raise UserError(argument, "at least one problem", "none")
    return problems if limit is None else problems[:limit]


def read_jsonl(
    path: str | Path, *, skip_bad: bool = False, argument: str = "data.path"
) -> tuple[list[Problem], list[str]]:
    """Read problems from a JSONL file with fields `id`, `problem` and optionally `answer` and `solution`.

    Args:
        path: the file; one JSON object per line, blank lines ignored. A missing `id` becomes the line number.
        skip_bad: leave malformed lines out (their complaints are returned) instead of refusing the file.
        argument: The setting that errors are about.

    Returns:
        The problems in file order, and one complaint per line left out.

    Raises:
        UserError: the file is missing or empty, or a line is bad and `skip_bad` is off; the line number is named.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise UserError(argument, "a JSONL file", f"{found} at '{path}'", "Check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}", "text in UTF-8", "a byte that is none", "Convert the file.") from error
    except OSError as error:
        raise UserError(argument, f"a JSONL file at '{path}'", str(error.strerror), "Check the path.") from error
    problems: list[Problem] = []
    bad: list[tuple[int, tuple[str, str]]] = []
    seen: dict[str, int] = {}
    # not splitlines(): texts may hold U+2028 and its like as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        complaint = _read_line(line, number, seen, problems)
        if complaint is not None:
            bad.append((number, complaint))
    if bad and not skip_bad:
        number, (expected, found) = bad[0]
        more = f" ({len(bad)} bad lines in all)" if len(bad) > 1 else ""
        raise UserError(
            f"{path}, line {number}",
            expected,
            found + more,
            "Mend the line, or pass {data.skip_bad} true to decode the others.",
        )
    complaints = [f"{path}, line {number}: expected {expected}, found {found}." for number, (expected, found) in bad]
    if not problems:
        raise UserError(f"{path}", "at least one problem", "none", "Each line is one JSON object.")
    return problems, complaints


def _read_line(line: str, number: int, seen: dict[str, int], problems: list[Problem]) -> tuple[str, str] | None:
    """Append the line's problem to `problems`; return what was expected and found where the line is bad."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return "JSON", f"{line.strip()[:40]!r} ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets thousands deep
        return "JSON of a usual size", repr(line.strip()[:40])
    if not isinstance(record, dict):
        return "an object with the field `problem`", repr(line.strip()[:40])
    if "problem" not in record:
        return "the field `problem`", ", ".join(f"`{name}`" for name in record) or "no field"
    text, answer, solution = record["problem"], record.get("answer"), record.get("solution")
    if not isinstance(text, str) or not text.strip():
        return "`problem` to be a non-empty string", repr(text)
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        return "`problem` to be text", "half of a surrogate pair in it"
    for name in ("id", "answer", "solution"):
        value = record.get(name)
        if isinstance(value, (dict, list, bool)):
            return f"`{name}` to be a string or a number", json.dumps(value)[:40]
    key = str(number if record.get("id") is None else record["id"])
    if key in seen:
        return "a new id", f"{key!r} again (first on line {seen[key]})"
    seen[key] = number
    as_text = (None if value is None else str(value) for value in (answer, solution))
    problems.append(Problem(key, text, *as_text))
    return None


def check_unique(problems: Sequence[Problem]) -> None:
    """Raise UserError when two problems share an id: results are keyed by it."""
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError("problems", "unique ids", f"{problem.id!r} twice", "Rename one.")
        seen.add(problem.id)
