"""Training of the embedded tiny models: language models on endless fresh problems, judges on a policy's own
mistakes."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nabla_rl.data.tiny import Family, generate
from nabla_rl.models.prompts import special_id


def warmup_stable_decay(step: int, *, warmup: int, total: int, decay: float) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero over the last `decay` share of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    decay_steps = decay * total
    return min(1.0, (total - step) / decay_steps) if decay_steps else 1.0


class SolutionBatches(IterableDataset):
    """Endless batches of fresh training solutions. Batch k depends on (seed, k) alone, so a resumed run sees what is
    left.

    Yields `input_ids` (batch, length), right padded, and `labels`, -100 on the prompt and the padding.
    """

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, seed: int, start: int):
        self.family, self.tokenizer = family, tokenizer
        self.batch_size, self.seed, self.start = batch_size, seed, start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.start
        while True:
            problems = generate(self.family, "train", f"{self.seed}/{step}")
            yield self.encode([next(problems) for _ in range(self.batch_size)])
            step += 1

    def encode(self, problems) -> dict[str, Tensor]:
        eos, pad = special_id(self.tokenizer, "eos"), special_id(self.tokenizer, "pad") or 0
        prompts = self.tokenizer([f"{p.problem}\n" for p in problems]).input_ids
        solutions = self.tokenizer([p.solution for p in problems], add_special_tokens=False).input_ids
        rows = [(prompt, [*solution, eos]) for prompt, solution in zip(prompts, solutions, strict=True)]
        width = max(len(prompt) + len(solution) for prompt, solution in rows)
        ids = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), -100)
        for row, (prompt, solution) in enumerate(rows):
            end = len(prompt) + len(solution)
            ids[row, :end] = torch.tensor(prompt + solution)
            labels[row, len(prompt) : end] = torch.tensor(solution)
        return {"input_ids": ids, "labels": labels}


class TinyPretraining(L.LightningModule):
    """Next-token training of a tiny language model on solutions: cross-entropy on the completion tokens."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        family: Family,
        *,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        warmup: int = 100,
        decay: float = 0.0,
        max_steps: int = 1000,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.tokenizer, self.family = model, tokenizer, family
        self.batch_size, self.learning_rate, self.seed = batch_size, learning_rate, seed
        self.warmup, self.decay, self.max_steps = warmup, decay, max_steps

    def train_dataloader(self) -> SolutionBatches:
        return SolutionBatches(
            self.family, self.tokenizer, batch_size=self.batch_size, seed=self.seed, start=self.trainer.global_step
        )

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_stable_decay(step, warmup=self.warmup, total=self.max_steps, decay=self.decay),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
