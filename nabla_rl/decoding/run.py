"""Decode problems: the one function that Python calls, and the body that the Lightning predictor shares.

A `Job` holds everything that the answers depend on. `answers` gives them as objects, `lines` as the plain rows of
results.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nabla_rl.budget import Budget, Point, spent
from nabla_rl.data.problems import (
    Extract,
    Grader,
    Problem,
    as_problems,
    extract_boxed,
    grade_boxed,
)
from nabla_rl.data.tiny import FAMILIES
from nabla_rl.decoding import DECODERS
from nabla_rl.decoding.base import (
    AbstractDecoder,
    Candidate,
    Decoded,
    Edit,
    Setting,
    check_beta,
    score_rollouts,
)
from nabla_rl.functional.energy import compute_energy
from nabla_rl.imports import import_subclass
from nabla_rl.ledger import Cost, Ledger
from nabla_rl.models.loading import ASSETS, PolicyOptions, RewardOptions, is_embedded, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.models.prompts import encode_judged
from nabla_rl.models.sampling import Sampling
from nabla_rl.report.decoded import finish
from nabla_rl.rewards.base import AbstractReward, check_shared_vocabulary
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.loading import load_reward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.run_folder import RunFolder
from nabla_rl.types import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What problems are decoded under, and how their answers are read.

    Attributes:
        policy: The language model that is decoded.
        reward: The reward model that decoders use; None for none.
        gold: A second reward model that no decoder sees, to notice when the first one is being fooled.
        beta: KL coefficient β of the energy L(y) = -r(x, y)/β - log π(y|x).
        sampling: How rollouts are drawn.
        seed: Random seed.
        budget: The most that one problem may cost.
        extract: Reads the answer out of a completion.
        grade: Says whether a completion's answer is right.
    """

    policy: Policy
    reward: AbstractReward | None = None
    gold: AbstractReward | None = None
    beta: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    extract: Extract = extract_boxed
    grade: Grader = grade_boxed

    def check(self, problems: Sequence[Problem]) -> None:
        """Refuse models that cannot be used together, and problems that do not fit them."""
        for role, reward in (("reward", self.reward), ("gold", self.gold)):
            if reward is not None:
                check_shared_vocabulary(self.policy.tokenizer, reward.tokenizer, argument=f"{role}.name")
        longest = self.sampling.max_new_tokens or self.policy.max_new_tokens
        for role, reward in (("reward", self.reward), ("gold", self.gold)):
            check_lengths(problems, self.policy, reward, longest, role=role)

    def answers(self, decoder: AbstractDecoder, problems: Sequence[Problem]) -> tuple[list[Decoded], Ledger]:
        """One batch of problems decoded side by side, and what it cost."""
        ledger = Ledger(len(problems))
        setting = Setting(
            self.policy, self.reward, ledger, self.beta, self.sampling, self.seed, self.budget, self.extract
        )
        found = list(decoder.decode(problems, setting))
        if len(found) != len(problems):
            raise UserError(f"decoder {decoder.name}", f"{len(problems)} answers", str(len(found)))
        for account, (problem, result) in enumerate(zip(problems, found, strict=True)):
            result.problem, result.cost = problem, ledger.cost(account)
        return found, ledger

    def lines(
        self,
        decoder: AbstractDecoder,
        problems: Sequence[Problem],
        *,
        config: str | None = None,
        name: str | None = None,
        judge_curve: bool = False,
    ) -> list[Row]:
        """The lines of results.jsonl for one decoder and one batch.

        Args:
            decoder: Who answers.
            problems: What is asked.
            config: Hash of the configuration that the lines belong to.
            name: What the decoder is called in them; None is its own name.
            judge_curve: Every answer that the curves name is graded and scored, in place of all rollouts and edits.
        """
        start = time.perf_counter()
        results, ledger = self.answers(decoder, problems)
        return self.lines_of(
            results, ledger, seconds=(time.perf_counter() - start) / len(problems), name=name or decoder.name,
            config=config, judge_curve=judge_curve,
        )  # fmt: skip

    def lines_of(
        self,
        results: Sequence[Decoded],
        ledger: Ledger,
        *,
        seconds: float,
        name: str,
        config: str | None = None,
        judge_curve: bool = False,
    ) -> list[Row]:
        """The lines of answers that are there."""
        problems = [result.problem for result in results if result.problem is not None]
        completions = [result.ids for result in results]
        judged = {
            key: judge_completions(model, problems, completions, role=role)
            for key, role, model in (("reward", "reward", self.reward), ("gold_reward", "gold", self.gold))
        }
        rows = [
            self._line(name, config, result, ledger, index, seconds, judged) for index, result in enumerate(results)
        ]
        return self._with_answers(rows, problems, results) if judge_curve else rows

    def graded(self, text: str, problem: Problem) -> bool | None:
        """Whether a completion is right; None where the answer is unknown."""
        return None if problem.answer is None else bool(self.grade(text, problem.answer))

    def _line(
        self,
        name: str,
        config: str | None,
        result: Decoded,
        ledger: Ledger,
        index: int,
        seconds: float,
        judged: Mapping[str, Sequence[float | None]],
    ) -> Row:
        problem, reward = result.problem, judged["reward"][index]
        assert problem is not None
        policy, judge = ledger.cost(index, model="policy"), ledger.cost(index, model="reward")
        energy = None
        if reward is not None:
            logps, value = torch.tensor(result.logps).double(), torch.tensor(reward).double()
            energy = float(compute_energy(logps, value, self.beta))
        return {
            "id": problem.id,
            "decoder": name,
            "config": config,
            "prompt": problem.problem,
            "completion": result.text,
            "answer": self.extract(result.text),
            "expected": problem.answer,
            "correct": self.graded(result.text, problem),
            "finished": result.finished,
            "reward": reward,
            "gold_reward": judged["gold_reward"][index],
            "logps": result.logps,
            "energy": energy,
            "ids": list(result.ids),
            "rollouts": [{"text": c.text, "reward": c.reward, "logps": c.logps} for c in result.rollouts],
            "proposals": result.proposals,
            "accepted": result.accepted,
            "counts": result.counts,
            "proposal_kl": result.proposal_kl,
            "trace": [asdict(edit) for edit in result.trace],
            "curve": [plain_point(point) for point in curve_of(result, ledger, index)],
            "cost": {
                "policy_calls": policy.calls,
                "reward_calls": judge.calls,
                "sequential_calls": policy.sequential + judge.sequential,
                "tokens": policy.tokens + judge.tokens,
                "flops": policy.flops + judge.flops,
                "cached_steps": int(ledger.cached[index]),
                "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in ledger.table(index)],
            },
            "seconds": seconds,
        }

    def _with_answers(self, rows: list[Row], problems: Sequence[Problem], results: Sequence[Decoded]) -> list[Row]:
        """Lines with every answer that their curves name, graded and scored, in place of all rollouts and edits."""
        named = [
            (row, problem, index, result.rollouts[index])
            for row, problem, result in zip(rows, problems, results, strict=True)
            for index in sorted({entry[-1] for entry in row["curve"]})
        ]
        owners, completions = [entry[1] for entry in named], [entry[3].ids for entry in named]
        rewards, gold = (
            judge_completions(model, owners, completions, role=role, batch_size=len(problems))
            for role, model in (("reward", self.reward), ("gold", self.gold))
        )
        answers: dict[str, list[Row]] = {row["id"]: [] for row in rows}
        for (row, problem, index, candidate), reward, other in zip(named, rewards, gold, strict=True):
            answers[row["id"]].append(
                {
                    "index": index,
                    "text": candidate.text,
                    "logps": candidate.logps,
                    "correct": self.graded(candidate.text, problem),
                    "reward": reward,
                    "gold_reward": other,
                }
            )
        return [{**row, "rollouts": [], "trace": [], "answers": answers[row["id"]]} for row in rows]


