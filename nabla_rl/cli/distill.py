"""`python scripts/distill.py`: decode a training set, learn from it, measure, write the adapter.

Each stage leaves its files in the run folder, and is not done again where they are.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from nabla_rl.cli.decode import config_name, finish, peak_memory_mb, spell_option, terminable, wide_console
from nabla_rl.cli.progress import DecodingProgress
from nabla_rl.cli.training import AdapterCLI, claim_folder, fit, interruptible, run_config, versions
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.module import Decoding
from nabla_rl.distillation.data import DistillationData
from nabla_rl.distillation.distiller import PolicyDistiller
from nabla_rl.distillation.rows import Row, build_rows, read_results, read_set, select_results, write_set
from nabla_rl.distillation.soft_targets import add_soft_targets
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.metrics.paired import paired_difference
from nabla_rl.models.loading import PolicyOptions, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.report.amortisation import amortise, draw_amortisation, recovered_share
from nabla_rl.report.frontier import png_bytes
from nabla_rl.report.html import svg_text
from nabla_rl.rewards.base import check_shared_vocabulary
from nabla_rl.run_folder import RunFolder, write_atomically
from nabla_rl.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "distill"
HELD_OUT = ("family", "path", "eval_path", "eval_split", "eval_limit", "problem_seed", "answers", "skip_bad")
"""Options of the data that decide which problems are held out."""
DESCRIPTION = """Carry what decoding found into lighter weights: decode training problems with a teacher, and train a
LoRA adapter of a student on the answers. Without options: the embedded tiny models, offline, in minutes. Options come
from YAML files (--config) and from the command line, which wins. The same command goes on with a run that was
interrupted. What most runs set: --teacher.policy.name, --teacher.reward.name, --teacher.gold.name (null for none),
--model.policy.name (the student), --model.method, --data.path or --data.results, --data.limit, --run_dir."""


class Teacher(Decoding):
    """What answers the training problems: the options of the decode command, with one decoder."""

    def __init__(self, **options: Any):
        self.given = options
        try:
            super().__init__(**options)
        except UserError as error:
            raise UserError(in_teacher(str(error))) from error
        if len(self.decoder_names) != 1:
            raise UserError("teacher.decoders", "one decoder to learn from", str(self.decoder_names))

    def with_decoders(self, names: Sequence[str]) -> Decoding:
        """The same decoding, with these decoders."""
        return Decoding(**{**self.given, "decoders": list(names)})


def in_teacher(message: str) -> str:
    """An error of the decoding with its options as they are here."""
    return spell_option(message).replace("--model.", "--teacher.")


class DistillCLI(AdapterCLI):
    """The options of distillation, from YAML and the command line."""

    verb, section = "distill", "training"
    precisions = (*AdapterCLI.precisions, "bf16-mixed", "16-mixed")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the teacher, whose options are those of decoding."""
        parser.add_class_arguments(Teacher, "teacher")
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.family", "teacher.family")
        parser.link_arguments("seed", "teacher.seed")
        parser.link_arguments("teacher.beta", "teacher.nabla.dto.beta")
        parser.link_arguments("teacher.sampling.max_new_tokens", "model.max_completion_length")
        parser.set_defaults({"teacher.decoders": ["nabla"]})

    def instantiate_classes(self) -> None:
        """Build everything; errors of the teacher's parts name the option as it is written on the command line."""
        try:
            super().instantiate_classes()
        except UserError as error:
            raise UserError(str(error) if str(error).startswith("--") else in_teacher(str(error))) from error


