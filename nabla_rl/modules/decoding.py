"""Decoding as a Lightning prediction loop: every decoder on every batch of problems, written down as it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import lightning as L
import torch

from nabla_rl.data.module import ProblemData
from nabla_rl.data.problems import Extract, Problem, extract_line
from nabla_rl.decoding import AbstractDecoder, BestOfN, Decoded, Greedy, Nabla, Sample, Sampling, SelfConsistency
from nabla_rl.decoding.acceptance import Acceptance
from nabla_rl.decoding.base import score_rollouts
from nabla_rl.decoding.best_of_n import Choice
from nabla_rl.dto import DTOConfig
from nabla_rl.functional.energy import compute_energy
from nabla_rl.ledger import Ledger
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_classifier, load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.models.prompts import encode_judged
from nabla_rl.report.run_folder import RunFolder
from nabla_rl.rewards.base import AbstractReward, check_shared_vocabulary
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError

DecoderName = Literal["greedy", "sample", "best_of_n", "self_consistency", "nabla"]
NEED_REWARD = ("best_of_n", "nabla")


@dataclass(frozen=True)
class BestOfNOptions:
    """Best-of-n."""

    n: int = 8
    """Completions drawn."""
    choose_by: Choice = "energy"
    """energy (lowest -r/β - log π), reward (highest), or weighted_vote (the answer with most σ(r))."""


@dataclass(frozen=True)
class SelfConsistencyOptions:
    """Self-consistency."""

    n: int = 8
    """Completions drawn."""


ONE_STEP = DTOConfig(
    num_steps=1,
    step_size=0.3,
    final_step_size=0.03,
    schedule="constant",
    optimizer="sgd",
    weight_decay=0.0,
)
"""What configs/decode/default.yaml says and why; the published settings are DTOConfig's own defaults."""


@dataclass(frozen=True)
class NablaOptions:
    """∇-Reasoner."""

    dto: DTOConfig = field(default_factory=lambda: ONE_STEP)
    """The optimisation of logits. Its beta is model.beta."""
    acceptance: Acceptance = "energy"
    """A proposal must lower the energy, raise the reward (as published), or pass a Metropolis test."""
    max_rollouts: int = 8
    """Rollouts at most for each problem, the first one included (N_max)."""
    sweeps: int = 8
    """Passes over the completion at most (published: 1), while rollouts are left."""
    min_entropy: float = 0.05
    """Positions with less entropy (nats) keep their token."""
    min_gradient_norm: float = 0.0
    """Positions with a smaller ‖∂L/∂y_i‖ keep their token; 0 switches the test off."""
    resample_temperature: float = 1.0
    """Divides the optimised logits when the new token is drawn; 0 takes the largest."""
    resample_top_p: float = 1.0
    """Nucleus of that draw."""
    support: int | None = None
    """Tokens of each position that are optimised; null: the whole vocabulary."""


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
        nabla: options of ∇-Reasoner.
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
        nabla: NablaOptions = NablaOptions(),  # noqa: B008, frozen
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

    def prepare(self, device: torch.device, problems: Sequence[Problem]) -> None:
        """Load the models and check that every problem fits them, before anything is decoded."""
        self.load_models(device)
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
        sampling, seed = self.sampling, self.seed
        builders: dict[str, Callable[[], AbstractDecoder]] = {
            "greedy": lambda: Greedy(sampling),
            "sample": lambda: Sample(sampling, seed),
            "best_of_n": lambda: BestOfN(
                self.best_of_n.n, self.best_of_n.choose_by, self.beta, sampling, seed, extract
            ),
            "self_consistency": lambda: SelfConsistency(self.self_consistency.n, sampling, seed, extract),
            "nabla": lambda: Nabla(**vars(self.nabla), beta=self.beta, sampling=sampling, seed=seed),
        }
        return builders[name]()

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
        judged = {}
        for judge, model in (("reward", self.reward), ("gold_reward", self.gold)):
            judged[judge] = judge_results(model, problems, results, role=judge)
        return [
            self._row(name, problem, result, ledger, index, seconds, judged)
            for index, (problem, result) in enumerate(zip(problems, results, strict=True))
        ]

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
            "correct": None if problem.answer is None else bool(self.data.grade(result.text, problem.answer)),
            "finished": result.finished,
            "reward": reward,
            "gold_reward": judged["gold_reward"][index],
            "logps": result.logps,
            "energy": energy,
            "rollouts": [{"text": c.text, "reward": c.reward, "logps": c.logps} for c in result.rollouts],
            "proposals": result.proposals,
            "accepted": result.accepted,
            "counts": result.counts,
            "trace": [asdict(edit) for edit in result.trace],
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
    return SequenceClassifierReward(model, tokenizer, system_prompt=options.system_prompt)


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


@torch.no_grad()
def judge_results(
    judge: AbstractReward | None, problems: Sequence[Problem], results: Sequence[Decoded], *, role: str = "reward"
) -> list[float | None]:
    """r(x, y) of final completions: evaluation, booked on no decoder's account."""
    if judge is None:
        return [None] * len(problems)
    device = next(judge.parameters()).device
    rows = [torch.tensor(result.ids) for result in results]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    rewards, _ = score_rollouts(problems, judge, ids, mask, Ledger(len(problems)))
    for problem, value in zip(problems, rewards.tolist(), strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"{role}: expected finite scores, found {value} for problem {problem.id!r}. Check the weights, or use "
                "float32."
            )
    return rewards.tolist()
