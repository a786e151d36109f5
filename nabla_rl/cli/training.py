"""The options that the commands that train an adapter have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from nabla_rl.adapters.run import Engine, check_logger, norm_or_none
from nabla_rl.cli.base import VerbCLI, spelling


class TrainingCLI(VerbCLI):
    """The options of a training, from YAML and the command line.

    Attributes:
        settings: The group of options with the settings of the training, in the section model.
    """

    settings: ClassVar[str]

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add the engine, and tie the trainer to the settings."""
        parser.add_argument("--engine", type=Engine, default="lightning", help="Who trains: this package, or TRL.")
        parser.link_arguments("seed", "data.seed")
        settings = f"model.{self.settings}"
        parser.link_arguments(f"{settings}.max_steps", "trainer.max_steps")
        parser.link_arguments(f"{settings}.gradient_accumulation_steps", "trainer.accumulate_grad_batches")
        parser.link_arguments(f"{settings}.max_grad_norm", "trainer.gradient_clip_val", compute_fn=norm_or_none)

    def trainer_settings(self) -> dict[str, Any]:
        return {**super().trainer_settings(), "trainer.max_epochs": -1, "trainer.use_distributed_sampler": False}

    def before_instantiate_classes(self) -> None:
        """Refuse a logger that is not installed, too."""
        super().before_instantiate_classes()
        with spelling(self.parser):
            check_logger(self.config.model[self.settings].report_to, self.settings)