def main(arguments: list[str]) -> int:
    """Decode, learn, measure, write the adapter and its figures, print a table."""
    default = CONFIGS / "tiny.yaml"
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    cli = DistillCLI(
        PolicyDistiller,
        DistillationData,
        run=False,
        args=arguments,
        seed_everything_default=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "distill.py",
            "usage": "%(prog)s [--config FILE] [--OPTION VALUE ...]",
            "description": DESCRIPTION,
            "default_config_files": [str(default)] if default.is_file() else [],
            "exit_on_error": False,
        },
    )
    name = config_name(cli.config)
    name = "tiny" if name == "default" and not cli.config.config else name
    folder = Path(cli.config.run_dir or Path("runs/distill") / name)
    run = Distillation(cli, folder)
    if cli.trainer.is_global_zero:
        for notice in run.data.notices:
            print(f"warning: {notice}", file=sys.stderr)  # noqa: T201
        claim_folder(folder, run.config)
    console = wide_console()
    if (folder / "summary.json").is_file():
        console.print(summary_table(json.loads((folder / "summary.json").read_text(encoding="utf-8"))))
        console.print(f"{folder}/ holds this run, finished. Delete it, or choose another --run_dir, for a new one.")
        return 0
    with terminable(), interruptible():
        summary = run.run()
    if summary is not None:
        console.print(summary_table(summary))
        console.print(
            f"adapter in {folder}/adapter/, figures in {folder}/ (summary.json, amortisation.svg); decode with it: "
            f"--model.policy.name {cli.config.model.policy.name} --model.policy.adapter {folder}/adapter",
            highlight=False,
        )
    return 0


