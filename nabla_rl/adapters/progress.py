"""Progress bars of a training, and of the decoding that comes before it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class TrainingProgress(RichProgressBar):
    """Lightning's bar of the batches of the whole run, also where it resumes from a checkpoint.

    There are no epochs to count, and Lightning counts what is left as the whole.
    """

    @property
    def total_train_batches(self) -> int:
        """All batches of the run."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class DecodingBar:
    """A bar on standard error for stages that decode outside a Lightning loop."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> DecodingBar:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """So many problems are decoded of so many."""
        self.bar.start()
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(f"decoding: {what}", total=total)
        self.bar.update(self.tasks[what], completed=done)
        if done >= total:
            self.bar.stop()  # the training's own bar comes next
