"""Distillation as a function: decode a training set, learn from it, measure, save the adapter with its card.

Each stage leaves its files in the run folder, and is not done again where they are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from nabla_rl.adapters.run import Engine, build_trainer, claim_folder, fit, interruptible, peak_memory_mb, versions
from nabla_rl.data.problems import Grader, Problem, as_problems
from nabla_rl.decoding import Greedy
from nabla_rl.decoding.base import AbstractDecoder, Decoded
from nabla_rl.decoding.module import DecodingModule
from nabla_rl.decoding.run import Job, batches, build_decoder, embedded_family, plain
from nabla_rl.distillation.config import DistillConfig
from nabla_rl.distillation.data import DistillationData
from nabla_rl.distillation.distiller import PolicyDistiller
from nabla_rl.distillation.rows import (
    Filters,
    Method,
    Row,
    build_rows,
    read_results,
    read_set,
    select_results,
    write_set,
)
from nabla_rl.distillation.soft_targets import add_soft_targets
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Cost
from nabla_rl.metrics.paired import paired_difference
from nabla_rl.models.adapters import LoraOptions
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.report.amortisation import amortise, draw_amortisation, recovered_share
from nabla_rl.report.decoded import finish
from nabla_rl.report.frontier import png_bytes
from nabla_rl.report.html import svg_text
from nabla_rl.rewards.base import AbstractReward, check_shared_vocabulary
from nabla_rl.rewards.loading import load_reward
from nabla_rl.run_folder import RunFolder, write_atomically
from nabla_rl.types import UserError

HELD_OUT = ("family", "path", "eval_path", "eval_split", "eval_limit", "problem_seed", "answers", "skip_bad")
"""Options of the data that decide which problems are held out."""
BATCH = 64
"""Problems that are decoded side by side."""

Watch = Callable[[str, int, int], None]
"""Told what is being decoded, how many problems of it are done, and of how many."""


@dataclass(frozen=True)
class Distilled:
    """A finished distillation.

    Attributes:
        adapter: Folder of the student's PEFT adapter.
        summary: Held-out figures of teacher and student, what it all cost, and after how many questions it pays.
        folder: The run folder.
    """

    adapter: Path
    summary: dict[str, Any]
    folder: Path


class Teacher(DecodingModule):
    """What answers the training problems: the options of the decode command, with one decoder."""

    def __init__(self, **options: Any):
        try:
            super().__init__(**options)
            if len(self.decoders) != 1:
                raise UserError("decoders", "one decoder to learn from", str(self.decoder_names))
        except UserError as error:
            raise error.within("teacher") from error

    def load(self, device: torch.device, data: Any) -> Job:
        """The models, once they are needed."""
        if self.job is None:
            try:
                self.prepare(device, data)
            except UserError as error:
                raise error.within("teacher") from error
        assert self.job is not None
        return self.job


@dataclass
class Distillation:
    """A run: its parts, and its stages in order.

    Attributes:
        module: What trains the student.
        data: The problems, and what is held out.
        trainer: Lightning's trainer.
        folder: The run folder.
        config: What decides the results, as plain values.
        teacher: The options of who answers, or None where answers are given and nothing is decoded.
        job: The teacher's loaded models, where they were handed over.
        answers: Results to learn from in place of decoding.
        engine: Who trains.
        callbacks: Lightning callbacks of the training.
        watch: Told how decoding advances.
    """

    module: PolicyDistiller
    data: DistillationData
    trainer: L.Trainer
    folder: Path
    config: Mapping[str, Any]
    teacher: Teacher | None = None
    job: Job | None = None
    decoder: AbstractDecoder | None = None
    answers: list[Row] | None = None
    engine: Engine = "lightning"
    callbacks: Sequence[L.Callback] = ()
    watch: Watch = lambda what, done, total: None

    def __post_init__(self) -> None:
        """The decoder is the teacher's, where there is one."""
        if self.teacher is not None:
            (self.decoder,) = self.teacher.decoders.values()

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.trainer.strategy.root_device

    @property
    def beta(self) -> float:
        """β of the energy that the teacher's answers lower."""
        return self.teacher.beta if self.teacher is not None else self.job.beta if self.job is not None else 1.0

    def teacher_job(self) -> Job | None:
        """The teacher's models; None where there are only answers."""
        if self.job is None and self.teacher is not None:
            self.job = self.teacher.load(self.device, self.data.to_decode(self.data.held_out))
        return self.job

    def run(self) -> Distilled:
        """All stages; the first process alone measures."""
        self.check()
        if self.trainer.is_global_zero:
            self.make_data()
        else:  # torchrun starts all processes at once
            while not (self.folder / "data" / "train.jsonl").is_file():
                time.sleep(1.0)
        self.module.learn_from(read_set(self.folder / "data"))
        self.learn()
        summary = self.measure() if self.trainer.is_global_zero else {}
        return Distilled(self.folder / "adapter", summary, self.folder)

    def check(self) -> None:
        """Load the student, and refuse what cannot work before anything is decoded."""
        self.module.run_dir = self.folder
        if self.module.policy is None:
            self.module.prepare(self.device, self.data)
        if self.engine == "trl":
            self.module.training_config.to_trl(self.module.method, output_dir=str(self.folder), use_cpu=True)
        if self.module.method == "soft":
            job = self.teacher_job()
            if job is None:
                raise UserError("method", "sft, preference or weighted without a teacher", "soft")
            assert self.module.policy is not None
            try:
                check_shared_vocabulary(job.policy.tokenizer, self.module.policy.tokenizer)
            except UserError as error:
                raise UserError(
                    "policy.name",
                    "a student with the teacher's vocabulary for {method} soft",
                    error.found,
                    "Take a student of the same family, or a way to learn from text: sft, preference or weighted.",
                ) from error

    # Making the data

    def make_data(self) -> None:
        """Decode, where no results are given, and write the set that is learned from."""
        folder, module, data = self.folder / "data", self.module, self.data
        if (folder / "train.jsonl").is_file():
            return
        name = self.decoder.name if self.decoder is not None else None
        if self.answers is not None:
            results = self.answers
        elif data.results is not None:
            results = read_results(data.results, name)[: data.limit]
        else:
            assert self.decoder is not None
            results = self.decode(folder / "decode", [self.decoder], data.problems)
        kept, counts = select_results(results, data.filters, data.extract, data.refused)
        rows = build_rows(module.method, kept, counts, beta=self.beta)
        flops, target_flops = sum(result["cost"]["flops"] for result in results), 0.0
        if module.method == "soft":
            job = self.teacher_job()
            assert job is not None
            rows, target_flops = add_soft_targets(
                rows, job.policy, job.reward, beta=self.beta, alternatives=module.alternatives
            )
        folder.mkdir(parents=True, exist_ok=True)
        made = {
            "counts": dict(counts), "decoded": len(results), "decode_flops": flops, "target_flops": target_flops,
            "decode_seconds": sum(result["seconds"] for result in results),
            "accuracy": share([result["correct"] for result in results]),
        }  # fmt: skip
        write_atomically(folder / "made.json", json.dumps(made, indent=2) + "\n")
        title = f"Answers of {self.teacher_name} with {name or 'a decoder'}"
        write_set(folder, rows, counts, title=title)

    @property
    def teacher_name(self) -> str:
        """The policy that answered."""
        if self.teacher is not None:
            return self.teacher.policy_options.name
        return "a policy" if self.job is None else str(self.job.policy.backbone.model.name_or_path)

    def decode(
        self,
        folder: Path,
        decoders: Sequence[AbstractDecoder],
        problems: Sequence[Problem],
        *,
        policy: Policy | None = None,
    ) -> list[Row]:
        """The results of some problems in a folder of their own: those that are there are not decoded again."""
        data = self.config.get("data") or {}
        if problems is self.data.held_out:
            data = {name: data[name] for name in HELD_OUT if name in data}
        run = RunFolder(folder, {"teacher": self.config.get("teacher"), "data": data})
        names, ids = [decoder.name for decoder in decoders], [problem.id for problem in problems]
        if any(run.missing(ids, name) for name in names):
            job = self.teacher_job() or self.student_job()
            if policy is not None:
                job = replace(job, policy=policy)
            done = 0
            for batch in batches(problems, BATCH):
                for decoder in decoders:
                    if run.missing([problem.id for problem in batch], decoder.name):
                        run.append(job.lines(decoder, batch, config=run.config_hash))
                done += len(batch)
                self.watch(folder.name, done, len(problems))
        finish(run, ids, names)
        return [run.rows[key, name] for key in ids for name in names]

    def student_job(self) -> Job:
        """The student by itself, where there is no teacher."""
        sampling = Sampling(0.0, 1.0, self.module.longest)
        return Job(self.module.policy, sampling=sampling, extract=self.data.extract, grade=self.data.grade)

    # Learning

    def learn(self) -> None:
        """Train the adapter, go back to the best of it, and save it."""
        if self.engine == "trl":
            from nabla_rl.distillation.trl_engine import fit_with_trl

            fit_with_trl(self.module, self.folder)
        else:
            fit(self.module, self.trainer, self.folder, self.callbacks)
        if self.trainer.is_global_zero:
            self.module.restore_best()
            self.module.adapter.save(self.folder / "adapter", "", section="training")

    # Measuring

    def measure(self) -> dict[str, Any]:
        """Held-out figures of teacher and student, what it all cost, and where it has paid for itself."""
        module, problems, eval_folder = self.module, self.data.held_out, self.folder / "eval"
        flops, seconds, job = module.all_flops, module.seconds, self.teacher_job()
        options, rows = module.options, {}
        name = "answers given" if self.decoder is None else self.decoder.name
        if job is not None and self.decoder is not None:
            decoders = list({decoder.name: decoder for decoder in (Greedy(), self.decoder)}.values())
            rows["teacher"] = self.decode(eval_folder / "teacher", decoders, problems)
        if "teacher" in rows and self.student_is_teacher:
            rows["before"] = [row for row in rows["teacher"] if row["decoder"] == "greedy"]
        else:
            rows["before"] = self._decode_student(eval_folder / "before", options)
        # as a user will have it: merged into the weights, at the cost that it has then
        merged = replace(options, adapter=str(self.folder / "adapter"))
        rows["after"] = self._decode_student(eval_folder / "student", merged)
        figures = {
            "before": figures_of(rows["before"]),
            "after": figures_of(rows["after"]),
        }
        if "teacher" in rows:
            of = {key: [row for row in rows["teacher"] if row["decoder"] == key] for key in ("greedy", name)}
            figures = {"teacher_greedy": figures_of(of["greedy"]), "teacher": figures_of(of[name]), **figures}
        made = json.loads((self.folder / "data" / "made.json").read_text(encoding="utf-8"))
        curve = None
        if "teacher" in figures:
            curve = amortise(
                fixed=made["decode_flops"] + made["target_flops"] + flops,
                student=figures["after"]["flops"], teacher=figures["teacher"]["flops"],
                student_accuracy=figures["after"]["accuracy"], teacher_accuracy=figures["teacher"]["accuracy"],
            )  # fmt: skip
        summary: dict[str, Any] = {
            "method": module.method,
            "engine": self.engine,
            "teacher": {"policy": self.teacher_name, "decoder": name},
            "student": options.name,
            "problems": len(problems),
            "beta": self.beta,
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
        if curve is not None:
            figure = draw_amortisation(curve)
            write_atomically(self.folder / "amortisation.svg", svg_text(figure))
            write_atomically(self.folder / "amortisation.png", png_bytes(figure))
        write_atomically(self.folder / "adapter" / "README.md", model_card(summary, self.config))
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    @property
    def student_is_teacher(self) -> bool:
        """Whether the student's weights are the teacher's."""
        return self.teacher is not None and self.teacher.policy_options == self.module.options

    def _decode_student(self, folder: Path, options: PolicyOptions) -> list[Row]:
        """The student's greedy answers to the held-out problems, judged as the teacher's are."""
        policy = load_policy(options, device=self.device)
        return self.decode(folder, [Greedy()], self.data.held_out, policy=policy)


def distill(
    answers: Sequence[Decoded] | Sequence[str | Problem] | str | Path,
    student: str | PolicyOptions,
    *,
    folder: str | Path,
    policy: str | PolicyOptions | Policy | None = None,
    reward: str | RewardOptions | AbstractReward | None = None,
    decoder: str | type[AbstractDecoder] | AbstractDecoder = "edit_search",
    beta: float = 1.0,
    sampling: Sampling | None = None,
    method: Method = "sft",
    training: DistillConfig | None = None,
    lora: LoraOptions | None = None,
    filters: Filters | None = None,
    held_out: str | Path | Sequence[str | Problem] | None = None,
    validation: Sequence[str | Problem] | None = None,
    eval_limit: int = 200,
    max_completion_length: int | None = None,
    grade: Grader | None = None,
    seed: int = 0,
    engine: Engine = "lightning",
    callbacks: Sequence[L.Callback] = (),
    device: torch.device | str | None = None,
) -> Distilled:
    """Carry what decoding found into a LoRA adapter of the same or a lighter model.

    The same call resumes a run that was interrupted, and returns a finished one as it is.

    Args:
        answers: What `nabla_rl.decode` gave, or problems to be decoded by `policy` first (texts, `Problem`s, a JSONL
            file), or the folder of a decode run.
        student: A folder, a Hub name or an embedded model whose adapter is trained.
        folder: Run folder for the data, checkpoints, the adapter and the summary.
        policy: The teacher's policy; with it the summary compares teacher and student.
        reward: The teacher's reward model.
        decoder: The teacher's decoder.
        beta: KL coefficient β of the teacher's energy.
        sampling: How the teacher's rollouts are drawn; None is `Sampling()`.
        method: sft, preference, soft or weighted.
        training: Settings of the training, in TRL's words.
        lora: Settings of the adapter, in PEFT's words.
        filters: Which answers are learned from; None accepts rewards above 0 where there are rewards, else all.
        held_out: Problems to measure on; None is every fifth of the problems, or the embedded family's test problems.
        validation: Problems that the best weights are chosen by; None keeps the last weights.
        eval_limit: Maximum number of held-out problems.
        max_completion_length: Maximum tokens of the student's answers; None is its own generation setting, or 512.
        grade: Says whether a completion is right; None is the family's, or math-verify.
        seed: Random seed.
        engine: Who trains: "lightning" (this package) or "trl".
        callbacks: Further Lightning callbacks.
        device: Where models given by name are loaded; None is the GPU where there is one.

    Raises:
        UserError: Something given cannot be used; the message says what and why.
    """
    settings = training or DistillConfig()
    options = student if isinstance(student, PolicyOptions) else PolicyOptions(student)
    family = embedded_family(options)
    trainer = build_trainer(settings, device=device)
    given, asked = _given(answers)
    loaded = load_policy(options, device=trainer.strategy.root_device)
    module = PolicyDistiller(
        options, method, training=settings, lora=lora or LoraOptions(), family=family or "words", seed=seed,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    some = Filters(accept=["reward"] if reward is not None else []) if filters is None else filters
    data = DistillationData.of(
        asked, None if held_out is None else as_problems(held_out), family=family, eval_limit=eval_limit,
        grade=grade, seed=seed,
    )  # fmt: skip
    data.learn_from(filters=some, validation=[] if validation is None else as_problems(validation))
    chosen = build_decoder(decoder)
    config = {
        "policy": options.name,
        "method": method,
        "beta": beta,
        "decoder": chosen.name,
        "training": plain(asdict(settings)),
        "lora": plain(asdict(module.lora)),
        "filters": plain(asdict(some)),
        "seed": seed,
        "engine": engine,
    }
    done = read_finished(Path(folder), config)
    if done is not None:
        return done
    job = None
    if policy is not None:
        teacher = policy if isinstance(policy, Policy) else load_policy(policy, device=trainer.strategy.root_device)
        job = Job(
            teacher,
            reward if isinstance(reward, AbstractReward) else load_reward(reward, device=trainer.strategy.root_device),
            beta=beta,
            sampling=sampling or Sampling(),
            seed=seed,
            extract=data.extract,
            grade=data.grade,
        )
        job.check([*data.problems, *data.held_out])
    elif given is None:
        raise UserError("policy", "a policy that answers the problems, or answers", "neither")
    module.use(loaded, data, base_name=None)
    run = Distillation(
        module, data, trainer, Path(folder), config, job=job, decoder=chosen if job is not None else None,
        answers=given, engine=engine, callbacks=callbacks,
    )  # fmt: skip
    with interruptible():
        return run.run()


def _given(answers: Any) -> tuple[list[Row] | None, list[Problem]]:
    """The results that are learned from, None where there are only problems, and the problems they are of."""
    if isinstance(answers, (str, Path)) and (Path(answers) / "results.jsonl").is_file():
        rows = read_results([answers])
        return rows, [Problem(row["id"], row["prompt"], row.get("expected")) for row in rows]
    if not isinstance(answers, (str, Path)) and answers and all(isinstance(one, Decoded) for one in answers):
        return [result_of(one) for one in answers], [one.problem for one in answers if one.problem is not None]
    return None, as_problems(answers)


def result_of(answer: Decoded) -> Row:
    """An answer as the line of results.jsonl that learning needs."""
    if answer.problem is None:
        raise UserError("answers", "answers that `nabla_rl.decode` gave", f"{answer.problem_id!r} without its problem")
    cost = answer.cost or Cost()
    return {
        "id": answer.problem_id,
        "decoder": "given",
        "prompt": answer.problem.problem,
        "expected": answer.problem.answer,
        "completion": answer.text,
        "finished": answer.finished,
        "reward": answer.reward,
        "correct": None,
        "rollouts": [{"text": c.text, "reward": c.reward, "logps": c.logps} for c in answer.rollouts],
        "cost": {"flops": cost.flops},
        "seconds": cost.seconds,
    }


def read_finished(folder: Path, config: Mapping[str, Any]) -> Distilled | None:
    """The run that the folder holds, where it is finished; a run of another configuration is refused."""
    claim_folder(folder, config)
    if not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Distilled(folder / "adapter", summary, folder)


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
        "teacher": [row["correct"] for row in rows.get("teacher", ()) if row["decoder"] == decoder],
        "teacher_greedy": [row["correct"] for row in rows.get("teacher", ()) if row["decoder"] == "greedy"],
        "before": [row["correct"] for row in rows["before"]],
        "after": [row["correct"] for row in rows["after"]],
    }
    known = [place for place, value in enumerate(right["after"]) if value is not None]
    if not known:
        return {}
    right = {name: each for name, each in right.items() if each}
    values = {name: torch.tensor([each[place] for place in known]).double() for name, each in right.items()}
    differences = {}
    for first, second in (("after", "before"), ("after", "teacher_greedy"), ("after", "teacher")):
        if second not in values:
            continue
        generator = seeded_generator(0, "paired", first, second)
        found = paired_difference(values[first][:, None], values[second][:, None], generator=generator)
        keys = ("difference", "low", "high")
        differences[f"{first} - {second}"] = dict(zip(keys, (float(value) for value in found), strict=True))
    if "teacher" not in values:
        return differences
    recovered = recovered_share(values["before"], values["after"], values["teacher"])
    return {**differences, "recovered": recovered}


def model_card(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The README.md of an adapter: what it learned from, how, and what came of it."""
    data, made, training = config.get("data") or {}, summary["data"], summary["training"]
    problems = data.get("path") or (
        f"the tiny world ({data['family']})" if "family" in data else "the caller's problems"
    )
    teacher = f"{summary['teacher']['policy']} with {summary['teacher']['decoder']}"
    fell = ", ".join(f"{name} {count}" for name, count in made["counts"].items())
    pays = None if summary["amortisation"] is None else summary["amortisation"]["crossing"]
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {summary['student']}",
        f"tags: [lora, distillation, {summary['method']}, trl, nabla_rl]",
        "---",
        "",
        f"# A LoRA adapter of {summary['student']}",
        "",
        f"Trained by `nabla-rl distill` ({summary['method']}, engine {summary['engine']}) on answers of {teacher}.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {made['decoded']} decoded of {problems}: {fell} |",
        f"| β | {summary['beta']} |",
        f"| steps | {training['steps']} (kept: {training['best_step'] or 'the last'}) |",
        f"| cost | data {made['decode_flops'] + made['target_flops']:.3e}, training {training['flops']:.3e} FLOPs |",
        f"| pays for itself | {'never' if pays is None else f'after {pays:,.0f} questions'} |",
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