class Distillation:
    """A run: its parts, and its stages in order."""

    def __init__(self, cli: DistillCLI, folder: Path):
        self.module: PolicyDistiller = cli.model
        self.data: DistillationData = cli.datamodule
        self.trainer: Trainer = cli.trainer
        self.teacher: Teacher = cli.config_init["teacher"]
        self.folder, self.engine = folder, cli.config.engine
        self.config = run_config(cli)
        self.device = self.trainer.strategy.root_device
        self.student_is_teacher = dict(self.config["model"]["policy"]) == dict(self.config["teacher"]["policy"])

    def run(self) -> dict[str, Any] | None:
        """All stages; the summary, on the first process."""
        self.check()
        if self.trainer.is_global_zero:
            self.make_data()
        else:  # torchrun starts all processes at once
            while not (self.folder / "data" / "train.jsonl").is_file():
                time.sleep(1.0)
        self.module.learn_from(read_set(self.folder / "data"))
        self.learn()
        return self.measure() if self.trainer.is_global_zero else None

    def check(self) -> None:
        """Load the student, and refuse what cannot work before anything is decoded."""
        self.module.run_dir = self.folder
        self.module.prepare(self.device, self.data)
        if self.engine == "trl":
            self.module.training_config.to_trl(self.module.method, output_dir=str(self.folder), use_cpu=True)
        if self.module.method == "soft":
            self._prepare(self.teacher, self.data.problems)
            try:
                check_shared_vocabulary(self.teacher.policy.tokenizer, self.module.policy.tokenizer)
            except UserError as error:
                found = str(error).partition("found ")[2].partition(". Take")[0]
                raise UserError(
                    "policy.name",
                    "a student with the teacher's vocabulary for {method} soft",
                    str(found),
                    "Take a student of the same family, or a way to learn from text: sft, preference or weighted.",
                ) from error

    def _prepare(self, module: Decoding, problems: Sequence[Problem]) -> None:
        try:
            module.prepare(self.device, problems)
        except UserError as error:
            raise UserError(in_teacher(str(error))) from error

    # Making the data

    def make_data(self) -> None:
        """Decode, where no results are given, and write the set that is learned from."""
        folder, module, data = self.folder / "data", self.module, self.data
        if (folder / "train.jsonl").is_file():
            return
        if data.results is not None:
            results = read_results(data.results, self.teacher.decoder_names[0])[: data.limit]
        else:
            results = self.decode(folder / "decode", self.teacher, data.problems)
        kept, counts = select_results(results, data.filters, data.extract, data.refused)
        rows = build_rows(module.method, kept, counts, beta=self.teacher.beta)
        flops, target_flops = sum(result["cost"]["flops"] for result in results), 0.0
        if module.method == "soft":
            rows, target_flops = add_soft_targets(
                rows, self.teacher.policy, self.teacher.reward, beta=self.teacher.beta,
                alternatives=module.alternatives,
            )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        made = {
            "counts": dict(counts), "decoded": len(results), "decode_flops": flops, "target_flops": target_flops,
            "decode_seconds": sum(result["seconds"] for result in results),
            "accuracy": share([result["correct"] for result in results]),
        }  # fmt: skip
        write_atomically(folder / "made.json", json.dumps(made, indent=2) + "\n")
        title = f"Answers of {self.config['teacher']['policy']['name']} with {self.teacher.decoder_names[0]}"
        write_set(folder, rows, counts, title=title)

    def decode(
        self,
        folder: Path,
        module: Decoding,
        problems: Sequence[Problem],
        *,
        policy: Policy | None = None,
    ) -> list[Row]:
        """The results of some problems in a folder of their own: those that are there are not decoded again."""
        data = self.config["data"]
        if problems is self.data.held_out:
            data = {name: data[name] for name in HELD_OUT}
        run = RunFolder(folder, {"teacher": self.config["teacher"], "data": data})
        names = module.decoder_names
        ids = [problem.id for problem in problems]
        if not any(run.missing(ids, name) for name in names):
            return run.merge(ids, names)
        if module.policy is None:
            self._prepare(module, problems)
        if policy is not None:
            module.policy = policy
        module.run_folder = run
        data = self.data.to_decode(problems)
        cuda = self.device.type == "cuda"
        trainer = Trainer(
            accelerator="gpu" if cuda else "cpu", devices=[self.device.index or 0] if cuda else 1,
            inference_mode=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[DecodingProgress(data, [(None, module)])],
        )  # fmt: skip
        trainer.predict(module, datamodule=data, return_predictions=False)
        finish(module, data, run, Console(file=StringIO()))
        return [run.rows[key, name] for key in ids for name in names]

    # Learning

    def learn(self) -> None:
        """Train the adapter, go back to the best of it, and save it."""
        if self.engine == "trl":
            from nabla_rl.distillation.trl_engine import fit_with_trl

            fit_with_trl(self.module, self.folder)
        else:
            fit(self.module, self.trainer, self.folder)
        if self.trainer.is_global_zero:
            self.module.restore_best()
            self.module.adapter.save(self.folder / "adapter", "", section="training")

    # Measuring

    def measure(self) -> dict[str, Any]:
        """Held-out figures of teacher and student, what it all cost, and where it has paid for itself."""
        module, problems, eval_folder = self.module, self.data.held_out, self.folder / "eval"
        flops, seconds = module.all_flops, module.seconds
        name = self.teacher.decoder_names[0]
        names = list(dict.fromkeys(["greedy", name]))
        rows = {"teacher": self.decode(eval_folder / "teacher", self.teacher.with_decoders(names), problems)}
        options = module.options
        if self.student_is_teacher:
            rows["before"] = [row for row in rows["teacher"] if row["decoder"] == "greedy"]
        else:
            rows["before"] = self._decode_student(eval_folder / "before", options)
        # as a user will have it: merged into the weights, at the cost that it has then
        merged = PolicyOptions(**{**vars(options), "adapter": str(self.folder / "adapter")})
        rows["after"] = self._decode_student(eval_folder / "student", merged)
        figures = {
            "teacher_greedy": figures_of([row for row in rows["teacher"] if row["decoder"] == "greedy"]),
            "teacher": figures_of([row for row in rows["teacher"] if row["decoder"] == name]),
            "before": figures_of(rows["before"]),
            "after": figures_of(rows["after"]),
        }
        made = json.loads((self.folder / "data" / "made.json").read_text(encoding="utf-8"))
        curve = amortise(
            fixed=made["decode_flops"] + made["target_flops"] + flops,
            student=figures["after"]["flops"], teacher=figures["teacher"]["flops"],
            student_accuracy=figures["after"]["accuracy"], teacher_accuracy=figures["teacher"]["accuracy"],
        )  # fmt: skip
        summary: dict[str, Any] = {
            "method": module.method,
            "engine": self.engine,
            "teacher": {"policy": self.config["teacher"]["policy"]["name"], "decoder": name},
            "student": options.name,
            "problems": len(problems),
            "split": self.config["data"]["eval_split"] if self.config["data"]["path"] is None else None,
            "beta": self.teacher.beta,
            "data": made,
            "training": {
                "flops": flops, "seconds": seconds, "num_tokens": module.all_tokens,
                "steps": module.training_config.max_steps,
                "best_step": None if module.best is None else module.best["step"],
                "validation_accuracy": None if module.best is None else module.best["accuracy"],
                "trainable_weights": module.adapter.num_weights,
            },
            "figures": figures,
            "comparisons": compare(rows, name),
            "amortisation": curve,
            "peak_memory_mb": peak_memory_mb(self.device),
            "versions": versions(),
        }  # fmt: skip
        figure = draw_amortisation(curve)
        write_atomically(self.folder / "amortisation.svg", svg_text(figure))
        write_atomically(self.folder / "amortisation.png", png_bytes(figure))
        (self.folder / "adapter" / "README.md").write_text(model_card(summary, self.config), encoding="utf-8")
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _decode_student(self, folder: Path, options: PolicyOptions) -> list[Row]:
        """The student's greedy answers to the held-out problems, judged as the teacher's are."""
        policy = load_policy(options, family=self.module.family, device=self.device)
        return self.decode(folder, self.teacher.with_decoders(["greedy"]), self.data.held_out, policy=policy)


