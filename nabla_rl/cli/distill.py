"""`nabla-rl distill`: options, the run, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich.table import Table

from nabla_rl.adapters.progress import DecodingBar, TrainingProgress
from nabla_rl.cli.base import VerbCLI, choose_threads, spelling, tell, terminable, wide_console
from nabla_rl.cli.training import TrainingCLI
from nabla_rl.distillation.data import DistillationData
from nabla_rl.distillation.distiller import PolicyDistiller
from nabla_rl.distillation.pipeline import Distillation, Teacher, read_finished


class DistillCLI(TrainingCLI):
    """The options of distillation."""

    verb, settings = "distill", "training"
    owner, beta_option = "teacher", "teacher.beta"
    precisions = (*TrainingCLI.precisions, "bf16-mixed", "16-mixed")
    description = """
Carry what decoding found into lighter weights: decode training problems with a teacher, and
train a LoRA adapter of a student on the answers. Without options: the embedded tiny models,
offline, in minutes. Options come from YAML files (--config) and from the command line, which
wins. The same command resumes an interrupted run.

Most runs set: --teacher.policy.name, --teacher.reward.name, --model.policy.name (the student),
--model.method, --data.path or --data.results, --data.limit, --run_dir."""

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add the teacher, whose options are those of decoding."""
        parser.add_class_arguments(Teacher, "teacher")
        super().add_options(parser)
        parser.link_arguments("data.family", "model.family")
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("teacher.sampling.max_new_tokens", "model.max_completion_length")
        parser.set_defaults({"teacher.decoders": ["edit_search"]})

    def used_decoders(self) -> Sequence[str]:
        return ("edit_search",)


def main(arguments: Sequence[str], *, prints_config: bool = False) -> int:
    """Decode, learn, measure, write the adapter and its figures, print a table."""
    cli = DistillCLI.read(arguments, PolicyDistiller, DistillationData, prints_config=prints_config)
    with spelling(cli.parser):
        return run(cli)


def run(cli: VerbCLI) -> int:
    """The run that the options describe."""
    folder, config, console, trainer = cli.folder(), cli.results_config(), wide_console(), cli.trainer
    if trainer.is_global_zero:
        done = read_finished(folder, config)
        if done is not None:
            console.print(summary_table(done.summary))
            console.print(f"{folder}/ holds this run, finished. Delete it, or choose another --run_dir for a new one.")
            return 0
    with DecodingBar() as bar:
        work = Distillation(
            cli.model, cli.datamodule, trainer, folder, config, teacher=cli.config_init["teacher"],
            engine=cli.config.engine, callbacks=[TrainingProgress()], watch=bar.show,
        )  # fmt: skip
        work.check()
        choose_threads(cli.model.policy)
        if trainer.is_global_zero:
            tell([cli.note], "note")
            tell(cli.datamodule.notices)
        with terminable():
            done = work.run()
    if trainer.is_global_zero:
        console.print(summary_table(done.summary))
        console.print(
            f"adapter in {folder}/adapter/, figures in {folder}/ (summary.json, amortisation.svg); decode with it: "
            f"--model.policy.name {cli.config.model.policy.name} --model.policy.adapter {folder}/adapter",
            highlight=False,
        )
    return 0


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Teacher, student before and after, and when it pays."""
    figures, cost = summary["figures"], summary["amortisation"]
    crossing = "never" if cost["crossing"] is None else f"after {cost['crossing']:,.0f} questions"
    table = Table(
        title=f"{summary['method']} of {summary['student']}: {summary['problems']} held-out problems; data and "
        f"training {cost['fixed_flops']:.2e} FLOPs, cheaper than its teacher {crossing}"
    )
    for column in ("", "accuracy", "reward", "gold reward", "FLOPs a question"):
        table.add_column(column, justify="right" if column else "left")
    decoder = summary["teacher"]["decoder"]
    for name, label in (
        ("teacher_greedy", "teacher, greedy"), ("teacher", f"teacher, {decoder}"),
        ("before", "student before, greedy"), ("after", "student after, greedy"),
    ):  # fmt: skip
        row = figures[name]
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f} ± {row['accuracy_error']:.3f}"
        rewards = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("reward", "gold_reward")]
        table.add_row(label, accuracy, *rewards, f"{row['flops']:.2e}")
    return table
