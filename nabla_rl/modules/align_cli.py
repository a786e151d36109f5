"""`python scripts/align.py`: options, the training, the adapter and its figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from rich.table import Table

from nabla_rl.modules.align_data import AlignmentData
from nabla_rl.modules.aligner import PolicyAligner
from nabla_rl.modules.decode_cli import (
    FULL_PRECISION,
    config_name,
    explain,
    given_configs,
    peak_memory_mb,
    terminable,
    wide_console,
)
from nabla_rl.report.run_folder import flatten
from nabla_rl.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "align"
NOT_IN_RESULTS = ("config", "run_dir", "trainer", "seed_everything")
Engine = Literal["lightning", "trl"]
DESCRIPTION = """Move a policy's weights towards the tilted policy that decoding searches by hand: KL-regularised
reinforcement learning of a LoRA adapter, with the same reward, the same beta and the same problems as decode. Without
options: the embedded tiny models, offline, in minutes. Options come from YAML files (--config) and from the command
line, which wins. The same command goes on with a run that was interrupted. What most runs set: --model.policy.name,
--model.reward.name, --model.gold.name (null for none), --model.reward_funcs, --model.rl.beta, --data.path,
--run_dir."""


class AlignCLI(LightningCLI):
    """The options of alignment, from YAML and the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own options and tie what must agree."""
        parser.add_argument("--seed", type=int, default=0, help="seed of every random number")
        parser.add_argument("--engine", type=Engine, default="lightning", help="who trains: this package, or TRL")
        parser.add_argument(
            "--run_dir", type=str, default=None, help="folder of the results (default: runs/align/<config name>)"
        )
        parser.link_arguments("data.family", "model.family")
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("seed", "data.seed")
        parser.link_arguments("model.rl.max_steps", "trainer.max_steps")
        parser.link_arguments("model.rl.gradient_accumulation_steps", "trainer.accumulate_grad_batches")
        parser.link_arguments("model.rl.max_grad_norm", "trainer.gradient_clip_val", compute_fn=norm_or_none)
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
                raise UserError(f"--{name}: expected a number, found {value}.")
        if self.config.trainer.precision not in FULL_PRECISION:
            raise UserError(
                f"--trainer.precision: expected none, found {self.config.trainer.precision}. Weights have their own "
                "types: use --model.policy.dtype and --model.reward.dtype."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; what it cannot do on this machine is an error of the input."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"--trainer: expected options that work here, found: {error} See --help.") from error


def norm_or_none(norm: float) -> float | None:
    """Lightning's word for "never cut the gradient" is None."""
    return norm or None


def main(arguments: list[str]) -> int:
    """Train, write the adapter and its figures, print a table."""
    default = CONFIGS / "tiny.yaml"
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    cli = AlignCLI(
        PolicyAligner,
        AlignmentData,
        run=False,
        args=arguments,
        seed_everything_default=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "align.py",
            "usage": "%(prog)s [--config FILE] [--OPTION VALUE ...]",
            "description": DESCRIPTION,
            "default_config_files": [str(default)] if default.is_file() else [],
            "exit_on_error": False,
        },
    )
    module, trainer, data = cli.model, cli.trainer, cli.datamodule
    folder = Path(cli.config.run_dir or Path("runs/align") / run_name(cli.config))
    config = run_config(cli)
    if trainer.is_global_zero:
        for notice in data.notices:
            print(f"warning: {notice}", file=sys.stderr)  # noqa: T201
        claim_folder(folder, config)
    console = wide_console()
    if (folder / "summary.json").is_file():
        console.print(summary_table(json.loads((folder / "summary.json").read_text(encoding="utf-8"))))
        console.print(f"{folder}/ holds this run, finished. Delete it, or choose another --run_dir, for a new one.")
        return 0
    module.run_dir = folder
    module.prepare(trainer.strategy.root_device, data)
    with terminable():
        if cli.config.engine == "trl":
            from nabla_rl.modules.align_trl import fit_with_trl

            fit_with_trl(module, folder)
        else:
            fit(module, trainer, folder)
    if trainer.is_global_zero:
        summary = finish(module, folder, config)
        console.print(summary_table(summary))
        if module.stopped:
            console.print(f"stopped early: {module.stopped}", highlight=False)
        console.print(
            f"adapter in {folder}/adapter/; decode with it: --model.policy.adapter {folder}/adapter", highlight=False
        )
    return 0