def share(values: Sequence[Any]) -> float | None:
    """The mean of what is known."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def figures_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy with its standard error, and means over problems."""
    accuracy = share([row["correct"] for row in rows])
    count = sum(row["correct"] is not None for row in rows)
    return {
        "accuracy": accuracy,
        "accuracy_error": None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / count),
        "reward": share([row["reward"] for row in rows]),
        "gold_reward": share([row["gold_reward"] for row in rows]),
        "flops": share([row["cost"]["flops"] for row in rows]),
        "seconds": share([row["seconds"] for row in rows]),
    }


def compare(rows: Mapping[str, Sequence[Row]], decoder: str) -> dict[str, Any]:
    """Paired differences of accuracy with 95% bootstrap intervals over problems, and how much of the way from the
    student's greedy answers to the teacher's it has gone: of the decoder's gain, if the two are the same model."""
    right = {
        "teacher": [row["correct"] for row in rows["teacher"] if row["decoder"] == decoder],
        "teacher_greedy": [row["correct"] for row in rows["teacher"] if row["decoder"] == "greedy"],
        "before": [row["correct"] for row in rows["before"]],
        "after": [row["correct"] for row in rows["after"]],
    }
    known = [place for place, value in enumerate(right["after"]) if value is not None]
    if not known:
        return {}
    values = {name: torch.tensor([each[place] for place in known]).double() for name, each in right.items()}
    differences = {}
    for first, second in (("after", "before"), ("after", "teacher_greedy"), ("after", "teacher")):
        generator = seeded_generator(0, "paired", first, second)
        found = paired_difference(values[first][:, None], values[second][:, None], generator=generator)
        keys = ("difference", "low", "high")
        differences[f"{first} - {second}"] = dict(zip(keys, (float(value) for value in found), strict=True))
    recovered = recovered_share(values["before"], values["after"], values["teacher"])
    return {**differences, "recovered": recovered}


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


def model_card(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The README.md of an adapter: what it learned from, how, and what came of it."""
    data, made, training = config["data"], summary["data"], summary["training"]
    embedded = "" if "/" in summary["student"] else f" (embedded, {data['family']})"
    problems = data["path"] or f"the tiny world's {data['family']} problems, train split"
    teacher = f"{summary['teacher']['policy']} with {summary['teacher']['decoder']}"
    fell = ", ".join(f"{name} {count}" for name, count in made["counts"].items())
    crossing = summary["amortisation"]["crossing"]
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {summary['student']}",
        f"tags: [lora, distillation, {summary['method']}, trl, nabla_rl]",
        "---",
        "",
        f"# A LoRA adapter of {summary['student']}{embedded}",
        "",
        f"Trained by `nabla-rl distill` ({summary['method']}, engine {summary['engine']}) on answers of {teacher}.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {made['decoded']} decoded of {problems}: {fell} |",
        f"| reward | {config['teacher']['reward']['name']}, β = {summary['beta']} |",
        f"| steps | {training['steps']} (kept: {training['best_step'] or 'the last'}) |",
        f"| cost | data {made['decode_flops'] + made['target_flops']:.3e}, training {training['flops']:.3e} FLOPs |",
        f"| pays for itself | {'never' if crossing is None else f'after {crossing:,.0f} questions'} |",
        f"| versions | {', '.join(f'{name} {number}' for name, number in summary['versions'].items())} |",
        "",
        f"Held-out figures ({summary['problems']} problems, greedy but for the teacher's decoder):",
        "",
        "| | accuracy | FLOPs a question |",
        "|---|---|---|",
    ]
    for name, row in summary["figures"].items():
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f} ± {row['accuracy_error']:.3f}"
        lines.append(f"| {name.replace('_', ' ')} | {accuracy} | {row['flops']:.3e} |")
    return "\n".join([*lines, ""])