def decode(
    problems: str | Path | Problem | Sequence[str | Problem],
    policy: str | PolicyOptions | Policy,
    reward: str | RewardOptions | AbstractReward | None = None,
    decoder: str | type[AbstractDecoder] | AbstractDecoder = "edit_search",
    *,
    beta: float = 1.0,
    sampling: Sampling | None = None,
    seed: int = 0,
    budget: Budget | None = None,
    gold: str | RewardOptions | AbstractReward | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    extract: Extract | None = None,
    grade: Grader | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    run_dir: str | Path | None = None,
) -> list[Decoded]:
    """Answer problems with one decoder, every cost counted.

    Args:
        problems: Questions as texts or `Problem`s, or the path of a JSONL file with fields id, problem, answer.
        policy: A folder, a Hub name, an embedded model such as "words/tiny-policy", or a loaded policy.
        reward: The same of a reward model; None for decoders that need none.
        decoder: A name of `DECODERS`, the class path of your own, a decoder class, or a decoder with its options.
        beta: KL coefficient β of the energy L(y) = -r(x, y)/β - log π(y|x).
        sampling: How rollouts are drawn; None is `Sampling()`.
        seed: Random seed. An answer depends on (seed, problem id), not on the batch or the order.
        budget: The most that one problem may cost; None is no limit.
        gold: A second reward model that no decoder sees; its rewards are written into `run_dir`.
        batch_size: Number of problems decoded side by side.
        limit: Number of problems answered, the first ones; None is all.
        extract: Reads the answer that votes count; None is the embedded family's, or the last box.
        grade: Says whether a completion is right, for `run_dir`; None is the embedded family's, or math-verify.
        device: Where models given by name are loaded; None is the GPU where there is one.
        progress: Show a progress bar on standard error.
        run_dir: Folder for results.jsonl, summary.json and report.html; the same call resumes it. None writes nothing.

    Returns:
        One `Decoded` for each problem, in order.

    Raises:
        UserError: Something given cannot be used; the message says what and why.
    """
    check_beta(beta)
    if batch_size < 1:
        raise UserError("batch_size", "at least 1", str(batch_size))
    asked = as_problems(problems, limit=limit)
    chosen = build_decoder(decoder)
    family = embedded_family(policy)
    job = Job(
        policy if isinstance(policy, Policy) else load_policy(policy, device=device),
        *(
            given if isinstance(given, AbstractReward) else load_reward(given, device=device, argument=role)
            for role, given in (("reward", reward), ("gold", gold))
        ),
        beta=beta,
        sampling=sampling or Sampling(),
        seed=seed,
        budget=budget or Budget(),
        extract=extract or (extract_boxed if family is None else FAMILIES[family].extract),
        grade=grade or (grade_boxed if family is None else FAMILIES[family].grade),
    )
    longest = job.sampling.max_new_tokens or job.policy.max_new_tokens
    job = replace(job, sampling=replace(job.sampling, max_new_tokens=longest))
    job.check(asked)
    if run_dir is not None:
        return _into_folder(job, chosen, asked, batch_size, Path(run_dir), progress)
    found: list[Decoded] = []
    for batch in watched(batches(asked, batch_size), len(asked), progress, chosen.name):
        found += job.answers(chosen, batch)[0]
    return found


