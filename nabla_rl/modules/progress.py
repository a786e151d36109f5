"""A progress bar that shows each decoder's running accuracy."""

from __future__ import annotations

from collections import defaultdict

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nabla_rl.data.module import ProblemData
from nabla_rl.modules.decoding import Decoding


class DecodingProgress(L.Callback):
    """Counts finished (problem, decoder) pairs and shows accuracies so far; resumed ones count as they are met."""

    def __init__(self, data: ProblemData, module: Decoding):
        self.data, self.module = data, module
        self.graded: dict[str, list[bool]] = defaultdict(list)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the bar on the first process."""
        if not trainer.is_global_zero:
            return
        share = -(-len(self.data.problems) // trainer.world_size)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[accuracy]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task("decoding", total=share * len(self.module.decoder_names), accuracy="")
        self.bar.start()
        self.module.on_rows = self.show

    def show(self, rows: list[dict]) -> None:
        """Take note of finished lines."""
        for row in rows:
            if row["correct"] is not None:
                self.graded[row["decoder"]].append(row["correct"])
        text = "  ".join(f"{name} {sum(right) / len(right):.2f}" for name, right in self.graded.items())
        self.bar.update(self.task, advance=len(rows), accuracy=text)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        if trainer.is_global_zero:
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        if trainer.is_global_zero and self.module.on_rows == self.show:
            self.bar.stop()
