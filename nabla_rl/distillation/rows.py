"""Results of decoding as a training set for a student: filtered, deduplicated, decontaminated.

The columns are TRL's: `prompt` and `completion`, or `prompt`, `chosen` and `rejected`. Every line that falls out is
counted under the filter that took it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from nabla_rl.data.problems import Extract
from nabla_rl.data.tiny import ADD, MULTIPLY, OPEN, SUBTRACT, split_of
from nabla_rl.functional.distillation import reward_weights
from nabla_rl.types import UserError

Method = Literal["sft", "preference", "soft", "weighted"]
Accept = Literal["reward", "verifier", "agreement"]
Row = dict[str, Any]
NGRAM = 13
"""Words in a row that a training prompt may not share with a held-out one (Brown et al., 2020, Appendix C)."""
FIELDS = ("id", "decoder", "prompt", "completion", "rollouts", "reward", "correct", "finished", "cost")
ADVICE = {
    "unfinished": "Raise {teacher.sampling.max_new_tokens}.",
    "reward": "Lower {data.filters.min_reward}, or leave reward out of {data.filters.accept}.",
    "verifier": "Leave verifier out of {data.filters.accept}, or take easier problems.",
    "agreement": "Lower {data.filters.min_agreement}, or leave agreement out of {data.filters.accept}.",
    "contaminated": "Take problems that are not held out.",
    "duplicate": "Take more problems.",
    "unchanged": "Take problems on which the first rollout fails, or {method} sft.",
    "not_preferred": "Take problems on which the decoder improves its first rollout, or {method} sft.",
}


@dataclass(frozen=True)
class Filters:
    """The tests that an answer must pass to be learned from."""

    accept: list[Accept] = field(default_factory=lambda: ["reward"])
    """Tests that an answer must pass: reward, verifier (right), agreement (of its rollouts)."""
    min_reward: float = 0.0
    """Least reward; 0 is an even chance of being right where rewards are log-odds."""
    min_agreement: float = 0.5
    """Least share of the rollouts with the same final answer."""

    def __post_init__(self) -> None:
        """Check the values."""
        if math.isnan(self.min_reward):
            raise UserError("data.filters.min_reward", "a number", str(self.min_reward))
        if not 0 <= self.min_agreement <= 1:
            raise UserError("data.filters.min_agreement", "a number in [0, 1]", str(self.min_agreement))

    def refuse(self, result: Mapping[str, Any], extract: Extract) -> str | None:
        """The first filter that an answer does not pass; None where it passes all."""
        if not result["finished"]:
            return "unfinished"
        if "reward" in self.accept and (result["reward"] is None or result["reward"] < self.min_reward):
            return "reward"
        if "verifier" in self.accept and result["correct"] is not True:
            return "verifier"
        if "agreement" in self.accept and agreement(result, extract) < self.min_agreement:
            return "agreement"
        return None


def agreement(result: Mapping[str, Any], extract: Extract) -> float:
    """The share of a result's rollouts whose final answer is that of its completion; 0 without an answer."""
    answer = extract(result["completion"])
    if answer is None or not result["rollouts"]:
        return 0.0
    return sum(extract(rollout["text"]) == answer for rollout in result["rollouts"]) / len(result["rollouts"])


def read_results(paths: Sequence[str | Path], decoder: str | None = None) -> list[Row]:
    """The lines of decode runs' `results.jsonl`, in order.

    Args:
        paths: The files, or the run folders that hold them.
        decoder: The decoder whose answers are taken; None is every decoder.

    Raises:
        UserError: a file is missing, a line is no result, or the decoder has none.
    """
    rows: list[Row] = []
    for given in paths:
        path = Path(given) / "results.jsonl" if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise UserError("data.results", "results.jsonl of a decode run", f"nothing at '{path}'", "Check the path.")
        text = path.read_text(encoding="utf-8", errors="replace")
        # after the last line break stands nothing, or a line that was not written to its end
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            rows.append(_read_line(line, f"{path}, line {number}"))
    found = sorted({str(row["decoder"]) for row in rows})
    rows = [row for row in rows if decoder in (None, row["decoder"])]
    if not rows:
        what = f"answers of {decoder}" if found else "at least one result"
        raise UserError(
            "data.results",
            what,
            f"{', '.join(found) or 'none'} in {', '.join(map(str, paths))}",
            "Decode first, or set {teacher.decoders}.",
        )
    return rows


