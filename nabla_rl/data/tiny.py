r"""The embedded tiny world: two families of problems, endless and seeded, that small networks can learn in minutes.

`words`
    Grade-school word problems of 2 to 5 steps (6 to 8 in the `hard` split) of +, - and x on whole numbers up to 99,
    with a solution of one equation a line and a `\boxed{}` answer.
`sorting`
    8 to 12 letters (13 to 16 in `hard`) to be sorted; the completion is the answer.

Splits are decided by a hash of what makes a problem the problem (the operations and operands, or the multiset of
letters), never by its wording or a seed. A generator for one split can therefore run for ever without meeting another
split: no test operands ever occur in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nabla_rl.data.problems import Grader, Problem, extract_boxed, extract_line, grade_boxed, grade_exact

SPLITS = ("train", "validation", "test", "hard")
MAX_VALUE = 99

NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jia Kai Lena".split()
ITEMS = "apples books cards coins eggs flowers marbles pens shells stamps stickers toys".split()
ADD = ("{who} buys {n} more.", "{who} finds {n} more.", "{who} gets {n} from a friend.", "Then {n} more arrive.")
SUBTRACT = ("{who} gives away {n}.", "{who} loses {n}.", "{who} sells {n}.", "Then {n} are taken.")
MULTIPLY = ("The number grows {n} times.", "{who} then has {n} times as many.")
OPEN = ("{who} has {n} {items}.", "{who} starts with {n} {items}.")
ASK = ("How many {items} does {who} have?", "How many {items} are there now?")
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Family:
    """A kind of problem: how to draw one, how to read and grade an answer, and the tokens it needs."""

    name: str
    draw: Callable[[random.Random, bool], tuple[str, Problem]]
    extract: Callable[[str], str | None]
    grade: Grader
    tokens: tuple[str, ...]
    alphabet: tuple[str, ...]
    pattern: str
    max_new_tokens: int
    slip: Callable[[Problem, random.Random], str] | None = None
    """Draws a solution with a wrong step, after which the answer is right or wrong; None where no step can be."""


def draw_word_problem(rng: random.Random, hard: bool = False) -> tuple[str, Problem]:
    """One word problem and its key (start, operations, operands), with every intermediate value in 1..99."""
    num_steps = rng.randint(6, 8) if hard else rng.randint(2, 5)
    value = rng.randint(2, 30)
    who, items = rng.choice(NAMES), rng.choice(ITEMS)
    sentences = [rng.choice(OPEN).format(who=who, n=value, items=items)]
    lines, key = [], [str(value)]
    for _ in range(num_steps):
        operations = ["+"] * (value < MAX_VALUE) + ["-"] * (value > 1) + ["*"] * (2 * value <= MAX_VALUE)
        operation = rng.choice(operations)
        if operation == "+":
            n = rng.randint(1, min(20, MAX_VALUE - value))
            template, after = rng.choice(ADD), value + n
        elif operation == "-":
            n = rng.randint(1, min(20, value - 1))
            template, after = rng.choice(SUBTRACT), value - n
        else:
            n = rng.randint(2, min(5, MAX_VALUE // value))
            template, after = rng.choice(MULTIPLY), value * n
        sentences.append(template.format(who=who, n=n))
        lines.append(f"{value}{operation}{n}={after}")
        key.append(f"{operation}{n}")
        value = after
    sentences.append(rng.choice(ASK).format(who=who, items=items))
    solution = "\n".join([*lines, f"\\boxed{{{value}}}"])
    return "".join(key), Problem("", " ".join(sentences), str(value), solution)


def slip_word_solution(problem: Problem, rng: random.Random) -> str:
    """The problem's solution with one wrong step (its result, its operand or what it starts from).

    A third of them come back to the right value in the same line or, after a wrong result, in the next one, as an
    early language model does; the others go on from what they wrote or from another wrong value.
    """
    true = [(int(a), o, int(n), int(b)) for a, o, n, b in STEP.findall(problem.solution or "")]
    while True:
        kind = rng.choice(("result", "operand", "start"))
        at = rng.randrange(len(true) - (kind == "result"))
        shown, value = list(true), true[at][3]
        start, operation, n, _ = true[at]
        if kind == "result":
            wrong = _near(value, rng)
            shown[at] = (start, operation, n, wrong)
            at += 1
            start, (_, operation, n, value) = wrong, true[at]
        elif kind == "operand":
            n = _near(n, rng)
        else:
            start = _near(start, rng)
        value = rng.choice((value, _apply(start, operation, n), _near(value, rng)))
        shown[at] = (start, operation, n, value)
        for later in range(at + 1, len(true)):
            _, operation, n, _ = true[later]
            shown[later] = (value, operation, n, _apply(value, operation, n))
            value = shown[later][3]
        if all(1 <= step[3] <= MAX_VALUE for step in shown):
            return "\n".join([*(f"{a}{o}{n}={b}" for a, o, n, b in shown), f"\\boxed{{{value}}}"])


def _apply(value: int, operation: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * n}[operation]


def _near(value: int, rng: random.Random) -> int:
    """Another number of 1..99: a few more or less, or with another digit."""
    digits = str(value)
    while True:
        place = rng.randrange(len(digits))
        other = int(digits[:place] + rng.choice("0123456789") + digits[place + 1 :])
        near = rng.choice((value + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10)), other))
        if near != value and 1 <= near <= MAX_VALUE:
            return near


def draw_sorting_problem(rng: random.Random, hard: bool = False) -> tuple[str, Problem]:
    """One row of letters (repeats allowed) and its key, the sorted letters."""
    length = rng.randint(13, 16) if hard else rng.randint(8, 12)
    letters = rng.choices(LETTERS, k=length)
    answer = "".join(sorted(letters))
    return answer, Problem("", "".join(letters), answer, answer)


WORD_PATTERN = r" ?[A-Za-z]+|\\boxed\{|[\s\S]"
WORDS = Family(
    "words",
    draw_word_problem,
    extract_boxed,
    grade_boxed,
    tokens=tuple(
        sorted(
            set("0123456789+-*=}.? \n")
            | {"\\boxed{"}
            | {
                space + word
                for space in ("", " ")
                for sentence in (*OPEN, *ADD, *SUBTRACT, *MULTIPLY, *ASK)
                for word in sentence.replace("{who}", " ")
                .replace("{n}", " ")
                .replace("{items}", " ")
                .replace(".", "")
                .replace("?", "")
                .split()
            }
            | {space + name for space in ("", " ") for name in (*NAMES, *ITEMS)}
        )
    ),
    alphabet=tuple("0123456789+-*"),
    pattern=WORD_PATTERN,
    max_new_tokens=88,
    slip=slip_word_solution,
)
SORTING = Family(
    "sorting",
    draw_sorting_problem,
    extract_line,
    grade_exact,
    tokens=(*LETTERS, "\n"),
    alphabet=tuple(LETTERS),
    pattern=r"[\s\S]",
    max_new_tokens=20,
)
FAMILIES = {family.name: family for family in (WORDS, SORTING)}


def split_of(key: str) -> str:
    """The split that a problem's key belongs to: 1/20 test, 1/20 validation, the rest training (by hash)."""
    bucket = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def generate(family: Family, split: str, seed: int | str) -> Iterator[Problem]:
    """Endless distinct problems of one split; the same (family, split, seed) gives the same sequence.

    `hard` takes its problems from the test bucket too, with more steps than training ever has.
    """
    rng = random.Random(f"{family.name}/{split}/{seed}")
    bucket = "test" if split == "hard" else split
    seen: set[str] = set()
    number = 0
    while True:
        key, problem = family.draw(rng, split == "hard")
        if split_of(key) != bucket or problem.problem in seen:
            continue
        if split != "train":
            seen.add(problem.problem)
        yield Problem(f"{family.name}-{split}-{seed}-{number}", problem.problem, problem.answer, problem.solution)
        number += 1


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """The family's tokenizer: digits and letters alone, words whole with their leading space, exact round trip."""
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *family.tokens]
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(family.pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
