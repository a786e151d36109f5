"""`nabla-rl decode`: options, the run, the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer
from rich.console import Console

from nabla_rl.cli.base import VerbCLI, choose_threads, peak_memory_mb, spelling, tell, terminable, wide_console
from nabla_rl.cli.progress import DecodingProgress
from nabla_rl.data.module import ProblemData
from nabla_rl.decoding.module import DecodingModule, chosen_decoders
from nabla_rl.decoding.run import check_same_problems
from nabla_rl.models.loading import RewardOptions
from nabla_rl.report.decoded import finish
from nabla_rl.report.table import counted, format_table
from nabla_rl.run_folder import RunFolder


class DecodeCLI(VerbCLI):
    """The options of decoding."""

    verb = "decode"
    description = """
Answer problems with several decoders, every cost counted. Without options: test problems of
the embedded tiny world by its embedded models, offline. Options come from YAML files (--config)
and from the command line, which wins. The same command resumes an interrupted run.

Most runs set: --model.policy.name, --model.reward.name, --model.decoders, --model.beta,
--data.path, --run_dir."""

    def trainer_settings(self) -> dict[str, Any]:
        return {**super().trainer_settings(), "trainer.inference_mode": False, "trainer.barebones": False}

    def used_decoders(self) -> list[str]:
        """The decoders of a run that names none."""
        return chosen_decoders(None, RewardOptions(self.seen.get("model.reward.name", "words/tiny-reward")))


def main(arguments: Sequence[str], *, prints_config: bool = False) -> int:
    """Decode, write the run folder, print the table."""
    cli = DecodeCLI.read(arguments, DecodingModule, ProblemData, prints_config=prints_config)
    with spelling(cli.parser):
        return run(cli)


def run(cli: VerbCLI) -> int:
    """The run that the options describe."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    folder = RunFolder(cli.folder(), cli.results_config(), rank=trainer.global_rank, world_size=trainer.world_size)
    check_same_problems(folder, data.problems)
    # before Lightning starts other processes: what is wrong with the models is then said once
    module.prepare(trainer.strategy.root_device, data)
    choose_threads(module.job.policy, module.job.reward, module.job.gold)
    module.run_folder = folder
    if trainer.is_global_zero:
        tell([cli.note], "note")
        tell(data.notices)
    trainer.callbacks.append(DecodingProgress(data, [(None, module)]))  # pyright: ignore
    predict(trainer, module, data, partial(conclude, module, data, folder))
    return 0


def predict(trainer: Trainer, module: DecodingModule, data: ProblemData, conclude: Callable[[Console], Any]) -> None:
    """Run to the end, or to an interruption, and conclude with what there is."""
    try:
        with terminable():
            trainer.predict(module, datamodule=data, return_predictions=False)
    except SystemExit as stop:
        # what Lightning makes of Ctrl-C
        interrupt = stop.__context__
        if not isinstance(interrupt, KeyboardInterrupt):
            raise
        if trainer.world_size == 1 and module.run_folder and module.run_folder.rows:
            conclude(wide_console())
        raise interrupt from None
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        conclude(wide_console())


def conclude(module: DecodingModule, data: ProblemData, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Write the summary and the page; print the table."""
    more = {"seed": module.seed, "peak_memory_mb": peak_memory_mb(module.device)}
    summary = finish(folder, [problem.id for problem in data.problems], module.decoder_names, more=more)
    where = data.path or f"{data.family.name}, {data.split} split"
    total, done = len(data.problems), summary["problems"]
    count = counted(total, "problem") if done == total else f"the {done} finished of {counted(total, 'problem')}"
    console.print(format_table(summary["rows"], title=f"{count} ({where}); costs per problem"))
    console.print(f"results in {Path(folder.path)}/ (results.jsonl, summary.json, report.html)", highlight=False)
    return summary
