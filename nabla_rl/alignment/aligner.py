"""Alignment as a Lightning training loop: KL-regularised reinforcement learning of a LoRA adapter.

The module draws groups of completions, has them rewarded, and hands tensors to the losses in
`nabla_rl.functional.policy_gradient`. Whole groups stay on one process, so that nothing but gradients and a few counts
crosses over.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader

from nabla_rl.adapters.training import AdapterTraining, append_line
from nabla_rl.alignment.config import Algorithm, KLEstimator, RLConfig, check_options, chosen_estimator
from nabla_rl.alignment.data import AlignmentData, Draws
from nabla_rl.alignment.evaluation import evaluate
from nabla_rl.alignment.metrics import step_metrics
from nabla_rl.alignment.rollouts import (
    Completions,
    MicroBatch,
    Rollouts,
    check_search,
    interleave,
    reward_columns,
    sample_groups,
    sample_lines,
    search_groups,
)
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.base import AbstractDecoder
from nabla_rl.decoding.module import qualified_reward
from nabla_rl.decoding.run import check_lengths, decoder_class
from nabla_rl.functional.kl import kl_estimate, reverse_kl
from nabla_rl.functional.logps import selective_log_softmax, sequence_logps
from nabla_rl.functional.policy_gradient import (
    group_relative_advantages,
    grpo_loss,
    leave_one_out_advantages,
    penalise_rewards,
    rloo_loss,
)
from nabla_rl.models.adapters import LoraOptions, attach_adapter
from nabla_rl.models.groups import group_logits
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_policy, qualified, resolve_name
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward, check_shared_vocabulary
from nabla_rl.rewards.functions import (
    GraderReward,
    JudgeReward,
    RewardFunction,
    compute_rewards,
    import_reward,
    reward_name,
    weigh_rewards,
)
from nabla_rl.rewards.loading import load_reward
from nabla_rl.types import UserError

EVALUATIONS = "evaluations.jsonl"
FLAT_STEPS = 10
"""Steps in a row without a difference between the rewards of any group, after which the user is warned."""


class PolicyAligner(AdapterTraining):
    """Trains a LoRA adapter towards the tilted policy ρ* ∝ π exp(r/β), by policy gradients.

    Completions of a search have no density that could be evaluated, so there are no importance weights: they are
    off-policy data of weight 1, for RLOO with k1 alone. That keeps the fixed point. The return r - β log(π/π_ref) is
    constant at ρ*, so every advantage is zero there, whatever drew the completions. `mixed` also draws all of them,
    which a search need not.

    Args:
        policy: Language model whose adapter trains; the reference is the same model without it.
        reward: Learned reward model, `judge` among the reward functions.
        gold: Second reward model that training never sees, for comparison; null is none.
        algorithm: Algorithm: rloo (KL in the reward; its fixed point is ρ*) or grpo (KL in the loss).
        reward_funcs: Reward functions: judge, grader, or dotted names with TRL's signature.
        kl_estimator: Estimator of the KL that trains: k1, k3 or exact; auto is TRL's, k1 for rloo, k3 for grpo.
        rollouts: Completions to train on: sample (the policy's own), search, or mixed (half of each group).
        search: Name or class path of the decoder that searches.
        stop_at_kl: Mean KL in nats per completion at which training stops; null is never.
        rl: Settings of reinforcement learning, in TRL's words.
        lora: Settings of the adapter, in PEFT's words.
        eval_generations: Number of completions of each held-out problem in the summary.
        family: Family of the embedded models that a bare name means.
        seed: Random seed.
        options: Decoders by their names, where they have options; own options of a reward by its kind's name.
    """

    files = ("metrics.jsonl", "completions.jsonl", EVALUATIONS)

    def __init__(
        self,
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008, frozen
        reward: RewardOptions = RewardOptions(),  # noqa: B008, frozen
        gold: RewardOptions = RewardOptions(name=None),  # noqa: B008, frozen
        algorithm: Algorithm = "rloo",
        reward_funcs: list[str] = ["judge"],  # noqa: B006, not changed
        kl_estimator: KLEstimator = "auto",
        rollouts: Rollouts = "sample",
        search: str = "nabla",
        stop_at_kl: float | None = None,
        rl: RLConfig = RLConfig(),  # noqa: B008, frozen
        lora: LoraOptions = LoraOptions(),  # noqa: B008, frozen
        eval_generations: int = 4,
        family: str = "sorting",
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(rl)
        check_options(
            rl,
            algorithm=algorithm,
            kl_estimator=kl_estimator,
            reward_funcs=reward_funcs,
            judge=reward.name,
            adapter=policy.adapter,
            searched=rollouts != "sample",
            stop_at_kl=stop_at_kl,
            eval_generations=eval_generations,
        )
        kind = decoder_class(search, argument="search")
        self.searcher: AbstractDecoder = options.get(kind.name) or kind()
        if rollouts != "sample":
            check_search(self.searcher, rl)
        self.rollouts = rollouts
        self.own = {name: value for name, value in options.items() if not isinstance(value, AbstractDecoder)}
        self.policy_options = replace(policy, name=qualified(policy.name, family))
        self.reward_options = {"reward": qualified_reward(reward, family), "gold": qualified_reward(gold, family)}
        self.algorithm: Algorithm = algorithm
        self.kl_estimator, self.stop_at_kl = chosen_estimator(algorithm, kl_estimator), stop_at_kl
        self.rl, self.lora, self.reward_names = rl, lora, reward_funcs
        self.eval_generations, self.seed = eval_generations, seed
        self.data: Any = None
        self._judges: dict[str, AbstractReward | None] = {}  # in a dict: no part of this module's weights
        self.functions: list[RewardFunction] = []
        self.window: list[MicroBatch] = []
        self.flat_steps, self.stopped, self.stopped_at = 0, "", 0
        self._samples: list[dict[str, Any]] = []

    # What is trained, on what, for what

    def prepare(self, device: torch.device, data: AlignmentData) -> None:
        """Load the models, put the adapter in, and check that every held-out problem fits."""
        judges: dict[str, AbstractReward | None] = {}
        policy = load_policy(self.policy_options, device=device)
        for role, given in self.reward_options.items():
            if role == "gold" or "judge" in self.reward_names:
                own = self.own.get(given.kind.rpartition(".")[2])
                judges[role] = load_reward(given, device=device, argument=role, own=own)
        self.use(policy, data, judges, base_name=resolve_name(self.policy_options.name))

    def use(
        self,
        policy: Policy,
        data: AlignmentData,
        judges: dict[str, AbstractReward | None] | None = None,
        *,
        functions: Sequence[str | RewardFunction] | None = None,
        base_name: str | None = None,
    ) -> None:
        """Train this policy.

        Args:
            policy: Model whose adapter is put in.
            data: Training problems and held-out problems.
            judges: Reward models by their roles, `reward` and `gold`.
            functions: Reward functions or their names; None stands for `reward_funcs`.
            base_name: Name of the policy that the saved adapter refers to.

        Raises:
            UserError: They cannot be used together, or a held-out problem does not fit them.
        """
        for role, judge in (judges or {}).items():
            if judge is not None:
                check_shared_vocabulary(policy.tokenizer, judge.tokenizer, argument=f"{role}.name")
            check_lengths(
                data.held_out, policy, judge, self.rl.max_completion_length, role=role,
                setting="rl.max_completion_length",
            )  # fmt: skip
        if not judges:
            longest = self.rl.max_completion_length
            check_lengths(data.held_out, policy, None, longest, setting="rl.max_completion_length")
        self.policy, self.data, self._judges = policy, data, judges or {}
        self.adapter = attach_adapter(policy, self.lora, seed=self.seed, base_name=base_name)
        self.functions = [self._reward_function(each) for each in functions or self.reward_names]

    def _reward_function(self, name: str | RewardFunction) -> RewardFunction:
        if not isinstance(name, str):
            return name
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

    def on_train_start(self) -> None:
        """Start the clock, and measure the policy before the first step where `eval_steps` asks for it."""
        super().on_train_start()
        if self.trainer.global_step == 0:
            self.evaluate_step(0)
        if self.stopped:  # it had gone too far when it was interrupted
            self.trainer.should_stop = True

    def training_step(self, batch: tuple[int, list[Problem]], batch_index: int) -> Tensor:
        """The loss of one micro-batch; the first one of a draw draws the completions."""
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
        """Write metrics at the end of an optimiser step, and stop where the KL is too large."""
        step, metrics = self.trainer.global_step, self.merge_metrics()
        if self.enough(step, metrics):
            self.trainer.should_stop = True
        if not self.trainer.is_global_zero:
            return
        self.log_dict(
            {name: metrics[name] for name in ("reward", "kl_sequence")},
            prog_bar=True,
            logger=False,
            rank_zero_only=True,
        )
        if step % self.rl.logging_steps == 0:
            self.write_metrics(step, metrics)
        self.evaluate_step(step)

    def enough(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the KL to the reference is above `stop_at_kl`; warns where rewards have long been all equal."""
        self.flat_steps = self.flat_steps + 1 if metrics["frac_reward_zero_std"] == 1.0 else 0
        if self.flat_steps == FLAT_STEPS and (self._trainer is None or self.trainer.is_global_zero):
            print(  # noqa: T201
                f"warning: expected rewards that differ within a group, found all equal for {FLAT_STEPS} steps: there "
                "is nothing to learn from. Raise rl.num_generations or rl.temperature, or take "
                "problems that are neither too hard nor too easy.",
                file=sys.stderr,
            )
        if self.stop_at_kl is None or metrics["kl_sequence"] <= self.stop_at_kl:
            return False
        self.stopped_at = step
        self.stopped = f"KL of {metrics['kl_sequence']:.3f} nats at step {step}, above stop_at_kl = {self.stop_at_kl}"
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter alone of all weights, and what the rest of a draw needs."""
        super().on_save_checkpoint(checkpoint)
        window = [vars(part) for part in self.window] if self.rl.num_iterations > 1 else []
        stop = {"stopped": self.stopped, "stopped_at": self.stopped_at}
        checkpoint["aligner"] = {"flat_steps": self.flat_steps, "window": window, **stop}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume the count of cost and the draw that was in use."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint["aligner"]
        self.flat_steps, self.stopped, self.stopped_at = kept["flat_steps"], kept["stopped"], kept["stopped_at"]
        # of several processes the first alone has written its part: they draw anew
        self.window = [MicroBatch(**part) for part in kept["window"]] if self.world_size == 1 else []

    # One draw and its loss

    @torch.no_grad()
    def draw(self, problems: Sequence[Problem], number: int) -> list[MicroBatch]:
        """The micro-batches of one draw: a group of completions for each problem, with their rewards."""
        rl, policy = self.rl, self.policy
        if rl.top_k:
            raise UserError(
                "rl.top_k",
                "0 with the lightning engine",
                f"{rl.top_k}: a truncated sample is not the policy's",
                "Use 0, or {engine} trl.",
            )
        prompts = [policy.encode_prompt(problem.problem) for problem in problems]
        drawn = self.rollout(problems, prompts, number)
        ids, mask = drawn.ids, drawn.mask
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
        if rl.log_completions:
            self._samples = sample_lines(policy, problems, ids, mask, total, rl.num_completions_to_print)
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
                    drawn.finished[rows],
                    None if advantages is None else advantages[rows].to(ids.device),
                    num_items=float(num_items),
                )  # fmt: skip
            )
        self.num_tokens += int(mask.sum()) + rl.num_generations * sum(map(len, prompts))
        return window

    def rollout(self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], number: int) -> Completions:
        """`num_generations` completions of each problem; row G·i + j depends on (seed, draw, problem, j)."""
        size = self.rl.num_generations
        drawn = {"sample": size, "search": 0, "mixed": size - size // 2}[self.rollouts]
        sampled = searched = None
        if drawn:
            key = (self.seed, "align", number)
            sampled = sample_groups(self.policy, problems, prompts, range(drawn), self.rl, self.ledger, key=key)
        if drawn < size:
            searched, flops = search_groups(
                self.searcher, self.policy, self._judges.get("reward"), problems, range(drawn, size), number,
                rl=self.rl, seed=self.seed,
            )  # fmt: skip
            self.flops_before += flops
        if sampled is not None and searched is not None:
            return interleave(sampled, searched, len(problems), self.policy)
        found = sampled or searched
        assert found is not None
        return found

    def reward(self, problems: Sequence[Problem], ids: Tensor, mask: Tensor) -> Tensor:
        """The rewards of G completions of each problem, (rows, functions)."""
        return compute_rewards(self.functions, **reward_columns(self.policy, problems, ids, mask))

    def logps(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens at the training's temperature, and the logits behind them."""
        with self.ledger.phase("train"):
            trainable = self.adapter.num_weights if torch.is_grad_enabled() else 0
            logits = group_logits(self.policy, part.prompts, part.ids, part.mask, self.ledger, trainable=trainable)
        logits = logits / self.rl.temperature
        return selective_log_softmax(logits, part.ids), logits

    def loss(self, part: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a micro-batch with gradients to the adapter, and its metrics by TRL's names.

        A micro-batch without old log-probabilities takes the current ones, since the current policy drew it.
        """
        rl, mask, ref_logits = self.rl, part.mask, None
        # before the forward that is differentiated: switching the adapter off touches its requires_grad
        if rl.beta and (part.ref is None or self.kl_estimator == "exact"):
            with torch.no_grad(), self.adapter.disabled(), self.ledger.phase("reference"):
                part.ref, ref_logits = self.logps(part)
        logps, logits = self.logps(part)
        if part.old is None:
            part.old = logps.detach()
        kl = self.token_kl(part, logps, logits, ref_logits) if rl.beta else None
        clipping = {"epsilon": rl.epsilon, "epsilon_high": rl.epsilon_high}
        if self.algorithm == "rloo":
            if part.advantages is None:
                total = part.total.to(logps.device)
                returns = total if kl is None else penalise_rewards(total, kl.detach(), mask, beta=rl.beta)
                part.advantages = leave_one_out_advantages(returns, rl.num_generations)
            loss = rloo_loss(
                logps, sequence_logps(part.old, mask), part.advantages, mask, beta=rl.beta,
                differentiable_kl=None if self.kl_estimator == "k1" else kl, **clipping,
            )  # fmt: skip
        else:
            assert part.advantages is not None
            loss = grpo_loss(
                logps, part.old, part.advantages, mask, per_token_kl=kl, beta=rl.beta, loss_type=rl.loss_type,
                bias_correction=rl.use_bias_correction_kl and self.kl_estimator != "exact",
                max_completion_length=rl.max_completion_length, num_items=part.num_items or None, **clipping,
            )  # fmt: skip
        names = [reward_name(function) for function in self.functions]
        ratio = torch.exp(logps.detach() - part.old)
        return loss, step_metrics(part, logits.detach(), ratio, None if kl is None else kl.detach(), names, rl)

    def token_kl(self, part: MicroBatch, logps: Tensor, logits: Tensor, ref_logits: Tensor | None) -> Tensor:
        """The estimate of KL(policy‖reference) of every token, (rows, length), with its gradients."""
        assert part.ref is not None
        if self.kl_estimator == "exact":
            assert ref_logits is not None
            return reverse_kl(logits.log_softmax(-1), ref_logits.log_softmax(-1))
        return kl_estimate(logps, part.ref, self.kl_estimator)

    # Across processes, and into files

    def _everywhere(self, values: Tensor, function: Any) -> Tensor:
        """A function of the values of all processes; this process's rows of it."""
        if self.world_size == 1:
            return function(values)
        gathered = self.all_gather(values.to(self.policy.device))
        whole = function(gathered.flatten(0, 1).cpu())  # pyright: ignore
        return whole[self.trainer.global_rank * len(values) :][: len(values)]

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of metrics.jsonl and samples into completions.jsonl, and hand the same to the logger."""
        super().write_metrics(step, metrics)
        if self.rl.log_completions and self._samples:
            self._log_samples(step)

    def _log_samples(self, step: int) -> None:
        if self.run_dir is not None:
            for sample in self._samples:
                append_line(self.run_dir / "completions.jsonl", {"step": step} | sample)
        text = "\n\n".join(f"{s['prompt']} → {s['completion']} ({s['reward']:.3f})" for s in self._samples)
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("completions", text, step)
            elif isinstance(logger, WandbLogger):
                rows = [[str(value) for value in sample.values()] for sample in self._samples]
                logger.log_text("completions", columns=list(self._samples[0]), data=rows, step=step)

    # Held-out figures

    def evaluate(self, problems: Sequence[Problem], *, batch_size: int = 64) -> dict[str, Any]:
        """Figures of the current policy on held-out problems; see `nabla_rl.alignment.evaluation.evaluate`."""
        return evaluate(self, problems, gold=self._judges.get("gold"), batch_size=batch_size)

    def evaluate_step(self, step: int) -> None:
        """Write a line of evaluations.jsonl where `eval_steps` asks for it; its cost is not the training's."""
        every, trainer = self.rl.eval_steps, self._trainer
        if every is None or (step % every and step != self.rl.max_steps):
            return
        if trainer is not None and not trainer.is_global_zero:
            return
        start = time.perf_counter()
        spent = {"flops": self.all_flops, "num_tokens": self.all_tokens, "seconds": self.seconds}
        figures = self.evaluate(self.data.held_out)
        if self.run_dir is not None:
            append_line(self.run_dir / EVALUATIONS, {"step": step} | spent | figures)
        for logger in trainer.loggers if trainer is not None else ():
            plain = {f"eval/{name}": value for name, value in figures.items() if isinstance(value, float)}
            logger.log_metrics(plain, step=step)
        self.started += time.perf_counter() - start
