"""`python scripts/decode.py`: options, the run, the table."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from nabla_rl.data.module import ProblemData
from nabla_rl.modules.decoding import Decoding
from nabla_rl.modules.progress import DecodingProgress
from nabla_rl.report import format_table, write_report
from nabla_rl.report.run_folder import RunFolder
from nabla_rl.report.summary import acceleration_shares, summarise

CONFIGS = Path(__file__).parents[2] / "configs" / "decode"
TABLE_WIDTH = 140
NOT_IN_RESULTS = ("config", "run_dir", "trainer", "seed_everything")


class DecodeCLI(LightningCLI):
    """The options of decoding, from YAML and the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own options and tie what must agree."""
        parser.add_argument("--seed", type=int, default=0, help="seed of every random number")
        parser.add_argument(
            "--run_dir", type=str, default=None, help="folder of the results (default: runs/decode/<config name>)"
        )
        parser.link_arguments("data.family", "model.family")
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("model.beta", "model.nabla.dto.beta")
        parser.set_defaults(
            {
                "trainer.logger": False,
                "trainer.enable_checkpointing": False,
                "trainer.enable_progress_bar": False,
                "trainer.enable_model_summary": False,
                "trainer.inference_mode": False,
                "trainer.barebones": False,
            }
        )


def main(arguments: list[str]) -> int:
    """Decode, write the run folder, print the table."""
    default = CONFIGS / "default.yaml"
    cli = DecodeCLI(
        Decoding,
        ProblemData,
        run=False,
        args=arguments,
        seed_everything_default=False,
        save_config_callback=None,
        parser_kwargs={
            "prog": "decode.py",
            "description": "Decode problems with ∇-Reasoner and its rivals, with every cost counted.",
            "default_config_files": [str(default)] if default.is_file() else [],
            "exit_on_error": False,
        },
    )
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    config = results_config(cli)
    folder = Path(cli.config.run_dir or Path("runs/decode") / config_name(cli.config))
    module.run_folder = RunFolder(folder, config, rank=trainer.global_rank, world_size=trainer.world_size)
    trainer.callbacks.append(DecodingProgress(data, module))  # pyright: ignore
    trainer.predict(module, datamodule=data, return_predictions=False)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        finish(module, data, module.run_folder, wide_console())
    return 0


def finish(module: Decoding, data: ProblemData, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Merge the results and write the summary and the page; print the table."""
    results = folder.merge([problem.id for problem in data.problems], module.decoder_names)
    summary: dict[str, Any] = {
        "problems": len(data.problems),
        "seed": module.seed,
        "rows": summarise(results, module.decoder_names),
        "accelerations": acceleration_shares(results),
        "peak_memory_mb": peak_memory_mb(module.device),
    }
    folder.write_json("summary.json", summary)
    write_report(folder.path / "report.html", f"decode: {folder.path.name}", summary["rows"], results)
    where = data.path or f"{data.family.name}, {data.split} split"
    console.print(format_table(summary["rows"], title=f"{len(data.problems)} problems ({where}); costs per problem"))
    console.print(f"results in {folder.path}/ (results.jsonl, summary.json, report.html)", highlight=False)
    return summary


def wide_console() -> Console:
    """A console that does not squeeze the table, also where the output is not a terminal."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


def results_config(cli: LightningCLI) -> dict[str, Any]:
    """What decides the results: the whole configuration, less where and on what it runs."""
    import yaml

    dumped = cli.parser.dump(cli.config, skip_link_targets=False)
    config = yaml.safe_load(dumped)
    for name in NOT_IN_RESULTS:
        config.pop(name, None)
    config["data"].pop("batch_size", None)
    return config


def config_name(config: Any) -> str:
    """The name of the last YAML given with --config, or "default"."""
    files = [Path(str(file)).stem for file in (config.config or []) if file is not None]
    return files[-1] if files else "default"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


