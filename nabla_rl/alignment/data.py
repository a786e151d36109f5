"""The problems of an alignment: endless and seeded ones to train on, and those held out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Literal

import lightning as L
from torch.utils.data import IterableDataset

from nabla_rl.adapters.training import epoch_order
from nabla_rl.alignment.config import RLConfig
from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import generate
from nabla_rl.types import UserError


class AlignmentData(L.LightningDataModule):
    """The problems of an alignment: those to train on, without end, and those held out.

    Args:
        family: which tiny world: words or sorting. It also names the embedded models.
        path: a JSONL file of your own to train on (fields problem, optional id and answer) instead of the tiny world.
        eval_path: another one that is held out; null: every fifth problem of `path`, up to `eval_limit`.
        eval_split: the tiny world's held-out problems.
        eval_limit: held-out problems at most.
        problem_seed: another draw of held-out problems.
        answers: how answers are graded: boxed (math-verify) or exact. null: as the family does.
        skip_bad: leave malformed lines out instead of refusing the file.
        seed: of the training problems and their order.
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
        self.seed, self.own = seed, None
        held = ProblemData(family, eval_split, eval_limit, problem_seed, eval_path, answers, skip_bad)
        self.family, self.grade, self.held_out, self.notices = held.family, held.grade, held.problems, held.notices
        self.notices = [notice.replace("--data.limit", "--data.eval_limit") for notice in self.notices]
        if path is None:
            return
        given = ProblemData(family, "test", sys.maxsize, 0, path, answers, skip_bad)
        self.own, self.notices = given.problems, self.notices + given.notices
        if eval_path is None:
            self.held_out = self.own[4::5][:eval_limit]
            kept = {problem.id for problem in self.held_out}
            self.own = [problem for problem in self.own if problem.id not in kept]
            if not self.held_out:
                raise UserError(
                    f"{path}",
                    "at least 5 problems to hold some out",
                    str(len(self.own)),
                    "Pass {data.eval_path}, or more problems.",
                )

    def training(self, draw: int, count: int) -> list[Problem]:
        """The `count` training problems of draw number `draw`, which depend on (seed, draw) alone.

        Of the tiny world they are always fresh ones; of a file, each epoch is a new order of all.
        """
        if self.own is None:
            source = generate(self.family, "train", f"align/{self.seed}/{draw}")
            return [next(source) for _ in range(count)]
        places = epoch_order(len(self.own), draw * count, (draw + 1) * count, seed=self.seed)
        return [self.own[place] for place in places]


class Draws(IterableDataset):
    """One process's problems of every micro-batch from `start` on: those of its whole draw, of which it is a part."""

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
