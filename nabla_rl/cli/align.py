"""`nabla-rl align`: options, the training, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from nabla_rl.adapters.progress import TrainingProgress
from nabla_rl.adapters.run import figure_names, with_error
from nabla_rl.alignment.aligner import PolicyAligner
from nabla_rl.alignment.data import AlignmentData
from nabla_rl.alignment.pipeline import read_finished, train
from nabla_rl.cli.base import VerbCLI, choose_threads, spelling, tell, terminable, wide_console
from nabla_rl.cli.training import TrainingCLI


class AlignCLI(TrainingCLI):
    """The options of alignment."""

    verb, settings = "align", "rl"
    names_decoders, beta_option = "search", "model.rl.beta"
    description = """
Train a LoRA adapter towards the tilted policy that decoding searches, by KL-regularised
reinforcement learning: the same reward, the same beta, the same problems as decode. Without
options: the embedded tiny models, offline, in minutes. Options come from YAML files (--config)
and from the command line, which wins. The same command resumes an interrupted run.

Most runs set: --model.policy.name, --model.reward.name, --model.reward_funcs, --model.rl.beta,
--data.path, --run_dir."""


def main(arguments: Sequence[str], *, prints_config: bool = False) -> int:
    """Train, write the adapter and its figures, print a table."""
    cli = AlignCLI.read(arguments, PolicyAligner, AlignmentData, prints_config=prints_config)
    with spelling(cli.parser):
        return run(cli)


def run(cli: VerbCLI) -> int:
    """The run that the options describe."""
    module, data, trainer, folder = cli.model, cli.datamodule, cli.trainer, cli.folder()
    config, console = cli.results_config(), wide_console()
    if trainer.is_global_zero:
        done = read_finished(folder, config)
        if done is not None:
            console.print(summary_table(done.summary))
            console.print(
                f"{folder}/ holds this run, finished. Delete it, or choose another --run_dir, for a new one."
            )
            return 0
    module.run_dir = folder
    module.prepare(trainer.strategy.root_device, data)
    choose_threads(module.policy)
    if trainer.is_global_zero:
        tell([cli.note], "note")
        tell(data.notices)
    with terminable():
        done = train(module, data, trainer, folder, config, engine=cli.config.engine, callbacks=[TrainingProgress()])
    if trainer.is_global_zero:
        console.print(summary_table(done.summary))
        if module.stopped:
            console.print(f"stopped early: {module.stopped}", highlight=False)
        console.print(
            f"adapter in {folder}/adapter/; decode with it: --model.policy.adapter {folder}/adapter", highlight=False
        )
    return 0


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
