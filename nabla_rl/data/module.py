"""The problems of a run as a Lightning data module: the tiny world's own, or a JSONL file."""

from __future__ import annotations

from itertools import islice
from typing import Literal

import lightning as L
from torch.utils.data import DataLoader

from nabla_rl.data.problems import (
    Extract,
    Grader,
    Problem,
    check_unique,
    extract_boxed,
    extract_line,
    grade_boxed,
    grade_exact,
    read_jsonl,
)
from nabla_rl.data.tiny import FAMILIES, generate
from nabla_rl.types import UserError

READERS: dict[str, tuple[Extract, Grader]] = {
    "boxed": (extract_boxed, grade_boxed),
    "exact": (extract_line, grade_exact),
}


class ProblemData(L.LightningDataModule):
    """The problems of a run.

    Args:
        family: Family of the tiny world: words or sorting; it also names the embedded models.
        split: Split of the tiny world; hard has more steps than training ever has.
        limit: Maximum number of problems; null is all of a file, 64 of the tiny world.
        problem_seed: Seed of the draw of problems from the tiny world.
        path: JSONL file of problems (fields problem, id, answer); null is the tiny world.
        answers: Reading of answers: boxed (math-verify) or exact; null is the family's.
        skip_bad: Permission to leave malformed lines out instead of refusing the file.
        batch_size: Number of problems decoded side by side; results do not depend on it.
    """

    def __init__(
        self,
        family: Literal["words", "sorting"] = "words",
        split: Literal["train", "validation", "test", "hard"] = "test",
        limit: int | None = None,
        problem_seed: int = 0,
        path: str | None = None,
        answers: Literal["boxed", "exact"] | None = None,
        skip_bad: bool = False,
        batch_size: int = 16,
    ):
        super().__init__()
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"data.{name}", "at least 1", str(value))
        self.family = FAMILIES[family]
        self.split, self.limit, self.problem_seed, self.path = split, limit, problem_seed, path
        self.skip_bad, self.batch_size = skip_bad, batch_size
        own = (self.family.extract, self.family.grade)
        self.extract, self.grade = READERS[answers] if answers is not None else own
        self.notices: list[str] = []
        """What the user should know about the problems: lines of `path` that are left out."""
        self.problems = self._load()

    def _load(self) -> list[Problem]:
        if self.path is None:
            return list(islice(generate(self.family, self.split, self.problem_seed), self.limit or 64))
        problems, complaints = read_jsonl(self.path, skip_bad=self.skip_bad)
        check_unique(problems)
        self.notices = [f"left out: {complaint}" for complaint in complaints]
        if self.limit is not None and len(problems) > self.limit:
            self.notices.append(f"left out: all but the first {self.limit} of {len(problems)} problems (data.limit).")
        return problems[: self.limit]

    def predict_dataloader(self) -> DataLoader:
        """Batches of problems, in order."""
        return DataLoader(self.problems, batch_size=self.batch_size, shuffle=False, collate_fn=list)  # pyright: ignore
