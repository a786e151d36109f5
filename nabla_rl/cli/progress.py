"""Progress bars of decoding, with each decoder's running accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

import lightning as L
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from nabla_rl.data.module import ProblemData
from nabla_rl.decoding.module import DecodingModule


class AccuracyBar(Progress):
    """A bar with a line of accuracies below it, so that neither cuts the other short."""

    accuracies = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the line where there is something to say."""
        yield self.make_tasks_table(self.tasks)
        if self.accuracies:
            yield Text(self.accuracies)


class DecodingProgress(L.Callback):
    """Counts finished (problem, decoder) pairs and shows accuracies so far; resumed ones count as they are met.

    Args:
        data: the problems.
        runs: what decodes them, each with the label of its accuracy; None takes the decoders' own names.
    """

    def __init__(self, data: ProblemData, runs: Sequence[tuple[str | None, DecodingModule]]):
        self.data, self.runs = data, runs
        self.graded: dict[str, list[bool]] = defaultdict(list)
        self.bar: AccuracyBar | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the bar on the first process."""
        if not trainer.is_global_zero:
            return
        share = -(-len(self.data.problems) // trainer.world_size)
        self.bar = AccuracyBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        total = share * sum(len(module.decoder_names) for _, module in self.runs)
        self.task = self.bar.add_task("decoding", total=total)
        self.bar.start()
        for label, module in self.runs:
            module.on_rows = partial(self.show, label)

    def describe(self, text: str) -> None:
        """Say what is being worked on."""
        if self.bar is not None:
            self.bar.update(self.task, description=text)

    def show(self, label: str | None, rows: list[dict]) -> None:
        """Take note of finished lines."""
        if self.bar is None:
            return
        for row in rows:
            if row["correct"] is not None:
                self.graded[label or row["decoder"]].append(row["correct"])
        shares = (f"{name} {sum(right) / len(right):.2f}" for name, right in self.graded.items())
        self.bar.accuracies = "accuracy: " + "  ".join(shares) if self.graded else ""
        self.bar.update(self.task, advance=len(rows))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back; into a file goes only what went wrong."""
        if self.bar is not None:
            self.bar.live.transient = not self.bar.console.is_terminal
            self.bar.live.stop()