def _read_line(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}", "a result as JSON", repr(line[:40]), "Mend or delete the line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}", "a result", repr(line[:40]), "Mend or delete the line.")
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise UserError(f"{where}", "a result of a decode run", f"no field `{missing[0]}`", "Take a results.jsonl.")
    return row


# What was held out must not be learned from


def problem_key(family: str, prompt: str) -> str | None:
    """What decides the split of a problem of the tiny world, read from its text; None where it is no such problem."""
    if family == "sorting":
        letters = prompt.strip()
        return "".join(sorted(letters)) if letters.isalpha() else None
    found = [(operation, match[1]) for match, operation in _sentences(prompt)]
    if not found or found[0][0] != "" or any(operation == "" for operation, _ in found[1:]):
        return None
    return "".join(operation + number for operation, number in found)


def _sentences(prompt: str) -> list[tuple[re.Match, str]]:
    """The sentences of a word problem with a number in them, and the operation that each is."""
    matches = []
    for operation, templates in (("", OPEN), ("+", ADD), ("-", SUBTRACT), ("*", MULTIPLY)):
        for template in templates:
            pattern = re.escape(template).replace(r"\{who\}", r"[A-Z]\w*").replace(r"\{items\}", r"[a-z]+")
            # "Ada has 3 apples." and "Ada then has 3 times as many." differ by their whole text alone
            pattern = r"(?:^|(?<=\. ))" + pattern.replace(r"\{n\}", r"(\d+)")
            matches += [(match, operation) for match in re.finditer(pattern, prompt)]
    return sorted(matches, key=lambda entry: entry[0].start())


class HeldOut:
    """Recognises prompts that must not be trained on.

    A prompt is refused if it equals a held-out one up to case and blanks, or if it shares `NGRAM` words in a row with
    one. All texts of the tiny world come from a few templates, so shared words do not count there; instead a prompt is
    refused if its operands or letters belong to the validation, test or hard split.

    Args:
        prompts: The held-out prompts.
        family: Family of the tiny world that problems come from; None for the caller's own problems.
    """

    def __init__(self, prompts: Iterable[str], family: str | None = None):
        self.family = family
        words = [prompt.casefold().split() for prompt in prompts]
        self.texts = {" ".join(each) for each in words}
        self.ngrams = {gram for each in words for gram in _ngrams(each)}

    def __contains__(self, prompt: str) -> bool:
        words = prompt.casefold().split()
        if " ".join(words) in self.texts:
            return True
        if self.family is None:
            return any(gram in self.ngrams for gram in _ngrams(words))
        key = problem_key(self.family, prompt)
        return key is not None and split_of(key) != "train"


def _ngrams(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)


# Results to rows


def select_results(
    results: Sequence[Row], filters: Filters, extract: Extract, held_out: HeldOut
) -> tuple[list[Row], Counter]:
    """The results whose answers pass the filters, each prompt and answer once, and counts of what fell out.

    Raises:
        UserError: none is left; the filter that took most is named.
    """
    counts, kept, seen = Counter(read=len(results)), [], set()
    for result in results:
        reason = "contaminated" if result["prompt"] in held_out else filters.refuse(result, extract)
        pair = (result["prompt"], result["completion"])
        if reason is None and pair in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(pair)
            kept.append(result)
        else:
            counts[reason] += 1
    check_not_empty(kept, counts)
    return kept, counts


