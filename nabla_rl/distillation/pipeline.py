"""Distillation as a function: decode a training set, learn from it, measure, save the adapter with its card.

Each stage leaves its files in the run folder, and is not done again where they are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from nabla_rl.adapters.progress import DecodingBar, TrainingProgress
from nabla_rl.adapters.run import (
    Engine,
    build_trainer,
    check_logger,
    claim_folder,
    fingerprint,
    fit,
    interruptible,
    named,
    peak_memory_mb,
    versions,
)
from nabla_rl.data.problems import Grader, Problem, as_problems
from nabla_rl.decoding import Greedy
from nabla_rl.decoding.base import AbstractDecoder, Decoded, check_beta
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
from nabla_rl.models.adapters import LoraOptions, merge_adapter
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_policy, resolve_name
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


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


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
        teacher: The options of who answers; None where loaded models or answers are handed over.
        job: The teacher's loaded models.
        decoder: The teacher's decoder; None without a teacher.
        student: The student, where it is handed over loaded; None loads it by its name.
        answers: Results to learn from, in place of decoding.
        beta: β of the energy that the answers lower; a teacher brings its own.
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
    student: Policy | None = None
    answers: list[Row] | None = None
    beta: float = 1.0
    engine: Engine = "lightning"
    callbacks: Sequence[L.Callback] = ()
    watch: Watch = silent

    def __post_init__(self) -> None:
        """Take decoder and β from the teacher, where there is one."""
        if self.teacher is not None:
            (self.decoder,) = self.teacher.decoders.values()
            self.beta = self.teacher.beta

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.trainer.strategy.root_device

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
        title = "Given answers" if name is None else f"Answers of {self.teacher_name} with {name}"
        write_set(folder, rows, counts, title=title)

    @property
    def teacher_name(self) -> str:
        """The policy that answered."""
        if self.teacher is not None:
            return self.teacher.policy_options.name
        return "" if self.job is None else str(named(self.job.policy))

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
        rows: dict[str, list[Row]] = {}
        name = "" if self.decoder is None else self.decoder.name
        if job is not None and self.decoder is not None:
            decoders = list({decoder.name: decoder for decoder in (Greedy(), self.decoder)}.values())
            rows["teacher"] = self.decode(eval_folder / "teacher", decoders, problems)
        if "teacher" in rows and self.student_is_teacher:
            rows["before"] = [row for row in rows["teacher"] if row["decoder"] == "greedy"]
        else:
            rows["before"] = self._decode_student(eval_folder / "before")
        # as a user will have it: merged into the weights, at the cost that it has then
        rows["after"] = self._decode_student(eval_folder / "student", adapter=str(self.folder / "adapter"))
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
            "teacher": {"policy": self.teacher_name, "decoder": name} if name else None,
            "student": module.options.name,
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

    def _decode_student(self, folder: Path, *, adapter: str | None = None) -> list[Row]:
        """The student's greedy answers to the held-out problems, judged as the teacher's are."""
        if self.student is None:
            policy = load_policy(replace(self.module.options, adapter=adapter), device=self.device)
        else:
            policy = self.student if adapter is None else with_adapter(self.student, adapter)
        return self.decode(folder, [Greedy()], self.data.held_out, policy=policy)


def with_adapter(policy: Policy, folder: str) -> Policy:
    """A copy of the policy with a saved adapter merged into its weights."""
    model = merge_adapter(deepcopy(policy.backbone.model), folder, argument="adapter")
    return Policy(model, policy.tokenizer, system_prompt=policy.system_prompt)


def distill(
    answers: Sequence[Decoded] | Sequence[str | Problem] | Sequence[Path] | str | Path,
    student: str | PolicyOptions | Policy,
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
    validation: str | Path | Sequence[str | Problem] | None = None,
    eval_limit: int = 200,
    max_completion_length: int | None = None,
    gold: str | RewardOptions | AbstractReward | None = None,
    grade: Grader | None = None,
    seed: int = 0,
    engine: Engine = "lightning",
    callbacks: Sequence[L.Callback] = (),
    progress: bool = False,
    device: torch.device | str | None = None,
) -> Distilled:
    """Carry what decoding found into a LoRA adapter of the same or a lighter model.

    The same call resumes a run that was interrupted, and returns a finished one as it is.

    Args:
        answers: What `nabla_rl.decode` returned; or the folders or results.jsonl files of decode runs; or problems
            that `policy` answers first, as texts, `Problem`s or a JSONL file.
        student: A folder, a Hub name, an embedded model such as "words/tiny-student", or a loaded policy, which is
            left as it was.
        folder: Run folder for the data, checkpoints, the adapter and the summary.
        policy: The teacher's policy; with it the summary compares teacher and student.
        reward: The teacher's reward model.
        decoder: The teacher's decoder.
        beta: KL coefficient β of the teacher's energy.
        sampling: How the teacher's rollouts are drawn; None is `Sampling()`.
        method: sft, preference, soft or weighted.
        training: Settings of the training, in TRL's words.
        lora: Settings of the adapter, in PEFT's words.
        filters: Which answers are learned from; None accepts rewards of at least 0 where there are rewards, else all.
        held_out: Problems to measure on; None is every fifth of the problems, which is not learned from.
        validation: Problems that the best weights are chosen by; None keeps the last weights.
        eval_limit: Maximum number of held-out problems.
        max_completion_length: Maximum tokens of the student's answers; None is that of `sampling`, or the student's
            own generation setting, or 512.
        gold: A second reward model that no decoder sees, for comparison.
        grade: Says whether a completion is right; None is the embedded family's, or math-verify.
        seed: Random seed.
        engine: Who trains: "lightning" (this package) or "trl".
        callbacks: Further Lightning callbacks.
        progress: Show progress bars on standard error.
        device: Where models given by name are loaded; None is the GPU where there is one.

    Raises:
        UserError: Something given cannot be used; the message says what and why.
    """
    check_beta(beta)
    settings, drawn, chosen = training or DistillConfig(), sampling or Sampling(), build_decoder(decoder)
    options = student if isinstance(student, PolicyOptions) else PolicyOptions(named(student))
    family = embedded_family(options)
    module = PolicyDistiller(
        options, method, training=settings, lora=lora or LoraOptions(), family=family or "words", seed=seed,
        max_completion_length=drawn.max_new_tokens if max_completion_length is None else max_completion_length,
    )  # fmt: skip
    given = read_answers(answers, chosen.name)
    if given is None and policy is None:
        raise UserError("policy", "a policy that answers the problems, or answers in their place", "neither")
    asked = as_problems(answers) if given is None else problems_of(given)  # pyright: ignore
    data = DistillationData.of(
        asked, None if held_out is None else as_problems(held_out, argument="held_out"), family=family,
        eval_limit=eval_limit, grade=grade, seed=seed,
    )  # fmt: skip
    given = None if given is None else [graded(row, data.grade) for row in given]
    rewarded = reward is not None if given is None else any(row["reward"] is not None for row in given)
    some = Filters(accept=["reward"] if rewarded else []) if filters is None else filters
    held = [] if validation is None else as_problems(validation, argument="validation")
    data.learn_from(filters=some, validation=held)
    config = {
        "student": named(student),
        "policy": named(policy),
        "reward": named(reward),
        "gold": named(gold),
        "answers": None if given is None else fingerprint([row["id"], row["completion"]] for row in given),
        "problems": fingerprint(asked),
        "held_out": fingerprint(data.held_out),
        "validation": fingerprint(held),
        "decoder": None if policy is None else plain({chosen.name: asdict(chosen)}),  # pyright: ignore
        "beta": beta,
        "sampling": asdict(drawn),
        "method": method,
        "training": plain(asdict(settings)),
        "lora": plain(asdict(module.lora)),
        "filters": plain(asdict(some)),
        "max_completion_length": max_completion_length,
        "seed": seed,
        "engine": engine,
    }
    check_logger(settings.report_to, settings.section)
    done = read_finished(Path(folder), config)
    if done is not None:
        return done
    trainer = build_trainer(settings, device=student.device if isinstance(student, Policy) else device)
    where, job = trainer.strategy.root_device, None
    if policy is not None:
        teacher = policy if isinstance(policy, Policy) else load_policy(policy, device=where)
        judges = [
            each if isinstance(each, AbstractReward) else load_reward(each, device=where, argument=role)
            for role, each in (("reward", reward), ("gold", gold))
        ]
        longest = drawn.max_new_tokens or teacher.max_new_tokens
        job = Job(
            teacher, *judges, beta=beta, sampling=replace(drawn, max_new_tokens=longest), seed=seed,
            extract=data.extract, grade=data.grade,
        )  # fmt: skip
        job.check([*data.problems, *data.held_out])
    # a copy, since the adapter goes into the weights: what was handed over may be the teacher's policy, too
    trained = (
        deepcopy(student) if isinstance(student, Policy) else load_policy(options, device=where, argument="student")
    )
    module.use(trained, data, base_name=resolve_name(options.name))
    bar = DecodingBar()
    run = Distillation(
        module, data, trainer, Path(folder), config, job=job, decoder=None if job is None else chosen,
        student=student if isinstance(student, Policy) else None, answers=given, beta=beta, engine=engine,
        callbacks=[*([TrainingProgress()] if progress and engine == "lightning" else []), *callbacks],
        watch=bar.show if progress else silent,
    )  # fmt: skip
    with bar, interruptible():
        return run.run()


def read_answers(answers: Any, decoder: str) -> list[Row] | None:
    """The results that are learned from; None where problems are given in their place.

    Of files with the answers of several decoders, those of `decoder` are taken.
    """
    paths = [answers] if isinstance(answers, (str, Path)) else list(answers)
    if paths and all(isinstance(one, Decoded) for one in paths):
        return [result_of(one) for one in paths if isinstance(one, Decoded)]
    if not paths or not all(isinstance(one, Path) or one is answers for one in paths):
        return None
    if isinstance(answers, (str, Path)) and not is_results(answers):
        return None
    rows = read_results(paths)
    several = len({row["decoder"] for row in rows}) > 1
    return read_results(paths, decoder) if several else rows


def is_results(path: str | Path) -> bool:
    """Whether a path is that of a decode run, rather than of problems."""
    return (Path(path) / "results.jsonl").is_file() or Path(path).name == "results.jsonl"


def problems_of(rows: Sequence[Row]) -> list[Problem]:
    """The problems that lines of results.jsonl answer, each once."""
    found = {row["prompt"]: Problem(row["id"], row["prompt"], row.get("expected")) for row in rows}
    return as_problems(list(found.values()), argument="answers")


def graded(row: Row, grade: Grader) -> Row:
    """A result that says whether it is right, where the answer is known."""
    if row["correct"] is not None or row.get("expected") is None:
        return row
    return row | {"correct": bool(grade(row["completion"], row["expected"]))}


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
    """The README.md of an adapter: data, method, settings, cost, and held-out figures."""
    data, made, training = config.get("data") or {}, summary["data"], summary["training"]
    problems = data.get("path") or (
        f"the tiny world ({data['family']})" if "family" in data else "the caller's problems"
    )
    teacher = summary["teacher"] and f"answers of {summary['teacher']['policy']} with {summary['teacher']['decoder']}"
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
        f"Trained by `nabla-rl distill` ({summary['method']}, engine {summary['engine']}) on "
        f"{teacher or 'given answers'}.",
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
