"""Distillation as a Lightning training loop: a LoRA adapter learns from the answers of decoding.

The module encodes rows of text, scores them and hands tensors to the losses in `nabla_rl.functional.distillation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from nabla_rl.adapters.training import AdapterTraining
from nabla_rl.data.problems import Problem
from nabla_rl.decoding.run import check_lengths
from nabla_rl.distillation.config import DistillConfig
from nabla_rl.distillation.data import Batches, DistillationData
from nabla_rl.distillation.rows import Method, Row
from nabla_rl.functional.distillation import Direction, dpo_loss, sft_loss, soft_target_kl
from nabla_rl.functional.logps import compute_entropy, selective_log_softmax, sequence_logps
from nabla_rl.models.adapters import LoraOptions, attach_adapter
from nabla_rl.models.groups import group_logits
from nabla_rl.models.loading import PolicyOptions, load_policy, qualified, resolve_name
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.types import UserError


class PolicyDistiller(AdapterTraining):
    """Trains a LoRA adapter of a student on what a teacher decoded.

    Args:
        policy: Student: the teacher's own policy, or a lighter one.
        method: Way to learn: sft, preference (DPO), soft (tilted next tokens), weighted (exp(r/β)).
        kl: Direction of the KL to soft targets: forward, KL(target‖student), or reverse.
        alternatives: Number of the teacher's likeliest tokens that soft targets are over.
        training: Settings of the training, in TRL's words.
        lora: Settings of the adapter, in PEFT's words.
        max_completion_length: Maximum tokens of an answer of the student; null is its own setting, or 512.
        family: Family of the embedded models that a bare name means.
        seed: Random seed.
    """

    def __init__(
        self,
        policy: PolicyOptions = PolicyOptions(),  # noqa: B008, frozen
        method: Method = "sft",
        kl: Direction = "forward",
        alternatives: int = 8,
        training: DistillConfig = DistillConfig(),  # noqa: B008, frozen
        lora: LoraOptions = LoraOptions(),  # noqa: B008, frozen
        max_completion_length: int | None = None,
        family: str = "sorting",
        seed: int = 0,
    ):
        super().__init__(training)
        if policy.adapter is not None:
            raise UserError(
                "policy.adapter",
                "none",
                repr(policy.adapter),
                "A new adapter is trained; merge the old one into the weights first.",
            )
        for name, value, low in (
            ("alternatives", alternatives, 2),
            ("max_completion_length", max_completion_length, 1),
        ):
            if value is not None and value < low:
                raise UserError(f"{name}", f"at least {low}", str(value))
        self.options, self.alternatives = replace(policy, name=qualified(policy.name, family)), alternatives
        self.method: Method = method
        self.direction: Direction = kl
        self.training_config, self.lora, self.seed = training, lora, seed
        self.max_completion_length, self.longest = max_completion_length, 0
        self.data: Any = None
        self.rows: list[Row] = []
        self.best: dict[str, Any] | None = None
        self._encoded: dict[str, list[int]] = {}

    def prepare(self, device: torch.device, data: DistillationData) -> None:
        """Load the student and put the adapter in, and check that the held-out problems fit."""
        self.use(load_policy(self.options, device=device), data, base_name=resolve_name(self.options.name))

    def use(self, policy: Policy, data: Any, *, base_name: str | None = None) -> None:
        """Train this policy's adapter.

        Raises:
            UserError: A held-out problem does not fit it.
        """
        self.longest = self.max_completion_length or policy.max_new_tokens
        for problems in (data.held_out, data.validation):
            check_lengths(problems, policy, None, self.longest, setting="max_completion_length")
        self.policy, self.data = policy, data
        self.adapter = attach_adapter(policy, self.lora, seed=self.seed, base_name=base_name)

    def learn_from(self, rows: Sequence[Row]) -> None:
        """Train on these rows.

        Raises:
            UserError: A row is longer than the student can read.
        """
        self.rows, limit = list(rows), self.policy.backbone.context_length
        for row in self.rows:
            longest = max(len(ids) for ids in self.completions(row)) + len(self.policy.encode_prompt(row["prompt"]))
            if longest > limit:
                raise UserError(
                    f"problem {row['id']!r}",
                    f"prompt and completion to fit the student's context of {limit} tokens",
                    str(longest),
                    "Leave it out, or take another student.",
                )

    # Lightning's hooks

    def train_dataloader(self) -> DataLoader:
        own = self.training_config
        items = [row.get("weight", 1.0) * sum(map(len, self.completions(row))) for row in self.rows]
        batches = Batches(
            self.rows, items, own, seed=self.seed, start=self.trainer.global_step * own.gradient_accumulation_steps,
            rank=self.trainer.global_rank, world_size=self.trainer.world_size,
        )  # fmt: skip
        return DataLoader(batches, batch_size=None)

    def training_step(self, batch: tuple[int, list[Row], float], batch_index: int) -> Tensor:
        """The loss of one micro-batch."""
        _, rows, num_items = batch
        loss, metrics = self.loss(rows, num_items)
        self.stop_if_not_finite(loss, "loss")
        if self.method != "preference":
            # it is divided by the tokens of all parts and processes, over whose number means are taken afterwards
            loss = loss * self.training_config.gradient_accumulation_steps * self.world_size
        self._metrics.append(metrics | {"loss": loss.item()})
        return loss

    def end_step(self) -> None:
        """Write metrics at the end of an optimiser step, and measure on validation problems every `eval_steps`."""
        own, step, metrics = self.training_config, self.trainer.global_step, self.merge_metrics()
        if self.data.validation and (step % own.eval_steps == 0 or step == own.max_steps):
            metrics["validation_accuracy"] = accuracy = self.validate()
            if self.best is None or accuracy >= self.best["accuracy"]:
                self.best = {"step": step, "accuracy": accuracy, "weights": self.adapter.state()}
            self.all_flops = self.flops * self.world_size
        if not self.trainer.is_global_zero:
            return
        self.log("loss", metrics["loss"], prog_bar=True, logger=False, rank_zero_only=True)
        if step % own.logging_steps == 0 or "validation_accuracy" in metrics:
            self.write_metrics(step, metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter alone of all weights, and the best weights so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["distiller"] = {"best": self.best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume the count of cost and the comparison of weights."""
        super().on_load_checkpoint(checkpoint)
        self.best = checkpoint["distiller"]["best"]

    def restore_best(self) -> None:
        """Go back to the weights that were best on the validation problems, where there are any."""
        if self.best is not None:
            set_peft_model_state_dict(self.adapter.peft, self.best["weights"])

    # Rows and their losses

    def completions(self, row: Row) -> list[list[int]]:
        """The ids of a row's completions: one, or the chosen and the rejected one."""
        if self.method == "soft":
            return [row["completion_ids"]]
        names = ("chosen", "rejected") if self.method == "preference" else ("completion",)
        return [self._encode(row[name]) for name in names]

    def _encode(self, text: str) -> list[int]:
        """A completion and the end of the sequence, as the student writes it."""
        if text not in self._encoded:
            self._encoded[text] = encode_completion(self.policy, text)
        return self._encoded[text]

    def tensors(self, rows: Sequence[Row]) -> tuple[list[list[int]], Tensor, Tensor]:
        """Prompts, and the ids (rows · completions, length) and mask of their completions, right padded."""
        prompts = [self.policy.encode_prompt(row["prompt"]) for row in rows]
        lists = [torch.tensor(ids) for row in rows for ids in self.completions(row)]
        ids = pad_sequence(lists, batch_first=True, padding_value=self.policy.pad_id)
        lengths = torch.tensor([len(each) for each in lists])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        device = self.policy.device
        return prompts, ids.to(device), mask.to(device)

    def loss(self, rows: Sequence[Row], num_items: float | None = None) -> tuple[Tensor, dict[str, float]]:
        """The loss of some rows with gradients to the adapter, and its metrics by TRL's names.

        Args:
            rows: Rows as `nabla_rl.distillation.rows.build_rows` makes them.
            num_items: Tokens of the whole step, which sums are divided by; None is those of `rows`. Preferences need
                none.
        """
        prompts, ids, mask = self.tensors(rows)
        self.num_tokens += int(mask.sum()) + sum(map(len, prompts))
        ref = self._ref_logps(prompts, ids, mask) if self.method == "preference" else None
        with self.ledger.phase("train"):
            trainable = self.adapter.num_weights if torch.is_grad_enabled() else 0
            logits = group_logits(self.policy, prompts, ids, mask, self.ledger, trainable=trainable)
        logps = selective_log_softmax(logits, ids)
        metrics = self._measure(logits.detach(), ids, mask)
        if ref is not None:
            loss, of_pairs = self._preference(sequence_logps(logps, mask), ref)
            own = self.training_config
            losses = {"sigmoid": loss, "sft": sft_loss(logps[::2], mask[::2])}
            weighted = zip(own.loss_type, own.loss_weights or [1.0] * len(own.loss_type), strict=True)
            return torch.stack([weight * losses[name] for name, weight in weighted]).sum(), metrics | of_pairs
        if self.method == "soft":
            return self._soft(logits, rows, mask, num_items), metrics
        weights = torch.tensor([row.get("weight", 1.0) for row in rows], device=logps.device)
        return sft_loss(logps, mask, weights=weights, num_items=num_items), metrics

    @torch.no_grad()
    def _ref_logps(self, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> Tensor:
        """log π_ref of whole completions. Before the forward that is differentiated: it touches requires_grad."""
        with self.adapter.disabled(), self.ledger.phase("reference"):
            logits = group_logits(self.policy, prompts, ids, mask, self.ledger)
        return sequence_logps(selective_log_softmax(logits, ids), mask)

    def _preference(self, logps: Tensor, ref: Tensor) -> tuple[Tensor, dict[str, float]]:
        beta = self.training_config.beta
        losses = dpo_loss(logps[::2], logps[1::2], ref[::2], ref[1::2], beta=beta)
        implicit = beta * (logps.detach() - ref)
        margins = implicit[::2] - implicit[1::2]
        return losses.mean(), {
            "rewards/chosen": implicit[::2].mean().item(),
            "rewards/rejected": implicit[1::2].mean().item(),
            "rewards/accuracies": (margins > 0).float().mean().item(),
            "rewards/margins": margins.mean().item(),
            "logps/chosen": logps[::2].mean().item(),
            "logps/rejected": logps[1::2].mean().item(),
        }

    def _soft(self, logits: Tensor, rows: Sequence[Row], mask: Tensor, num_items: float | None) -> Tensor:
        columns = (("target_ids", torch.int64), ("target_logps", torch.float32))
        target_ids, target_logps = (
            pad_sequence([torch.tensor(row[name], dtype=dtype) for row in rows], batch_first=True).to(logits.device)
            for name, dtype in columns
        )
        divergence = soft_target_kl(
            selective_log_softmax(logits, target_ids), target_logps.to(logits.dtype), direction=self.direction
        )
        return sequence_logps(divergence, mask).sum() / (num_items or float(mask.sum()))

    def _measure(self, logits: Tensor, ids: Tensor, mask: Tensor) -> dict[str, float]:
        count = mask.sum()
        return {
            "entropy": ((compute_entropy(logits) * mask).sum() / count).item(),
            "mean_token_accuracy": (((logits.argmax(-1) == ids) & mask).sum() / count).item(),
        }

    @torch.no_grad()
    def validate(self, *, batch_size: int = 256) -> float:
        """Greedy accuracy on the validation problems; its cost is part of the training's."""
        problems: list[Problem] = self.data.validation
        right = 0
        with self.ledger.phase("validate"):
            for start in range(0, len(problems), batch_size):
                part = problems[start : start + batch_size]
                prompts = [self.policy.encode_prompt(problem.problem) for problem in part]
                prefix = self.policy.prefill(prompts, torch.zeros(len(part), dtype=torch.int64), self.ledger)
                drawn = self.policy.rollout(prefix, Sampling(0.0, 1.0, self.longest))
                texts = [
                    self.policy.decode(ids[kept].tolist()) for ids, kept in zip(drawn.ids, drawn.mask, strict=True)
                ]
                right += sum(
                    problem.answer is not None and self.data.grade(text, problem.answer)
                    for text, problem in zip(texts, part, strict=True)
                )
        return right / len(problems)


def encode_completion(policy: Policy, text: str) -> list[int]:
    """The ids of a completion as the policy would write it, with the end of the sequence."""
    ids = list(policy.tokenizer(text, add_special_tokens=False).input_ids)
    eos = policy.tokenizer.eos_token_id
    return [*ids, eos if isinstance(eos, int) else int(policy.get_buffer("eos_ids")[0])]
