"""Alignment as a Lightning training loop: KL-regularised reinforcement learning of a LoRA adapter, the dual of
decoding.

The module draws groups of completions, has them rewarded, and hands tensors to the losses in
`nabla_rl.functional.policy_gradient`. Whole groups stay on one process, so that nothing but gradients and a few counts
crosses over.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from nabla_rl.data.problems import Problem
from nabla_rl.decoding import Nabla, Sampling
from nabla_rl.functional.kl import kl_estimate, reverse_kl
from nabla_rl.functional.logps import compute_entropy, selective_log_softmax, sequence_logps
from nabla_rl.functional.policy_gradient import (
    group_relative_advantages,
    grpo_loss,
    leave_one_out_advantages,
    penalise_rewards,
    rloo_loss,
)
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.adapters import LoraOptions, attach_adapter
from nabla_rl.models.groups import group_logits
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_policy, resolve_name
from nabla_rl.models.policy import Policy
from nabla_rl.modules.adapter_training import AdapterTraining, append_line, trl_prompt
from nabla_rl.modules.align_config import Algorithm, KLEstimator, RLConfig
from nabla_rl.modules.align_data import AlignmentData, Draws
from nabla_rl.modules.decoding import NablaOptions, check_lengths, in_role, load_reward
from nabla_rl.rewards.base import AbstractReward, check_shared_vocabulary
from nabla_rl.rewards.functions import (
    GraderReward,
    JudgeReward,
    RewardFunction,
    Text,
    compute_rewards,
    import_reward,
    reward_name,
    weigh_rewards,
)
from nabla_rl.types import UserError

FLAT_STEPS = 10
"""Steps in a row without a difference between the rewards of any group, after which the user is warned."""


@dataclass
class MicroBatch:
    """Groups of completions that go through one forward and backward.

    Attributes:
        prompts: ids of the P prompts.
        ids, mask: (P·G, length), right padded.
        rewards: (P·G, functions), NaN where there is none.
        total: (P·G,), their weighted sum.
        finished: (P·G,), did the completion end by itself?
        advantages: (P·G,), where they are known.
        old: (P·G, length), log-probabilities under the policy that drew them, where they are known.
        ref: the same under the reference.
        num_items: completion tokens of the whole draw over all processes, for one process.
    """

    prompts: list[list[int]]
    ids: Tensor
    mask: Tensor
    rewards: Tensor
    total: Tensor
    finished: Tensor
    advantages: Tensor | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    num_items: float = 0.0


class PolicyAligner(AdapterTraining):
    """Trains a LoRA adapter towards the tilted policy ρ* ∝ π exp(r/β), by policy gradients.

    Args:
        policy: the language model; its adapter is what trains, the reference is the same model without it.
        reward: the learned judge, `judge` among the reward functions: the one that decoding climbs.
        gold: a second judge that training never sees, to notice when the first one is being fooled.
        algorithm: rloo (KL in the reward; its fixed point is ρ*) or grpo (KL in the loss, scaled advantages).
        reward_funcs: judge, grader (right or wrong, by math-verify or to the letter), or dotted names of functions
            with TRL's signature; their weighted sum is the reward.
        kl_estimator: of the KL that trains: k1 (log π/π_ref of the token), k3 (never negative, less noisy), exact
            (summed over the vocabulary at every position); auto: TRL's, k1 for rloo and k3 for grpo. All three have
            the KL as their mean.
        rollouts: sample (the policy's own completions), or nabla (∇-Reasoner's published loop of DTO, decoded from the
            policy with the judge and this β; RLOO with k1 alone). Its law has no density that could be evaluated, so
            there are no importance weights: its completions are off-policy data of weight 1. That keeps the fixed
            point: the return r - β log(π/π_ref) is constant at ρ*, so every advantage is zero there, whatever drew the
            completions.
        nabla: how ∇-Reasoner decodes them.
        stop_at_kl: stop once a step's mean KL per completion, in nats, exceeds this; null: never.
        rl: the reinforcement learning, in TRL's words.
        lora: the adapter, in PEFT's words.
        eval_generations: completions of each held-out problem that the summary is measured on.
        family: which embedded tiny models a bare name means.
        seed: of every random number.
    """

    files = ("metrics.jsonl", "completions.jsonl")

    def __init__(
        self,
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008, frozen
        reward: RewardOptions = RewardOptions(),  # noqa: B008, frozen
        gold: RewardOptions = RewardOptions(name="tiny-gold"),  # noqa: B008, frozen
        algorithm: Algorithm = "rloo",
        reward_funcs: list[str] = ["judge"],  # noqa: B006, not changed
        kl_estimator: KLEstimator = "auto",
        rollouts: Literal["sample", "nabla"] = "sample",
        nabla: NablaOptions = NablaOptions(max_rollouts=4),  # noqa: B008, frozen
        stop_at_kl: float | None = None,
        rl: RLConfig = RLConfig(),  # noqa: B008, frozen
        lora: LoraOptions = LoraOptions(),  # noqa: B008, frozen
        eval_generations: int = 4,
        family: str = "sorting",
        seed: int = 0,
    ):
        super().__init__(rl)
        if not reward_funcs:
            raise UserError("--model.reward_funcs: expected at least one, found none. Use [judge].")
        if rl.reward_weights is not None and len(rl.reward_weights) != len(reward_funcs):
            raise UserError(
                f"--model.rl.reward_weights: expected one for each of {len(reward_funcs)} reward functions, found "
                f"{len(rl.reward_weights)}."
            )
        if "judge" in reward_funcs and reward.name is None:
            raise UserError(
                "--model.reward.name: expected a reward model for judge, found none. Name one, or leave judge out of "
                "--model.reward_funcs."
            )
        if policy.adapter is not None:
            raise UserError(
                f"--model.policy.adapter: expected none, found {policy.adapter!r}. A new adapter is trained; merge "
                "the old one into the weights first."
            )
        if stop_at_kl is not None and not stop_at_kl > 0:
            raise UserError(f"--model.stop_at_kl: expected a positive number or null, found {stop_at_kl}.")
        if eval_generations < 1:
            raise UserError(f"--model.eval_generations: expected at least 1, found {eval_generations}.")
        chosen = {"rloo": "k1", "grpo": "k3"}[algorithm] if kl_estimator == "auto" else kl_estimator
        if (algorithm, chosen) == ("grpo", "k1") and not rl.use_bias_correction_kl:
            raise UserError(
                "--model.kl_estimator: expected k3 or exact in GRPO's loss, found k1, whose gradient is zero in "
                "expectation. Or pass --model.rl.use_bias_correction_kl true."
            )
        if rollouts == "nabla" and ((algorithm, chosen) != ("rloo", "k1") or rl.num_iterations > 1 or not rl.beta):
            raise UserError(
                "--model.rollouts: expected sample, found nabla. Completions of another law than the policy's keep "
                "the fixed point with --model.algorithm rloo, --model.kl_estimator k1, beta > 0 and num_iterations 1."
            )
        if rollouts == "nabla" and "judge" not in reward_funcs:
            raise UserError(
                "--model.reward_funcs: expected judge among them for --model.rollouts nabla, which climbs it."
            )
        self.rollouts, self.nabla = rollouts, nabla
        self.options = {"policy": policy, "reward": reward, "gold": gold}
        self.algorithm: Algorithm = algorithm
        self.kl_estimator, self.stop_at_kl = chosen, stop_at_kl
        self.rl, self.lora, self.reward_names = rl, lora, reward_funcs
        self.eval_generations, self.family, self.seed = eval_generations, family, seed
        self.data: Any = None
        self._judges: dict[str, AbstractReward | None] = {}  # in a dict: no part of this module's weights
        self.functions: list[RewardFunction] = []
        self.window: list[MicroBatch] = []
        self.flat_steps, self.stopped = 0, ""
        self._samples: list[dict[str, Any]] = []

    # What is trained, on what, for what

    def prepare(self, device: torch.device, data: AlignmentData) -> None:
        """Load the models, put the adapter in and check that every held-out problem fits, before anything is done."""
        policy = load_policy(self.options["policy"], family=self.family, device=device)  # pyright: ignore
        judges: dict[str, AbstractReward | None] = {}
        for role in ("reward", "gold"):
            if role == "reward" and "judge" not in self.reward_names:
                continue
            try:
                judges[role] = load_reward(self.options[role], family=self.family, device=device, role=role)  # pyright: ignore
                if judges[role] is not None:
                    check_shared_vocabulary(policy.tokenizer, judges[role].tokenizer)  # pyright: ignore
            except UserError as error:
                raise UserError(in_role(str(error), role)) from error
        for judge in (None, *judges.values()):
            try:
                check_lengths(data.held_out, policy, judge, self.rl.max_completion_length)
            except UserError as error:
                message = str(error).replace("--model.sampling.max_new_tokens", "--model.rl.max_completion_length")
                raise UserError(message) from error
        base = resolve_name(self.options["policy"].name, self.family)  # pyright: ignore
        self.use(policy, data, judges, base_name=base)

    def use(
        self,
        policy: Policy,
        data: AlignmentData,
        judges: dict[str, AbstractReward | None] | None = None,
        *,
        functions: Sequence[RewardFunction] | None = None,
        base_name: str | None = None,
    ) -> None:
        """Train this policy, with these judges (`reward`, `gold`) or these reward functions."""
        self.policy, self.data, self._judges = policy, data, judges or {}
        self.adapter = attach_adapter(policy, self.lora, seed=self.seed, base_name=base_name)
        self.functions = list(functions or [self._reward_function(name) for name in self.reward_names])

    def _reward_function(self, name: str) -> RewardFunction:
        if name == "judge":
            judge = self._judges["reward"]
            assert judge is not None
            function = JudgeReward(judge)
            function.ledger = self.ledger
            return function
        return GraderReward(self.data.grade) if name == "grader" else import_reward(name)

    # Lightning's hooks

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step * self.rl.gradient_accumulation_steps
        draws = Draws(
            self.data, self.rl, start=start, rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )
        return DataLoader(draws, batch_size=None)

    def training_step(self, batch: tuple[int, list[Problem]], batch_index: int) -> Tensor:
        """The loss of one micro-batch; the first of a draw draws."""
        tick, problems = batch
        parts = self.rl.gradient_accumulation_steps
        if tick % (parts * self.rl.num_iterations) == 0 or not self.window:
            self.window = self.draw(problems, tick // (parts * self.rl.num_iterations))
        loss, metrics = self.loss(self.window[tick % parts])
        self.stop_if_not_finite(loss, "loss")
        self._metrics.append(metrics | {"loss": loss.item()})
        if self.algorithm == "grpo" and self.rl.loss_type == "dapo":
            return loss * parts  # it is divided by the tokens of all parts, and Lightning divides by their number
        return loss

    def end_step(self) -> None:
        """At the end of an optimiser step: metrics, and reasons to stop or to warn."""
        step, metrics = self.trainer.global_step, self.merge_metrics()
        if self.stop_at_kl is not None and metrics.get("kl_sequence", 0.0) > self.stop_at_kl:
            self.stopped = (
                f"KL of {metrics['kl_sequence']:.3f} nats at step {step}, above --model.stop_at_kl {self.stop_at_kl}"
            )
            self.trainer.should_stop = True
        self.flat_steps = self.flat_steps + 1 if metrics["frac_reward_zero_std"] == 1.0 else 0
        if not self.trainer.is_global_zero:
            return
        if self.flat_steps == FLAT_STEPS:
            print(  # noqa: T201
                f"warning: expected rewards that differ within a group, found all equal for {FLAT_STEPS} steps: there "
                "is nothing to learn from. Raise --model.rl.num_generations or --model.rl.temperature, or take "
                "problems that are neither too hard nor too easy.",
                file=sys.stderr,
            )
        self.log_dict(
            {name: metrics[name] for name in ("reward", "kl_sequence")},
            prog_bar=True,
            logger=False,
            rank_zero_only=True,
        )
        if step % self.rl.logging_steps == 0:
            self.write_metrics(step, metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The adapter alone, and what the rest of a draw needs."""
        super().on_save_checkpoint(checkpoint)
        window = [vars(part) for part in self.window] if self.rl.num_iterations > 1 else []
        checkpoint["aligner"] = {"flat_steps": self.flat_steps, "window": window}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting, and with the draw that was being used."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint["aligner"]
        self.flat_steps = kept["flat_steps"]
        # of several processes the first alone has written its part: they draw anew
        self.window = [MicroBatch(**part) for part in kept["window"]] if self.world_size == 1 else []

    # One draw and its loss

    @torch.no_grad()
    def draw(self, problems: Sequence[Problem], number: int) -> list[MicroBatch]:
        """Draw a group of completions for each problem and have them rewarded: the micro-batches of one draw."""
        rl, policy = self.rl, self.policy
        if rl.top_k:
            raise UserError(
                f"--model.rl.top_k: expected 0 with the lightning engine, found {rl.top_k}: a truncated sample is not "
                "the policy's. Use 0, or --engine trl."
            )
        prompts = [policy.encode_prompt(problem.problem) for problem in problems]
        ids, mask, finished = self.rollout(problems, prompts, number)
        rewards = self.reward(problems, ids, mask)
        total = weigh_rewards(rewards, rl.reward_weights)
        advantages = None
        if self.algorithm == "grpo":
            advantages = self._everywhere(
                total, lambda r: group_relative_advantages(r, rl.num_generations, scale=rl.scale_rewards)
            )
        num_items = mask.sum().double().cpu()
        if self.world_size > 1:
            num_items = self.all_gather(num_items.to(self.policy.device)).double().mean().cpu()  # pyright: ignore
        self._sample(problems, ids, mask, total)
        window, size, each = [], rl.per_device_train_batch_size, rl.prompts_per_batch
        for part in range(len(problems) // each):
            rows = slice(part * size, (part + 1) * size)
            width = int(mask[rows].sum(-1).max())
            window.append(
                MicroBatch(
                    prompts[part * each : (part + 1) * each],
                    ids[rows, :width],
                    mask[rows, :width],
                    rewards[rows],
                    total[rows],
                    finished[rows],
                    None if advantages is None else advantages[rows].to(ids.device),
                    num_items=float(num_items),
                )  # fmt: skip
            )
        self.num_tokens += int(mask.sum()) + rl.num_generations * sum(map(len, prompts))
        return window

    def rollout(
        self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`num_generations` samples of each problem: ids, mask and whether they ended; row G·i + j depends on (seed,
        draw, problem, j)."""
        if self.rollouts == "nabla":
            return self._search(problems, number)
        rl = self.rl
        accounts = torch.zeros(len(prompts), dtype=torch.int64)
        prefix = self.policy.prefill(prompts, accounts, self.ledger)
        rows = torch.arange(len(prompts), device=self.policy.device).repeat_interleave(rl.num_generations)
        generators = [
            seeded_generator(self.seed, "align", number, problem.id, j)
            for problem in problems
            for j in range(rl.num_generations)
        ]
        drawn = self.policy.rollout(
            prefix.select(rows), generators=generators, max_new_tokens=rl.max_completion_length,
            temperature=rl.temperature, top_p=rl.top_p,
        )  # fmt: skip
        return drawn.ids, drawn.mask, drawn.finished

    def _search(self, problems: Sequence[Problem], number: int) -> tuple[Tensor, Tensor, Tensor]:
        """`num_generations` completions of each problem by ∇-Reasoner, each with random numbers of its own."""
        rl, device = self.rl, self.policy.device
        sampling = Sampling(rl.temperature, rl.top_p, rl.max_completion_length)
        own = {entry.name for entry in fields(Nabla)}
        settings = {name: value for name, value in vars(self.nabla).items() if name in own}
        decoder = Nabla(**settings, beta=rl.beta, sampling=sampling, seed=self.seed)
        asked = [
            replace(problem, id=f"{problem.id}/{number}/{j}")
            for problem in problems
            for j in range(rl.num_generations)
        ]
        ledger = Ledger(len(asked))
        with torch.enable_grad():
            found = decoder.decode(asked, self.policy, self._judges.get("reward"), ledger)
        self.flops_before += sum(ledger.cost(index).flops for index in range(len(asked)))
        rows = [torch.tensor(one.ids, device=device) for one in found]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.policy.pad_id)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        return ids, mask, torch.tensor([one.finished for one in found], device=device)

    def reward(self, problems: Sequence[Problem], ids: Tensor, mask: Tensor) -> Tensor:
        """What the reward functions say of G completions of each problem, (rows, functions)."""
        return compute_rewards(self.functions, **self.columns(problems, ids, mask))

    def columns(self, problems: Sequence[Problem], ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """The arguments of a reward function, as TRL's trainers would give them."""
        size = len(ids) // len(problems)
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        repeated = [problem for problem in problems for _ in range(size)]
        texts: list[Text] = [self.policy.decode(row) for row in rows]
        if self.policy.tokenizer.chat_template is not None:
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return {
            "prompts": [trl_prompt(self.policy, problem.problem) for problem in repeated],
            "completions": texts,
            "completion_ids": rows,
            "problem": [problem.problem for problem in repeated],
            "answer": [problem.answer for problem in repeated],
            "id": [problem.id for problem in repeated],
        }

    def logps(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens at the temperature, and the logits that they are of."""
        with self.ledger.phase("train"):
            trainable = self.adapter.num_weights if torch.is_grad_enabled() else 0
            logits = group_logits(self.policy, part.prompts, part.ids, part.mask, self.ledger, trainable=trainable)
        logits = logits / self.rl.temperature
        return selective_log_softmax(logits, part.ids), logits

    def loss(self, part: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a micro-batch with gradients to the adapter, and its metrics by TRL's names.

        Where they are not known yet, the micro-batch takes the log-probabilities of now as those it was drawn with.
        """
        rl, mask, ref_logits = self.rl, part.mask, None
        # before the forward that is differentiated: switching the adapter off touches its requires_grad
        if rl.beta and (part.ref is None or self.kl_estimator == "exact"):
            with torch.no_grad(), self.adapter.disabled(), self.ledger.phase("reference"):
                part.ref, ref_logits = self.logps(part)
        logps, logits = self.logps(part)
        if part.old is None:
            part.old = logps.detach()
        ratio = torch.exp(logps - part.old)
        kl = None
        if rl.beta:
            assert part.ref is not None
            if self.kl_estimator == "exact":
                assert ref_logits is not None
                kl = reverse_kl(logits.log_softmax(-1), ref_logits.log_softmax(-1))
            else:
                kl = kl_estimate(logps, part.ref, self.kl_estimator)
        clipping = {"epsilon": rl.epsilon, "epsilon_high": rl.epsilon_high}
        if self.algorithm == "rloo":
            if part.advantages is None:
                total = part.total.to(logps.device)
                returns = total if kl is None else penalise_rewards(total, kl.detach(), mask, beta=rl.beta)
                part.advantages = leave_one_out_advantages(returns, rl.num_generations)
            loss = rloo_loss(logps, sequence_logps(part.old, mask), part.advantages, mask, **clipping)
            if kl is not None and self.kl_estimator != "k1":
                # of E[Σ k] the score function sees the values; what is differentiated directly is zero for k1 alone
                loss = loss + rl.beta * sequence_logps(kl, mask).mean()
        else:
            assert part.advantages is not None
            weighted = (
                kl if kl is None or not rl.use_bias_correction_kl or self.kl_estimator == "exact" else kl * ratio
            )
            loss = grpo_loss(
                logps, part.old, part.advantages, mask, per_token_kl=weighted, beta=rl.beta, loss_type=rl.loss_type,
                max_completion_length=rl.max_completion_length, num_items=part.num_items or None, **clipping,
            )  # fmt: skip
        return loss, self._measure(part, logits.detach(), ratio.detach(), None if kl is None else kl.detach())

    def _measure(self, part: MicroBatch, logits: Tensor, ratio: Tensor, kl: Tensor | None) -> dict[str, float]:
        mask, rl = part.mask, self.rl
        count, lengths = mask.sum(), mask.sum(-1).float().cpu()
        group = part.total.view(-1, rl.num_generations)
        spread = torch.tensor([finite.std().item() if len(finite := g[~g.isnan()]) > 1 else 0.0 for g in group])
        clipped_low = (ratio < 1 - rl.epsilon) & mask
        clipped_high = (ratio > 1 + (rl.epsilon if rl.epsilon_high is None else rl.epsilon_high)) & mask
        ended = lengths[part.finished.cpu()]
        finite_total = part.total[~part.total.isnan()]
        metrics = {
            "reward": finite_total.mean().item(),
            "reward_std": finite_total.std().item() if len(finite_total) > 1 else 0.0,
            "frac_reward_zero_std": spread.isclose(torch.zeros(())).float().mean().item(),
            "entropy": ((compute_entropy(logits) * mask).sum() / count).item(),
            "clip_ratio/low_mean": (clipped_low.sum() / count).item(),
            "clip_ratio/high_mean": (clipped_high.sum() / count).item(),
            "clip_ratio/region_mean": ((clipped_low | clipped_high).sum() / count).item(),
            "completions/mean_length": lengths.mean().item(),
            "completions/min_length": lengths.min().item(),
            "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
            "completions/mean_terminated_length": ended.mean().item() if len(ended) else 0.0,
        }
        for index, function in enumerate(self.functions):
            values = part.rewards[:, index]
            values = values[~values.isnan()]
            name = f"rewards/{reward_name(function)}"
            metrics[f"{name}/mean"] = values.mean().item() if len(values) else 0.0
            metrics[f"{name}/std"] = values.std().item() if len(values) > 1 else 0.0
        if kl is not None:
            metrics["kl"] = ((kl * mask).sum() / count).item()
            metrics["kl_sequence"] = sequence_logps(kl, mask).mean().item()
        else:
            metrics["kl_sequence"] = 0.0
        metrics["objective"] = metrics["reward"] - rl.beta * metrics["kl_sequence"]
        return metrics

    # Across processes, and into files

    def _everywhere(self, values: Tensor, function: Any) -> Tensor:
        """A function of the values of all processes; this process's rows of it."""
        if self.world_size == 1:
            return function(values)
        gathered = self.all_gather(values.to(self.policy.device))
        whole = function(gathered.flatten(0, 1).cpu())  # pyright: ignore
        return whole[self.trainer.global_rank * len(values) :][: len(values)]

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl and samples in completions.jsonl, and the same to the logger."""
        super().write_metrics(step, metrics)
        if self.rl.log_completions and self._samples:
            self._log_samples(step)

    def _sample(self, problems: Sequence[Problem], ids: Tensor, mask: Tensor, total: Tensor) -> None:
        if not self.rl.log_completions:
            return
        count = self.rl.num_completions_to_print or len(ids)
        size = len(ids) // len(problems)
        self._samples = [
            {
                "prompt": problems[row // size].problem,
                "completion": self.policy.decode(ids[row][mask[row]].tolist()),
                "reward": total[row].item(),
            }
            for row in range(min(count, len(ids)))
        ]

    def _log_samples(self, step: int) -> None:
        if self.run_dir is not None:
            for sample in self._samples:
                append_line(self.run_dir / "completions.jsonl", {"step": step} | sample)
        text = "\n\n".join(f"{s['prompt']} → {s['completion']} ({s['reward']:.3f})" for s in self._samples)
        for logger in self.trainer.loggers:
            add_text = getattr(
                getattr(logger, "experiment", None), "add_text", None
            )  # TensorBoard's; W&B logs tables its own way
            if add_text is not None:
                add_text("completions", text, step)

    # Held-out figures

    @torch.no_grad()
    def evaluate(self, problems: Sequence[Problem], *, batch_size: int = 64) -> dict[str, Any]:
        """Figures on held-out problems of the policy as it is now, sampled as it is trained.

        Accuracy, greedy accuracy, reward, gold reward, KL to the reference (exact over the vocabulary at every
        position of the samples, summed over the completion), and the objective r - β KL: means over problems, with
        the standard error of each as `<name>_error`.
        """
        rows: dict[str, list[Tensor]] = {}
        kept, self.ledger = self.ledger, Ledger(1)  # what is measured here is no part of the training's cost
        judges = [function for function in self.functions if isinstance(function, JudgeReward)]
        for function in judges:
            function.ledger = self.ledger
        gold = self._judges.get("gold")
        for start in range(0, len(problems), batch_size):
            part = problems[start : start + batch_size]
            for name, values in self._evaluate_batch(part, gold).items():
                rows.setdefault(name, []).append(values)
        self.ledger = kept
        for function in judges:
            function.ledger = kept
        figures: dict[str, Any] = {"problems": len(problems), "generations": self.eval_generations}
        for name, parts in rows.items():
            values = torch.cat(parts).double()
            values = values[~values.isnan()]
            figures[name] = values.mean().item() if len(values) else None
            figures[f"{name}_error"] = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
        return figures

    def _evaluate_batch(self, problems: Sequence[Problem], gold: AbstractReward | None) -> dict[str, Tensor]:
        rl, policy, n = self.rl, self.policy, self.eval_generations
        prompts = [policy.encode_prompt(problem.problem) for problem in problems]
        prefix = policy.prefill(prompts, torch.zeros(len(prompts), dtype=torch.int64), self.ledger)
        greedy = policy.rollout(prefix, generators=None, max_new_tokens=rl.max_completion_length)
        rows = torch.arange(len(prompts), device=policy.device).repeat_interleave(n)
        generators = [seeded_generator(self.seed, "evaluate", p.id, j) for p in problems for j in range(n)]
        drawn = policy.rollout(
            prefix.select(rows), generators=generators, max_new_tokens=rl.max_completion_length,
            temperature=rl.temperature, top_p=rl.top_p,
        )  # fmt: skip
        columns = self.columns(problems, drawn.ids, drawn.mask)
        grade = GraderReward(self.data.grade)
        named: dict[str, Tensor] = {"accuracy": compute_rewards([grade], **columns)[:, 0]}
        rewards = compute_rewards(self.functions, **columns)
        named["reward"] = weigh_rewards(rewards, rl.reward_weights)
        for index, function in enumerate(self.functions):
            named[f"rewards/{reward_name(function)}"] = rewards[:, index]
        if gold is not None:
            named["gold_reward"] = compute_rewards([JudgeReward(gold)], **columns)[:, 0]
            named["gold_probability"] = named["gold_reward"].sigmoid()  # of being right, if the reward is its log-odds
        log_probs = (
            group_logits(policy, prompts, drawn.ids, drawn.mask, self.ledger).div(rl.temperature).log_softmax(-1)
        )
        with self.adapter.disabled():
            ref = group_logits(policy, prompts, drawn.ids, drawn.mask, self.ledger).div(rl.temperature).log_softmax(-1)
        named["kl"] = sequence_logps(reverse_kl(log_probs, ref), drawn.mask).cpu()
        named["objective"] = named["reward"] - rl.beta * named["kl"]
        named["completion_length"] = drawn.mask.sum(-1).float().cpu()
        means = {name: values.view(-1, n).nanmean(1) for name, values in named.items()}
        once = self.columns(problems, greedy.ids, greedy.mask)
        return {"greedy_accuracy": compute_rewards([grade], **once)[:, 0]} | means
