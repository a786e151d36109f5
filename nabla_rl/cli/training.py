"""What the commands that train an adapter have in common: options, loggers, the run's folder, the adapter's card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from jsonargparse import ArgumentError
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from nabla_rl.adapters.config import AdapterConfig
from nabla_rl.adapters.training import AdapterTraining
from nabla_rl.cli.decode import FULL_PRECISION, explain, given_configs
from nabla_rl.cli.progress import TrainingProgress
from nabla_rl.run_folder import flatten
from nabla_rl.types import UserError

NOT_IN_RESULTS = ("config", "run_dir", "trainer", "seed_everything", "curves")
Engine = Literal["lightning", "trl"]


class AdapterCLI(LightningCLI):
    """The options of a training, from YAML and the command line.

    Attributes:
        verb: the command's name.
        section: the group of options with the settings of the training.
        precisions: what --trainer.precision may be.
    """

    verb: ClassVar[str]
    section: ClassVar[str]
    precisions: ClassVar[tuple[Any, ...]] = FULL_PRECISION

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own options and tie what must agree."""
        parser.add_argument("--seed", type=int, default=0, help="seed of every random number")
        parser.add_argument("--engine", type=Engine, default="lightning", help="who trains: this package, or TRL")
        default = f"runs/{self.verb}/<config name>"
        parser.add_argument("--run_dir", type=str, default=None, help=f"folder of the results (default: {default})")
        parser.link_arguments("data.family", "model.family")
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("seed", "data.seed")
        settings = f"model.{self.section}"
        parser.link_arguments(f"{settings}.max_steps", "trainer.max_steps")
        parser.link_arguments(f"{settings}.gradient_accumulation_steps", "trainer.accumulate_grad_batches")
        parser.link_arguments(f"{settings}.max_grad_norm", "trainer.gradient_clip_val", compute_fn=norm_or_none)
        parser.set_defaults(
            {
                "trainer.max_epochs": -1,
                "trainer.logger": False,
                "trainer.enable_checkpointing": False,
                "trainer.enable_progress_bar": False,
                "trainer.enable_model_summary": False,
                "trainer.use_distributed_sampler": False,
            }
        )
        # our own options before the many of Lightning's trainer
        parser._action_groups.sort(key=lambda group: "training via flags" in (group.title or ""))  # pyright: ignore

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is wrong is said in this project's words."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            options = [option for action in parser._actions for option in action.option_strings]
            raise UserError(explain(str(error), options, given_configs(args))) from error
        except UnicodeDecodeError as error:
            raise UserError(explain("Problems parsing config", (), given_configs(args))) from error

    def before_instantiate_classes(self) -> None:
        """Refuse what a type cannot: values that are no numbers, and precisions beside the models' own types."""
        for name, value in flatten(self.config.as_dict()).items():
            if isinstance(value, float) and math.isnan(value):
                raise UserError(f"{name}", "a number", str(value))
        check_logger(self.config.model[self.section].report_to, self.section)
        if self.config.trainer.precision not in self.precisions:
            raise UserError(
                "trainer.precision",
                "none",
                str(self.config.trainer.precision),
                "Weights have their own types: use {policy.dtype} and {reward.dtype}.",
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; what it cannot do on this machine is an error of the input."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError("trainer", "options that work here", f"{error} See --help") from error


def norm_or_none(norm: float) -> float | None:
    """Lightning's word for "never cut the gradient" is None."""
    return norm or None


def fit(module: AdapterTraining, trainer: Trainer, folder: Path) -> None:
    """Train by Lightning, from the last checkpoint where there is one."""
    checkpoints = folder / "checkpoints"
    trainer.loggers = build_loggers(module.settings, folder)
    trainer.callbacks += [  # pyright: ignore
        TrainingProgress(),
        ModelCheckpoint(
            checkpoints,
            filename="{step}",
            every_n_train_steps=module.settings.save_steps,
            save_last=True,
            save_top_k=1,
        ),
    ]
    last = checkpoints / "last.ckpt"
    with interruptible():
        trainer.fit(module, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    trainer.strategy.barrier()
    module.to(trainer.strategy.root_device)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C is what it is elsewhere, and not what Lightning makes of it."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise


def check_logger(report_to: str, section: str) -> None:
    """Refuse W&B where it is not installed, before anything is loaded or trained."""
    if report_to == "wandb" and find_spec("wandb") is None:
        raise UserError(
            f"{section}.report_to", "an installed logger", "no wandb", "Run `pip install wandb`, or use tensorboard."
        )


def build_loggers(settings: AdapterConfig, folder: Path) -> list[Logger]:
    """Where metrics go besides metrics.jsonl."""
    if settings.report_to == "tensorboard":
        return [TensorBoardLogger(folder, name="tensorboard", version="")]
    if settings.report_to == "wandb":
        return [WandbLogger(name=folder.name, save_dir=folder)]
    return []


def figure_names(figures: Mapping[str, Any]) -> list[str]:
    """The figures that have a value."""
    skip = ("problems", "generations", "evaluation_flops")
    return [n for n, v in figures.items() if n not in skip and not n.endswith("_error") and v is not None]


def with_error(figures: Mapping[str, Any], name: str) -> str:
    """A figure with its standard error."""
    value, error = figures[name], figures.get(f"{name}_error")
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def versions() -> dict[str, str]:
    """Of what made the adapter."""
    found = {}
    for name in ("nabla-rl", "torch", "transformers", "peft", "trl", "lightning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run_config(cli: LightningCLI) -> dict[str, Any]:
    """What decides the results: the whole configuration, less where and on what it runs."""
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False, skip_none=False))
    for name in NOT_IN_RESULTS:
        config.pop(name, None)
    return config


def claim_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml, or refuse a folder that holds a run of another configuration."""
    file = folder / "config.yaml"
    if file.is_file():
        there = yaml.safe_load(file.read_text(encoding="utf-8"))
        there, here = flatten(there if isinstance(there, dict) else {}), flatten(config)
        differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        if differing:
            name = differing[0]
            more = f" and {len(differing) - 1} more settings" if len(differing) > 1 else ""
            raise UserError(
                "run_dir",
                f"{folder} to hold this configuration",
                f"{name} = {there.get(name)!r} there and {here.get(name)!r} now{more}",
                "Choose another {run_dir}, or delete that folder.",
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(
            "run_dir",
            "a folder that can be written",
            f"none at {folder} ({error.strerror or error})",
            "Choose another {run_dir}.",
        ) from error
