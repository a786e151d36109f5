"""The problems of an alignment: an endless seeded stream to train on, and a set that is held out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import lightning as L
from torch.utils.data import IterableDataset

from nabla_rl.adapters.training import epoch_order
from nabla_rl.alignment.config import RLConfig
from nabla_rl.data.module import READERS, ProblemData
from nabla_rl.data.problems import Grader, Problem
from nabla_rl.data.tiny import generate
from nabla_rl.types import UserError


class AlignmentData(L.LightningDataModule):
    """The problems of an alignment: an endless stream to train on, and a set that is held out.

    Args:
        family: Family of the tiny world: words or sorting; it also names the embedded models.
        path: JSONL file of training problems (fields problem, id, answer); null is the tiny world.
        eval_path: JSONL file of held-out problems; null is every fifth problem of `path`.
        eval_split: Split of the tiny world that is held out.
        eval_limit: Maximum number of held-out problems.
        problem_seed: Seed of the draw of held-out problems from the tiny world.
        answers: Reading of answers: boxed (math-verify) or exact; null is the family's.
        skip_bad: Permission to leave malformed lines out instead of refusing the file.
        seed: Random seed of the training problems and their order.
    """

    def __init__(
        self,
        family: Literal["words", "sorting"] = "sorting",
        path: str | None = None,
        eval_path: str | None = None,
        eval_split: Literal["validation", "test", "hard"] = "test",
        eval_limit: int = 200,
        problem_seed: int = 0,
        answers: Literal["boxed", "exact"] | None = None,
        skip_bad: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if eval_limit < 1:
            raise UserError("data.eval_limit", "at least 1", str(eval_limit))
        self.seed = seed
        self.own: list[Problem] | None = None
        held = ProblemData(family, eval_split, eval_limit, problem_seed, eval_path, answers, skip_bad)
        self.family, self.grade, self.held_out, self.notices = held.family, held.grade, held.problems, held.notices
        self.extract = held.extract
        if path is None:
            return
        given = ProblemData(family, "test", sys.maxsize, 0, path, answers, skip_bad)
        self.notices = self.notices + given.notices
        self.share(given.problems, self.held_out if eval_path is not None else None, eval_limit)

    @classmethod
    def of(
        cls,
        problems: Sequence[Problem] | None,
        held_out: Sequence[Problem] | None = None,
        *,
        family: str | None = None,
        eval_limit: int = 200,
        grade: Grader | None = None,
        seed: int = 0,
    ) -> Self:
        """The problems of a training that Python calls.

        Args:
            problems: What is trained on; None is the family's endless training problems.
            held_out: What is measured on; None is every fifth of `problems`, or the family's test problems.
            family: Family of the embedded policy; None for another one.
            eval_limit: Maximum number of held-out problems.
            grade: Says whether a completion is right; None is the family's, or math-verify.
            seed: Random seed of the training problems and their order.
        """
        if problems is None and family is None:
            raise UserError("problems", "problems to train on", "none", "Only embedded policies have their own.")
        made = cls(family=family or "words", eval_limit=eval_limit, seed=seed)  # pyright: ignore
        if family is None:
            made.extract, made.grade = READERS["boxed"]
        made.grade = grade or made.grade
        made.share(None if problems is None else list(problems), held_out, eval_limit)
        return made

    def share(self, own: list[Problem] | None, held_out: Sequence[Problem] | None, limit: int) -> None:
        """Train on the caller's own problems, and hold out those given, or every fifth."""
        self.own = own
        if held_out is not None:
            self.held_out = list(held_out)[:limit]
        elif own is not None:
            self.held_out = own[4::5][:limit]
            kept = {problem.id for problem in self.held_out}
            self.own = [problem for problem in own if problem.id not in kept]
        if not self.held_out:
            raise UserError(
                "problems", "at least 5 problems to hold some out", str(len(own or ())),
                "Give more, or problems that are held out.",
            )  # fmt: skip

    def training(self, draw: int, count: int) -> list[Problem]:
        """The `count` training problems of draw number `draw`, which depend on (seed, draw) alone.

        The tiny world always gives fresh problems. A file gives all of its problems in a new order each epoch.
        """
        if self.own is None:
            source = generate(self.family, "train", f"align/{self.seed}/{draw}")
            return [next(source) for _ in range(count)]
        places = epoch_order(len(self.own), draw * count, (draw + 1) * count, seed=self.seed)
        return [self.own[place] for place in places]


class Draws(IterableDataset):
    """The problems of one process: for every micro-batch from `start`, those of the whole draw that it belongs to."""

    def __init__(self, data: AlignmentData, rl: RLConfig, *, start: int, rank: int = 0, world_size: int = 1):
        self.data, self.rl, self.start, self.rank, self.world_size = data, rl, start, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, list[Problem]]]:
        parts, each = self.rl.gradient_accumulation_steps, self.rl.prompts_per_batch
        tick = self.start
        while True:
            draw = tick // (parts * self.rl.num_iterations)
            problems = self.data.training(draw, parts * self.world_size * each)
            mine = [
                problem
                for part in range(parts)
                for problem in problems[(part * self.world_size + self.rank) * each :][:each]
            ]
            for _ in range(tick % (parts * self.rl.num_iterations), parts * self.rl.num_iterations):
                yield tick, mine
                tick += 1