def fit(module: PolicyAligner, trainer: Trainer, folder: Path) -> None:
    """Train by Lightning, from the last checkpoint where there is one."""
    checkpoints = folder / "checkpoints"
    trainer.loggers = build_loggers(module.rl.report_to, folder)
    trainer.callbacks += [  # pyright: ignore
        RichProgressBar(),
        ModelCheckpoint(
            checkpoints, filename="{step}", every_n_train_steps=module.rl.save_steps, save_last=True, save_top_k=1
        ),
    ]
    last = checkpoints / "last.ckpt"
    try:
        trainer.fit(module, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    except SystemExit as stop:
        # what Lightning makes of Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise
    trainer.strategy.barrier()
    module.to(trainer.strategy.root_device)


def build_loggers(report_to: str, folder: Path) -> list[Logger]:
    """Where metrics go besides metrics.jsonl."""
    if report_to == "tensorboard":
        return [TensorBoardLogger(folder, name="tensorboard", version="")]
    if report_to == "wandb":
        try:
            return [WandbLogger(name=folder.name, save_dir=folder)]
        except ModuleNotFoundError as error:
            raise UserError(
                "--model.rl.report_to: expected an installed logger, found no wandb. Run `pip install wandb`, or use "
                "tensorboard."
            ) from error
    return []


def finish(module: PolicyAligner, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the policy before and after, save the adapter with its card, write the summary."""
    seconds, flops = module.seconds, module.all_flops
    with module.adapter.disabled() if module.adapter.changed() else nullcontext():
        before = module.evaluate(module.data.held_out)
    after = module.evaluate(module.data.held_out)
    summary: dict[str, Any] = {
        "algorithm": module.algorithm,
        "beta": module.rl.beta,
        "kl_estimator": module.kl_estimator,
        "steps": module.rl.max_steps if not module.stopped else None,
        "stopped": module.stopped or None,
        "before": before,
        "after": after,
        "flops": flops,
        "seconds": seconds,
        "num_tokens": module.all_tokens,
        "trainable_weights": module.adapter.num_weights,
        "peak_memory_mb": peak_memory_mb(module.policy.device),
        "versions": versions(),
    }
    module.adapter.save(folder / "adapter", model_card(summary, config))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Held-out figures before and after, with their standard errors."""
    before, after = summary["before"], summary["after"]
    table = Table(
        title=f"{summary['algorithm']}, β = {summary['beta']}: {before['problems']} held-out problems, "
        f"{summary['seconds']:.0f} s, {summary['flops']:.2e} FLOPs"
    )
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for name in figure_names(before):
        table.add_row(name.replace("_", " "), with_error(before, name), with_error(after, name))
    return table


def figure_names(figures: Mapping[str, Any]) -> list[str]:
    """The figures that have a value."""
    skip = ("problems", "generations")
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


def model_card(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The README.md of an adapter: what it was trained on, for what, and what came of it."""
    model, data = config["model"], config["data"]
    base, rl = model["policy"]["name"], model["rl"]
    problems = data["path"] or f"the tiny world's {data['family']} problems, train split"
    held = data["eval_path"] or ("every fifth of them" if data["path"] else f"its {data['eval_split']} split")
    embedded = "" if "/" in base else f" (embedded, {data['family']})"
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base}",
        f"tags: [lora, {model['algorithm']}, trl, nabla_rl]",
        "---",
        "",
        f"# A LoRA adapter of {base}{embedded}",
        "",
        f"Trained by `nabla-rl align` ({model['algorithm']}, engine {config['engine']}) towards the tilted policy "
        "ρ* ∝ π exp(r/β).",
        "",
        "| | |",
        "|---|---|",
        f"| data | {problems}; held out: {held} |",
        f"| reward | {', '.join(model['reward_funcs'])}; judge {model['reward']['name']}; never seen: "
        f"{model['gold']['name']} |",
        f"| β | {rl['beta']} (KL estimator {summary['kl_estimator']}) |",
        f"| KL reached | {with_error(summary['after'], 'kl')} nats a completion |",
        f"| steps | {summary['steps'] or summary['stopped']} of {rl['num_generations']} × "
        f"{rl['per_device_train_batch_size'] // rl['num_generations']} completions |",
        f"| cost | {summary['flops']:.3e} FLOPs, {summary['seconds']:.0f} s |",
        f"| versions | {', '.join(f'{name} {number}' for name, number in summary['versions'].items())} |",
        "",
        f"Held-out figures ({summary['before']['problems']} problems, {summary['before']['generations']} samples of "
        "each, ± standard error):",
        "",
        "| figure | before | after |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {with_error(summary['before'], name)} | {with_error(summary['after'], name)} |"
        for name in figure_names(summary["before"])
    ]
    return "\n".join([*lines, ""])


def run_config(cli: LightningCLI) -> dict[str, Any]:
    """What decides the results: the whole configuration, less where and on what it runs."""
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False, skip_none=False))
    for name in NOT_IN_RESULTS:
        config.pop(name, None)
    return config


def run_name(config: Any) -> str:
    """The name of the last YAML given with --config, or that of the default one."""
    name = config_name(config)
    return "tiny" if name == "default" and not config.config else name


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
                f"--run_dir: expected {folder} to hold this configuration, found {name} = {there.get(name)!r} there "
                f"and {here.get(name)!r} now{more}. Choose another --run_dir, or delete that folder."
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--run_dir: expected a folder that can be written, found none at {folder} ({error.strerror or error}). "
            "Choose another --run_dir."
        ) from error
