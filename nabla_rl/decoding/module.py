"""Decoding as a Lightning prediction loop: every decoder on every batch of problems, written down as it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedModel

from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Extract, Problem, extract_line
from nabla_rl.decoding import (
    MCTS,
    AbstractDecoder,
    BeamSearch,
    BestOfN,
    Decoded,
    EditSearch,
    Greedy,
    Nabla,
    Sample,
    Sampling,
    SelfConsistency,
)
from nabla_rl.decoding.base import score_rollouts
from nabla_rl.decoding.budget import Budget, Point, spent
from nabla_rl.decoding.presets import (
    NEED_REWARD,
    BeamOptions,
    BestOfNOptions,
    DecoderName,
    EditOptions,
    MCTSOptions,
    NablaOptions,
    SelfConsistencyOptions,
)
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_classifier, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.models.prompts import encode_judged
from nabla_rl.rewards.base import AbstractReward, check_shared_vocabulary
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.run_folder import RunFolder
from nabla_rl.types import UserError


class Decoding(L.LightningModule):
    """Decodes batches of problems with several decoders, under one policy, one reward and one β.

    Args:
        policy: the language model that is decoded.
        reward: the judge that decoders use.
        gold: a second judge that no decoder sees, to notice when the first one is being fooled.
        decoders: which decoders run, in the order of the table.
        beta: KL coefficient β = 1/λ of the energy L(y) = -r(x, y)/β - log π(y|x).
        sampling: how rollouts are drawn.
        best_of_n: options of best-of-n.
        self_consistency: options of self-consistency.
        beam: options of beam search.
        mcts: options of Monte Carlo tree search.
        edit_search: options of edit search.
        nabla: options of ∇-Reasoner.
        budget: the most that one problem may cost, whichever limit is met first; decoders stop before another step.
        family: which embedded tiny models a bare name means.
        seed: of every random number.
    """

    def __init__(
        self,
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008, frozen
        reward: RewardOptions = RewardOptions(),  # noqa: B008, frozen
        gold: RewardOptions = RewardOptions(name="tiny-gold"),  # noqa: B008, frozen
        decoders: list[DecoderName] = ["greedy", "best_of_n", "self_consistency", "nabla"],  # noqa: B006, not changed
        beta: float = 1.0,
        sampling: Sampling = Sampling(),  # noqa: B008, frozen
        best_of_n: BestOfNOptions = BestOfNOptions(),  # noqa: B008, frozen
        self_consistency: SelfConsistencyOptions = SelfConsistencyOptions(),  # noqa: B008, frozen
        beam: BeamOptions = BeamOptions(),  # noqa: B008, frozen
        mcts: MCTSOptions = MCTSOptions(),  # noqa: B008, frozen
        edit_search: EditOptions = EditOptions(),  # noqa: B008, frozen
        nabla: NablaOptions = NablaOptions(),  # noqa: B008, frozen
        budget: Budget = Budget(),  # noqa: B008, frozen
        family: str = "words",
        seed: int = 0,
    ):
        super().__init__()
        if not beta > 0:
            raise UserError(
                f"--model.beta: expected a positive number, found {beta}. Use .inf to leave the reward out."
            )
        if not decoders or len(set(decoders)) != len(decoders):
            raise UserError(f"--model.decoders: expected a list of different decoders, found {decoders}.")
        for name, n in (("best_of_n", best_of_n.n), ("self_consistency", self_consistency.n)):
            if n < 1:
                raise UserError(f"--model.{name}.n: expected at least 1, found {n}.")
        if not 0 < nabla.resample_top_p <= 1:
            raise UserError(
                f"--model.nabla.resample_top_p: expected a number in (0, 1], found {nabla.resample_top_p}. Use 1 to "
                "switch it off."
            )
        needy = [name for name in decoders if name in NEED_REWARD]
        if reward.name is None and needy:
            raise UserError(
                f"--model.reward.name: expected a reward model for {' and '.join(needy)}, found none. Name one, or "
                f"leave {' and '.join(needy)} out of --model.decoders."
            )
        self.options = {"policy": policy, "reward": reward, "gold": gold}
        self.decoder_names, self.beta, self.sampling, self.seed, self.family = decoders, beta, sampling, seed, family
        self.best_of_n, self.self_consistency, self.nabla = best_of_n, self_consistency, nabla
        self.beam, self.mcts, self.edit_search, self.budget = beam, mcts, edit_search, budget
        self.judge_curve = False
        self.run_folder: RunFolder | None = None
        self.on_rows: Callable[[list[dict]], None] = lambda rows: None
        self.policy: Any = None
        self.reward: AbstractReward | None = None
        self.gold: AbstractReward | None = None
        for name in decoders:
            # a wrong setting is better found before the models are loaded
            self.build_decoder(name, extract_line)

    def load_models(self, device: torch.device) -> None:
        """Load policy, reward and gold judge, and check that they can be used together."""
        self.policy = load_policy(self.options["policy"], family=self.family, device=device)
        for role in ("reward", "gold"):
            try:
                judge = load_reward(self.options[role], family=self.family, device=device, role=role)
                if judge is not None:
                    check_shared_vocabulary(self.policy.tokenizer, judge.tokenizer)
            except UserError as error:
                raise UserError(in_role(str(error), role)) from error
            setattr(self, role, judge)

    def prepare(self, device: torch.device, problems: Sequence[Problem], *, like: Decoding | None = None) -> None:
        """Load the models, or take those of `like`, and check that every problem fits them, before anything is
        decoded."""
        if like is None:
            self.load_models(device)
        else:
            self.policy, self.reward, self.gold = like.policy, like.reward, like.gold
        for judge in (self.reward, self.gold):
            check_lengths(problems, self.policy, judge, self.sampling.max_new_tokens)

    def setup(self, stage: str) -> None:
        """Load the models, where that was not done before."""
        if self.policy is None:
            self.prepare(self.trainer.strategy.root_device, self.data.problems)

    @property
    def data(self) -> ProblemData:
        """The problems that are being decoded."""
        data = self.trainer.datamodule  # pyright: ignore
        assert isinstance(data, ProblemData)
        return data

    def build_decoder(self, name: str, extract: Extract) -> AbstractDecoder:
        """The decoder of that name, with this module's settings; `extract` reads the answers that votes are for."""
        decoder = self._builders(extract)[name]()
        if "budget" in {entry.name for entry in fields(decoder)}:  # pyright: ignore
            return replace(decoder, budget=self.budget)  # pyright: ignore
        return decoder

    def _builders(self, extract: Extract) -> dict[str, Callable[[], AbstractDecoder]]:
        sampling, seed = self.sampling, self.seed
        return {
            "greedy": lambda: Greedy(sampling),
            "sample": lambda: Sample(sampling, seed),
            "best_of_n": lambda: BestOfN(
                self.best_of_n.n, self.best_of_n.choose_by, self.beta, sampling, seed, extract
            ),
            "self_consistency": lambda: SelfConsistency(self.self_consistency.n, sampling, seed, extract),
            "beam": lambda: BeamSearch(**vars(self.beam), beta=self.beta, sampling=sampling, seed=seed),
            "mcts": lambda: MCTS(**vars(self.mcts), beta=self.beta, sampling=sampling, seed=seed),
            "edit_search": lambda: self._edit_search(self.edit_search, "edit_search"),
            "nabla": self._nabla,
        }

    def _nabla(self) -> AbstractDecoder:
        # both are built, so that the options of both are checked
        try:
            edits = self._edit_search(self.nabla.edits, "nabla")
        except UserError as error:
            raise UserError(str(error).replace("nabla.", "nabla.edits.", 1)) from error
        published = {name: value for name, value in vars(self.nabla).items() if name not in ("loop", "edits")}
        loop = Nabla(**published, beta=self.beta, sampling=self.sampling, seed=self.seed)
        return edits if self.nabla.loop == "edits" else loop

    def _edit_search(self, options: EditOptions, name: str) -> EditSearch:
        given = dict(vars(options))
        sampling = replace(self.sampling, temperature=given.pop("temperature"))
        return EditSearch(**given, beta=self.beta, sampling=sampling, seed=self.seed, name=name)

    def transfer_batch_to_device(
        self, batch: list[Problem], device: torch.device, dataloader_idx: int
    ) -> list[Problem]:
        """Problems are text: the decoders put what they make of them where the models are."""
        return batch

    def predict_step(self, batch: list[Problem], batch_index: int) -> None:
        """Decode one batch with every decoder that has not finished it."""
        assert self.run_folder is not None
        # the decoders differentiate: Lightning's inference mode must not reach them
        with torch.inference_mode(False):
            for name in self.decoder_names:
                missing = self.run_folder.missing([problem.id for problem in batch], name)
                # a batch is decoded whole, so that a resumed run computes what an unbroken one would have
                rows = self.decode_batch(name, batch) if missing else []
                self.run_folder.append(rows)
                self.on_rows([self.run_folder.rows[problem.id, name] for problem in batch])

    def decode_batch(self, name: str, problems: Sequence[Problem]) -> list[dict]:
        """The lines of results.jsonl for one decoder and one batch."""
        ledger, start = Ledger(len(problems)), time.perf_counter()
        results = self.build_decoder(name, self.data.extract).decode(problems, self.policy, self.reward, ledger)
        seconds = (time.perf_counter() - start) / len(problems)
        completions = [result.ids for result in results]
        judged = {
            role: judge_completions(model, problems, completions, role=role)
            for role, model in (("reward", self.reward), ("gold_reward", self.gold))
        }
        rows = [
            self._row(name, problem, result, ledger, index, seconds, judged)
            for index, (problem, result) in enumerate(zip(problems, results, strict=True))
        ]
        return self._with_answers(rows, problems, results) if self.judge_curve else rows

    def _with_answers(self, rows: list[dict], problems: Sequence[Problem], results: Sequence[Decoded]) -> list[dict]:
        """Lines with every answer that their curves name, graded and judged, in place of all rollouts and edits."""
        named = [
            (row, problem, index, result.rollouts[index])
            for row, problem, result in zip(rows, problems, results, strict=True)
            for index in sorted({entry[-1] for entry in row["curve"]})
        ]
        owners, completions = [entry[1] for entry in named], [entry[3].ids for entry in named]
        rewards, gold = (
            judge_completions(model, owners, completions, role=role, batch_size=len(problems))
            for role, model in (("reward", self.reward), ("gold_reward", self.gold))
        )
        answers: dict[str, list[dict]] = {row["id"]: [] for row in rows}
        for (row, problem, index, candidate), reward, other in zip(named, rewards, gold, strict=True):
            answers[row["id"]].append(
                {
                    "index": index,
                    "text": candidate.text,
                    "logps": candidate.logps,
                    "correct": self._grade(candidate.text, problem),
                    "reward": reward,
                    "gold_reward": other,
                }
            )
        return [{**row, "rollouts": [], "trace": [], "answers": answers[row["id"]]} for row in rows]

    def _grade(self, text: str, problem: Problem) -> bool | None:
        return None if problem.answer is None else bool(self.data.grade(text, problem.answer))

    def _row(
        self,
        name: str,
        problem: Problem,
        result: Decoded,
        ledger: Ledger,
        index: int,
        seconds: float,
        judged: dict[str, list[float | None]],
    ) -> dict:
        reward = judged["reward"][index]
        policy, judge = ledger.cost(index, model="policy"), ledger.cost(index, model="reward")
        energy = None
        if reward is not None:
            energy = float(
                compute_energy(torch.tensor(result.logps).double(), torch.tensor(reward).double(), self.beta)
            )
        return {
            "id": problem.id,
            "decoder": name,
            "config": self.run_folder.config_hash if self.run_folder else None,
            "prompt": problem.problem,
            "completion": result.text,
            "answer": self.data.extract(result.text),
            "expected": problem.answer,
            "correct": self._grade(result.text, problem),
            "finished": result.finished,
            "reward": reward,
            "gold_reward": judged["gold_reward"][index],
            "logps": result.logps,
            "energy": energy,
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


def load_reward(
    options: RewardOptions, *, family: str, device: torch.device, role: str = "reward"
) -> AbstractReward | None:
    """The reward that the options ask for; None where its name is null. Errors name the options of `role`."""
    if options.name is None:
        return None
    argument = f"model.{role}.name"
    if options.kind == "likelihood":
        policy = PolicyOptions(options.name, options.dtype, options.system_prompt, options.trust_remote_code)
        return LikelihoodReward(load_policy(policy, family=family, device=device, argument=argument))
    model, tokenizer = load_classifier(options, family=family, device=device, argument=argument)
    proposer = None
    if options.taught is not None:
        proposer = load_proposer(options, options.taught, family=family, device=device, role=role)
    return SequenceClassifierReward(model, tokenizer, system_prompt=options.system_prompt, proposer=proposer)


def load_proposer(
    options: RewardOptions, taught: str, *, family: str, device: torch.device, role: str
) -> PreTrainedModel:
    """The judge's copy that was taught its gradient: a model of its own, or a PEFT adapter for the judge."""
    argument = f"model.{role}.taught"
    if (Path(taught) / "adapter_config.json").is_file():
        from nabla_rl.models.adapters import merge_adapter  # PEFT takes seconds to import

        copy, _ = load_classifier(options, family=family, device=device, argument=f"model.{role}.name")
        return merge_adapter(copy, taught, argument=argument)
    copy, _ = load_classifier(replace(options, name=taught), family=family, device=device, argument=argument)
    return copy


def in_role(message: str, role: str) -> str:
    """The error of a reward with the option of the judge that it is about."""
    if not message.startswith("model.reward:"):
        return message
    hint = " Or pass --model.gold.name null: no decoder needs it." if role == "gold" else ""
    return f"--{message.replace('model.reward:', f'model.{role}:', 1)}{hint}"


def check_lengths(
    problems: Sequence[Problem], policy: Policy, judge: AbstractReward | None, max_new_tokens: int
) -> None:
    """Refuse the first problem that, with a completion after it, is longer than the policy or the judge can read."""
    readers: list[tuple[str, int, Callable[[str], int]]] = [
        ("policy", policy.backbone.context_length, lambda text: len(policy.encode_prompt(text)))
    ]
    if isinstance(judge, LikelihoodReward):
        reader = judge.judge
        readers.append(("reward", reader.backbone.context_length, lambda text: len(reader.encode_prompt(text))))
    elif isinstance(judge, SequenceClassifierReward):
        around = partial(encode_judged, judge.tokenizer, system_prompt=judge.system_prompt)
        readers.append(("reward", judge.backbone.context_length, lambda text: sum(map(len, around(text)))))
    for problem in problems:
        for name, limit, count in readers:
            length = count(problem.problem)
            if length + max_new_tokens > limit:
                raise UserError(
                    f"problem {problem.id!r}: expected prompt and completion to fit the {name} model's context of "
                    f"{limit} tokens, found {length} + {max_new_tokens}. Shorten the problem or lower "
                    "--model.sampling.max_new_tokens."
                )


def curve_of(result: Decoded, ledger: Ledger, account: int) -> list[Point]:
    """The decoder's curve; one point, its answer at its whole cost, where a decoder works in one step."""
    if result.curve:
        return result.curve
    chosen = next(index for index, candidate in enumerate(result.rollouts) if candidate.ids == result.ids)
    return [spent(ledger, account, rollouts=len(result.rollouts), chosen=chosen)]


def plain_point(point: Point) -> list[float]:
    """A point as a line has it: rollouts, FLOPs, sequential calls, seconds to the microsecond, and which rollout."""
    return [point.rollouts, point.flops, point.sequential_calls, round(point.seconds, 6), point.chosen]


@torch.no_grad()
def judge_completions(
    judge: AbstractReward | None,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[int]],
    *,
    role: str = "reward",
    batch_size: int | None = None,
) -> list[float | None]:
    """r(x, y) of one completion for each entry of `problems`: evaluation, booked on no decoder's account."""
    if judge is None:
        return [None] * len(problems)
    device = next(judge.parameters()).device
    values: list[float | None] = []
    size = batch_size or len(problems)
    for start in range(0, len(problems), size):
        owners = problems[start : start + size]
        rows = [torch.tensor(ids) for ids in completions[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        rewards, _ = score_rollouts(owners, judge, ids, mask, Ledger(len(owners)))
        for problem, value in zip(owners, rewards.tolist(), strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"{role}: expected finite scores, found {value} for problem {problem.id!r}. Check the weights, or "
                    "use float32."
                )
        values += rewards.tolist()
    return values