def build_rows(method: Method, results: Sequence[Row], counts: Counter, *, beta: float) -> list[Row]:
    """The training rows of a way to learn; what falls out is added to `counts`.

    sft, soft
        `prompt`, `completion`.
    preference
        `prompt`, `chosen` (the decoder's answer) and `rejected` (its first rollout), where they differ and the reward
        model prefers the first.
    weighted
        `prompt`, `completion` and `weight` = exp(r/β)/Z, for every different rollout of a prompt.
    """
    build: dict[Method, Callable[[], list[Row]]] = {
        "sft": lambda: [_completion_row(result) for result in results],
        "soft": lambda: [_completion_row(result) for result in results],
        "preference": lambda: list(_pairs(results, counts)),
        "weighted": lambda: list(_weighted(results, counts, beta)),
    }
    rows = build[method]()
    check_not_empty(rows, counts)
    counts["kept"] = len(rows)
    return rows


def _completion_row(result: Row) -> Row:
    return {"id": result["id"], "prompt": result["prompt"], "completion": result["completion"]}


def _pairs(results: Sequence[Row], counts: Counter) -> Iterable[Row]:
    for result in results:
        first = result["rollouts"][0] if result["rollouts"] else None
        if first is None or first["text"] == result["completion"]:
            counts["unchanged"] += 1
        elif None not in (first["reward"], result["reward"]) and first["reward"] >= result["reward"]:
            counts["not_preferred"] += 1
        else:
            texts = {"chosen": result["completion"], "rejected": first["text"]}
            yield {"id": result["id"], "prompt": result["prompt"], **texts}


def _weighted(results: Sequence[Row], counts: Counter, beta: float) -> Iterable[Row]:
    for result in results:
        rewards = {r["text"]: r["reward"] for r in result["rollouts"] if r["reward"] is not None}
        if not rewards:
            counts["reward"] += 1
            continue
        counts["duplicate_rollout"] += len(result["rollouts"]) - len(rewards)
        values = torch.tensor(list(rewards.values()), dtype=torch.float64)
        weights = reward_weights(values, torch.zeros(len(values), dtype=torch.int64), beta=beta).tolist()
        for text, weight in zip(rewards, weights, strict=True):
            yield {"id": result["id"], "prompt": result["prompt"], "completion": text, "weight": weight}


def check_not_empty(rows: Sequence[Row], counts: Mapping[str, int]) -> None:
    """Refuse an empty set, and name the filter that took most of it."""
    if rows:
        return
    taken = {name: count for name, count in counts.items() if name in ADVICE}
    worst = max(taken, key=lambda name: taken[name])
    rest = ", ".join(f"{name} {count}" for name, count in taken.items() if count)
    raise UserError(
        "data",
        "answers to learn from",
        f"none of {counts['read']} left: the filter `{worst}` took {taken[worst]} ({rest})",
        ADVICE[worst],
    )


# Files


def write_set(folder: Path, rows: Sequence[Row], counts: Mapping[str, Any], *, title: str) -> None:
    """Write `train.jsonl`, and `dataset/` (a folder that `datasets.load_dataset` reads) with its card."""
    from datasets import Dataset, disable_progress_bars  # slow to import

    disable_progress_bars()
    target = folder / "dataset"
    target.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows)).to_parquet(str(target / "train.parquet"))
    (target / "README.md").write_text(dataset_card(rows, counts, title=title), encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial = folder / ".train.jsonl"
    partial.write_text(lines, encoding="utf-8")
    partial.replace(folder / "train.jsonl")  # last: where it is, the set is whole


def read_set(folder: Path) -> list[Row]:
    """The rows of `train.jsonl`."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def dataset_card(rows: Sequence[Row], counts: Mapping[str, Any], *, title: str) -> str:
    """The README.md of a set: where it comes from, its columns, and what fell out."""
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files: train.parquet",
        "tags: [trl, nabla_rl, distillation]",
        "---",
        "",
        f"# {title}",
        "",
        f"{len(rows)} rows with the columns {', '.join(f'`{name}`' for name in rows[0])}, made by `nabla-rl distill`.",
        "",
        "| step | rows |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {name} | {count} |" for name, count in counts.items()), ""])
