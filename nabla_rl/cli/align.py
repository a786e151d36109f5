"""`python scripts/align.py`: options, the training, the adapter and its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from rich.table import Table

from nabla_rl.alignment.aligner import PolicyAligner
from nabla_rl.alignment.data import AlignmentData
from nabla_rl.alignment.evaluation import KL_ESTIMATE
from nabla_rl.cli.decode import (
    config_name,
    peak_memory_mb,
    terminable,
    wide_console,
)
from nabla_rl.cli.training import (
    AdapterCLI,
    claim_folder,
    figure_names,
    fit,
    run_config,
    versions,
    with_error,
)
from nabla_rl.report.learning_curves import build_curves, format_curves, write_curves
from nabla_rl.studies.curves import CurvesOptions, build_cells, check_cells, read_cells, run_cells

CONFIGS = Path(__file__).parents[2] / "configs" / "align"
DESCRIPTION = """Move a policy's weights towards the tilted policy that decoding searches by hand: KL-regularised
reinforcement learning of a LoRA adapter, with the same reward, the same beta and the same problems as decode. Without
options: the embedded tiny models, offline, in minutes. Options come from YAML files (--config) and from the command
line, which wins. The same command goes on with a run that was interrupted. What most runs set: --model.policy.name,
--model.reward.name, --model.gold.name (null for none), --model.reward_funcs, --model.rl.beta, --data.path,
--run_dir."""


class AlignCLI(AdapterCLI):
    """The options of alignment, from YAML and the command line."""

    verb, section = "align", "rl"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a comparison to those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(CurvesOptions, "curves")


def main(arguments: list[str]) -> int:
    """Train, write the adapter and its figures, print a table; of a comparison, every variant with every seed."""
    cli = build_cli(arguments)
    folder = Path(cli.config.run_dir or Path("runs/align") / run_name(cli.config))
    options: CurvesOptions = cli.config_init["curves"]
    if options.variants:
        return compare(cli, options, arguments, folder)
    return train(cli, folder)


def build_cli(arguments: list[str]) -> AlignCLI:
    """The options, and what they build."""
    default = CONFIGS / "tiny.yaml"
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return AlignCLI(
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


def compare(cli: AlignCLI, options: CurvesOptions, arguments: list[str], folder: Path) -> int:
    """Train every variant with every seed and write the learning curves; interrupted, those of what is finished."""
    cells = build_cells(options, arguments, folder)
    check_cells(cells, build_cli)
    console, first = wide_console(), cli.trainer.is_global_zero

    def run(given: list[str]) -> int:
        with redirect_stdout(StringIO()):
            inner = build_cli(given)
            return train(inner, Path(inner.config.run_dir))

    try:
        run_cells(cells, run, lambda text: print(text, file=sys.stderr, flush=True) if first else None)  # noqa: T201
    finally:
        results = read_cells(cells)
        if first and results:
            count = len(cli.datamodule.held_out)
            title = f"{count} held-out problems ({cli.datamodule.family.name}), seeds {options.seeds}"
            curves = build_curves(results)
            names = write_curves(folder, curves, title)
            console.print(format_curves(curves, title=title))
            console.print(f"results in {folder}/ ({', '.join(names)})", highlight=False)
    return 0


def train(cli: AlignCLI, folder: Path) -> int:
    """One run."""
    module, trainer, data = cli.model, cli.trainer, cli.datamodule
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
            from nabla_rl.alignment.trl_engine import fit_with_trl

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
        "kl_measured_as": KL_ESTIMATE,
        "steps": module.rl.max_steps if not module.stopped else None,
        "stopped": module.stopped or None,
        "stopped_at": module.stopped_at if module.stopped else None,
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


def run_name(config: Any) -> str:
    """The name of the last YAML given with --config, or that of the default one."""
    name = config_name(config)
    return "tiny" if name == "default" and not config.config else name