def _into_folder(
    job: Job, decoder: AbstractDecoder, problems: Sequence[Problem], batch_size: int, path: Path, progress: bool
) -> list[Decoded]:
    """The answers, each batch written down as soon as it is there; finished ones are read back."""
    described = described_job(job, decoder)
    folder = RunFolder(path, described)
    check_same_problems(folder, problems)
    fresh: dict[str, Decoded] = {}
    for batch in watched(batches(problems, batch_size), len(problems), progress, decoder.name):
        if not folder.missing([problem.id for problem in batch], decoder.name):
            continue
        # a batch is decoded whole, so that a resumed run computes what an unbroken one would have
        start = time.perf_counter()
        results, ledger = job.answers(decoder, batch)
        fresh |= {result.problem_id: result for result in results}
        seconds = (time.perf_counter() - start) / len(batch)
        folder.append(job.lines_of(results, ledger, seconds=seconds, name=decoder.name, config=folder.config_hash))
    finish(folder, [problem.id for problem in problems], [decoder.name], more={"seed": job.seed})
    return [
        fresh.get(problem.id) or decoded_of(folder.rows[problem.id, decoder.name], problem) for problem in problems
    ]


def described_job(job: Job, decoder: AbstractDecoder) -> Row:
    """What decides the answers, as plain values."""
    return {
        "policy": job.policy.backbone.model.name_or_path,
        "reward": None if job.reward is None else type(job.reward).__name__,
        "decoder": decoder.name,
        decoder.name: plain(asdict(decoder)),  # pyright: ignore
        "beta": job.beta,
        "sampling": asdict(job.sampling),
        "seed": job.seed,
        "budget": asdict(job.budget),
    }


def plain(value: Any) -> Any:
    """A value with lists for tuples."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def decoded_of(row: Row, problem: Problem) -> Decoded:
    """The answer that a line of results.jsonl holds, which keeps the tokens of the chosen rollout alone."""
    ids, cost = tuple(row.get("ids", ())), row["cost"]
    rollouts = [
        Candidate(each["text"], ids if each["text"] == row["completion"] else (), each["logps"], each["reward"])
        for each in row["rollouts"]
    ]
    return Decoded(
        row["id"], row["completion"], ids, row["finished"], row["logps"], row["reward"], rollouts,
        [Edit(**edit) for edit in row["trace"]], row["proposals"], row["accepted"], row["counts"],
        [Point(*point) for point in row["curve"]], row["proposal_kl"],
        Cost(
            cost["policy_calls"] + cost["reward_calls"], cost["sequential_calls"], cost["tokens"], cost["flops"],
            row["seconds"],
        ), problem,
    )  # fmt: skip


def build_decoder(decoder: str | type[AbstractDecoder] | AbstractDecoder) -> AbstractDecoder:
    """A decoder from its name, its class path, its class, or as it is."""
    if isinstance(decoder, AbstractDecoder):
        return decoder
    return (decoder_class(decoder) if isinstance(decoder, str) else decoder)()


def decoder_class(name: str, *, argument: str = "decoder") -> type[AbstractDecoder]:
    """The class of a decoder's name, or of a class path."""
    return import_subclass(name, DECODERS, AbstractDecoder, argument=argument)  # pyright: ignore


