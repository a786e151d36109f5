"""The problems of a distillation: what the teacher answers, what weights are chosen by, and what is held out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from torch.utils.data import IterableDataset

from nabla_rl.adapters.training import epoch_order
from nabla_rl.alignment.data import AlignmentData
from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import generate
from nabla_rl.distillation.config import DistillConfig
from nabla_rl.distillation.rows import Filters, HeldOut, Row
from nabla_rl.types import UserError


class DistillationData(AlignmentData):
    """What the teacher answers, and what the student is measured on.

    Args:
        limit: Maximum number of training problems that the teacher decodes.
        results: Folders or results.jsonl of decode runs to learn from, in place of decoding; null decodes.
        filters: Filters of the answers that are learned from.
        validation_limit: Number of problems that the best weights are chosen by; 0 keeps the last weights.
        family: Family of the tiny world: words or sorting; it also names the embedded models.
        path: JSONL file of problems (fields problem, id, answer); null is the tiny world.
        eval_path: JSONL file of held-out problems; null is every fifth problem of `path`.
        eval_split: Split of the tiny world that is held out.
        eval_limit: Maximum number of held-out problems.
        problem_seed: Seed of the draw of held-out problems from the tiny world.
        answers: Reading of answers: boxed (math-verify) or exact; null is the family's.
        skip_bad: Permission to leave malformed lines out instead of refusing the file.
        seed: Random seed of the training problems and the order of the rows.
    """

    def __init__(
        self,
        limit: int = 1024,
        results: list[str] | None = None,
        filters: Filters = Filters(),  # noqa: B008, frozen
        validation_limit: int = 200,
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
        for name, value, low in (("limit", limit, 1), ("validation_limit", validation_limit, 0)):
            if value < low:
                raise UserError(f"data.{name}", f"at least {low}", str(value))
        super().__init__(family, path, eval_path, eval_split, eval_limit, problem_seed, answers, skip_bad, seed)
        self.limit, self.results, self.filters = limit, results, filters
        self.arguments = (family, "test", 1, problem_seed, None, answers)
        self.extract = ProblemData(*self.arguments).extract
        if self.own is None:
            draw = generate(self.family, "validation", f"distill/{problem_seed}")
            self.validation = list(islice(draw, validation_limit))
            self.problems = list(islice(generate(self.family, "train", f"distill/{seed}"), limit))
        else:
            self.validation = self.own[4::5][:validation_limit]
            kept = {problem.id for problem in self.validation}
            self.problems = [problem for problem in self.own if problem.id not in kept][:limit]
        # results do not say where their problems come from; those of the tiny world have a key that does
        tiny = None if path is not None else family
        self.refused = HeldOut([p.problem for p in (*self.held_out, *self.validation)], tiny)

    def learn_from(self, *, filters: Filters, validation: Sequence[Problem]) -> None:
        """Learn from the caller's own problems, filter the answers, and choose the best weights on `validation`."""
        self.filters, self.validation, self.problems = filters, list(validation), self.own or []
        self.refused = HeldOut([p.problem for p in (*self.held_out, *self.validation)])

    def to_decode(self, problems: Sequence[Problem], batch_size: int = 64) -> ProblemData:
        """Some of the problems as the data of decoding."""
        data = ProblemData(*self.arguments, batch_size=batch_size)
        data.problems = list(problems)
        return data


class Batches(IterableDataset):
    """The rows of one process: for every micro-batch from `start`, its rows and the tokens of its whole step."""

    def __init__(
        self,
        rows: Sequence[Row],
        items: Sequence[float],
        settings: DistillConfig,
        *,
        seed: int,
        start: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rows, self.items, self.settings, self.seed = rows, items, settings, seed
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, list[Row], float]]:
        parts, each = self.settings.gradient_accumulation_steps, self.settings.per_device_train_batch_size
        whole, tick = parts * self.world_size * each, self.start
        while tick < sys.maxsize:
            step, part = divmod(tick, parts)
            places = epoch_order(len(self.rows), step * whole, (step + 1) * whole, seed=self.seed)
            mine = places[(part * self.world_size + self.rank) * each :][:each]
            yield tick, [self.rows[place] for place in mine], sum(self.items[place] for place in places)
            tick += 1