def embedded_family(policy: str | PolicyOptions | Policy) -> str | None:
    """The family of an embedded model, given by name or loaded; None for any other one."""
    if isinstance(policy, Policy):
        folder = Path(str(policy.backbone.model.name_or_path))
        return folder.parent.name if folder.parent.parent == ASSETS else None
    name = policy.name if isinstance(policy, PolicyOptions) else policy
    return name.partition("/")[0] if isinstance(name, str) and is_embedded(name) else None


def batches(problems: Sequence[Problem], size: int) -> Iterable[list[Problem]]:
    """The problems, `size` at a time."""
    rest = iter(problems)
    while batch := list(islice(rest, size)):
        yield batch


def watched(parts: Iterable[list[Problem]], total: int, progress: bool, label: str) -> Iterable[list[Problem]]:
    """The batches, with a progress bar on standard error where one is asked for."""
    if not progress:
        yield from parts
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        for part in parts:
            yield part
            bar.advance(task, len(part))


def check_same_problems(folder: RunFolder, problems: Sequence[Problem]) -> None:
    """Refuse a folder whose results answer other problems than these: the file of problems was changed."""
    texts = {problem.id: problem.problem for problem in problems}
    for key, decoder in folder.rows:
        found = folder.rows[key, decoder]["prompt"]
        if texts.get(key) != found:
            now = "no such problem" if key not in texts else repr(texts[key][:40])
            raise UserError(
                "run_dir",
                f"{folder.path} to hold results of these problems",
                f"{key!r} = {found[:40]!r} there and {now} now",
                "Choose another {run_dir}, or delete that folder.",
            )


def check_lengths(
    problems: Sequence[Problem],
    policy: Policy,
    reward: AbstractReward | None,
    max_new_tokens: int,
    *,
    role: str = "reward",
    setting: str = "sampling.max_new_tokens",
) -> None:
    """Refuse the first problem that, with a completion after it, is longer than the policy or the reward model can
    read; `setting` is the option that bounds completions."""
    readers: list[tuple[str, int, Callable[[str], int]]] = [
        ("policy", policy.backbone.context_length, lambda text: len(policy.encode_prompt(text)))
    ]
    if isinstance(reward, LikelihoodReward):
        reader = reward.judge
        readers.append((role, reader.backbone.context_length, lambda text: len(reader.encode_prompt(text))))
    elif isinstance(reward, SequenceClassifierReward):
        around = partial(encode_judged, reward.tokenizer, system_prompt=reward.system_prompt)
        readers.append((role, reward.backbone.context_length, lambda text: sum(map(len, around(text)))))
    for problem in problems:
        for name, limit, count in readers:
            length = count(problem.problem)
            if length + max_new_tokens > limit:
                raise UserError(
                    f"problem {problem.id!r}",
                    f"prompt and completion to fit the {name} model's context of {limit} tokens",
                    f"{length} + {max_new_tokens}",
                    f"Shorten the problem or lower {{{setting}}}.",
                )


def curve_of(result: Decoded, ledger: Ledger, account: int) -> list[Point]:
    """The decoder's curve; one point, its answer at its whole cost, where a decoder works in one step."""
    if result.curve:
        return result.curve
    chosen = next((k for k, candidate in enumerate(result.rollouts) if candidate.ids == result.ids), 0)
    return [spent(ledger, account, rollouts=len(result.rollouts), chosen=chosen)]


def plain_point(point: Point) -> list[float]:
    """A point as a line has it: rollouts, FLOPs, sequential calls, seconds to the microsecond, and which rollout."""
    return [point.rollouts, point.flops, point.sequential_calls, round(point.seconds, 6), point.chosen]


@torch.no_grad()
def judge_completions(
    reward: AbstractReward | None,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[int]],
    *,
    role: str = "reward",
    batch_size: int | None = None,
) -> list[float | None]:
    """r(x, y) of one completion for each entry of `problems`: evaluation, booked on no decoder's account."""
    if reward is None:
        return [None] * len(problems)
    device = next(reward.parameters(), torch.zeros(())).device
    values: list[float | None] = []
    size = batch_size or len(problems)
    for start in range(0, len(problems), size):
        owners = problems[start : start + size]
        rows = [torch.tensor(ids) for ids in completions[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        rewards, _ = score_rollouts(owners, reward, ids, mask, Ledger(len(owners)))
        for problem, value in zip(owners, rewards.tolist(), strict=True):
            if not torch.tensor(value).isfinite():
                raise UserError(
                    f"problem {problem.id!r}", f"a finite score of the {role} model", str(value),
                    "Check the weights, or use float32.",
                )  # fmt: skip
        values += rewards.tolist()
    return values
