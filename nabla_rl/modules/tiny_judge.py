"""Training of the embedded judges: is the prefix right so far, at every token of a completion?

A causal classifier can only compare a token with the model's own prediction of it one layer after that prediction is
complete, so a judge is a finished language model with fresh layers on top. It learns on the policy's own samples, on
solutions with one wrong token (hard negatives) and on right ones, with a label at every token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import Family, generate
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.modules.tiny import warmup_stable_decay


def judge_from_language_model(model: LlamaForCausalLM, extra_layers: int) -> LlamaForSequenceClassification:
    """A classifier with the language model's weights and `extra_layers` fresh layers above them."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers += extra_layers
    config.num_labels = 1
    config.tie_word_embeddings = False
    judge = LlamaForSequenceClassification(config)
    weights = {name.removeprefix("model."): value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    judge.model.load_state_dict(weights, strict=False)
    return judge


def process_labels(tokens: Sequence[int], right: Sequence[int]) -> list[int]:
    """For each token of a completion: 1 while it agrees with the right solution from its start, 0 from the first error on."""
    labels, good = [], True
    for index, token in enumerate(tokens):
        good = good and index < len(right) and token == right[index]
        labels.append(int(good))
    return labels


def token_weights(labels: Tensor) -> Tensor:
    """Weight of each token's loss: the first wrong token counts most, those after it little.

    Until a judge can see the first error, what follows it carries no signal, only noise; afterwards it is easy.

    Args:
        labels: (batch, length), 1 right so far, 0 not, -100 not judged.

    Returns:
        (batch, length), `FIRST_ERROR` at first wrong tokens, `AFTER_ERROR` at later ones, 1 elsewhere.
    """
    wrong = labels == 0
    before = F.pad(wrong[:, :-1], (1, 0))
    weights = torch.ones_like(labels, dtype=torch.float32)
    return weights.masked_fill(wrong & ~before, FIRST_ERROR).masked_fill(wrong & before, AFTER_ERROR)


def corrupt(tokens: Sequence[int], alphabet: Sequence[int], rng: random.Random) -> list[int]:
    """The solution with one token of `alphabet` replaced by another one of it: a hard negative."""
    places = [index for index, token in enumerate(tokens) if token in alphabet]
    place = rng.choice(places)
    wrong = rng.choice([token for token in alphabet if token != tokens[place]])
    return [*tokens[:place], wrong, *tokens[place + 1 :]]


FIRST_ERROR, AFTER_ERROR = 4.0, 0.1
"""Weights of the loss at the first wrong token of a completion, and at those after it."""

JudgedRow = tuple[list[int], list[int], list[int]]
"""Prompt ids, completion ids, and the completion's labels."""


class JudgedBatches(IterableDataset):
    """Endless batches of labelled completions of fresh training problems; chunk k depends on (seed, k) alone.

    A quarter of a batch are right solutions, a quarter corrupted ones, half are samples of the policy at temperature 1.

    Yields `input_ids` (batch, length) and `labels` (batch, length): 0 or 1 on completion tokens, -100 elsewhere.
    """

    CHUNK = 32
    """Batches whose samples are drawn together."""

    def __init__(self, family: Family, policy: Policy, *, batch_size: int, seed: int, start: int):
        self.family, self.policy, self.batch_size, self.seed, self.start = family, policy, batch_size, seed, start
        vocabulary = policy.tokenizer.get_vocab()
        self.alphabet = [vocabulary[t] for t in family.alphabet]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        chunk, skip = divmod(self.start, self.CHUNK)
        while True:
            for rows in self.draw(chunk)[skip:]:
                yield self.collate(rows)
            chunk, skip = chunk + 1, 0

    def draw(self, chunk: int) -> list[list[JudgedRow]]:
        """The CHUNK batches of one chunk, each of rows of similar length."""
        rng = random.Random(f"{self.seed}/{chunk}")
        source = generate(self.family, "train", f"judge/{self.seed}/{chunk}")
        problems = [next(source) for _ in range(self.CHUNK * self.batch_size)]
        tokenizer, eos = self.policy.tokenizer, self.policy.tokenizer.eos_token_id
        prompts = [self.policy.encode_prompt(p.problem) for p in problems]
        rights = [[*tokenizer(p.solution, add_special_tokens=False).input_ids, eos] for p in problems]
        half, quarter = len(problems) // 2, len(problems) // 4
        completions = sample_completions(self.policy, problems[:half], (self.seed, chunk), self.family.max_new_tokens)
        completions += [corrupt(right, self.alphabet, rng) for right in rights[half : half + quarter]]
        completions += rights[half + quarter :]
        rows = [
            (prompt, completion, process_labels(completion, right))
            for prompt, completion, right in zip(prompts, completions, rights, strict=True)
        ]
        rng.shuffle(rows)
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))  # little padding in a batch
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def collate(self, rows: list[JudgedRow]) -> dict[str, Tensor]:
        width = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
        for row, (prompt, completion, label) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : end] = torch.tensor(label)
        return {"input_ids": ids, "labels": labels}


def sample_completions(policy: Policy, problems: Sequence[Problem], key: tuple, max_new_tokens: int) -> list[list[int]]:
    """One completion (ids, with the end token) of each problem, sampled at temperature 1."""
    accounts = torch.zeros(len(problems), dtype=torch.int64)
    prefix = policy.prefill([policy.encode_prompt(p.problem) for p in problems], accounts, Ledger(1))
    generators = [seeded_generator(*key, index) for index in range(len(problems))]
    rollout = policy.rollout(prefix, generators=generators, max_new_tokens=max_new_tokens)
    return [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]


class TinyJudge(L.LightningModule):
    """Training of a judge: binary cross-entropy of "right so far" at every completion token."""

    def __init__(
        self,
        model: LlamaForSequenceClassification,
        policy: Policy,
        family: Family,
        *,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        warmup: int = 100,
        decay: float = 0.3,
        max_steps: int = 1000,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.family = model, family
        self.policy = [policy]  # in a list: not a part of this module's weights
        self.batch_size, self.learning_rate, self.seed = batch_size, learning_rate, seed
        self.warmup, self.decay, self.max_steps = warmup, decay, max_steps

    def train_dataloader(self) -> JudgedBatches:
        return JudgedBatches(
            self.family, self.policy[0], batch_size=self.batch_size, seed=self.seed, start=self.trainer.global_step
        )

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        hidden = self.model.model(input_ids=batch["input_ids"]).last_hidden_state
        values = self.model.score(hidden).squeeze(-1).float()
        judged = batch["labels"] >= 0
        weights = token_weights(batch["labels"])[judged]
        losses = F.binary_cross_entropy_with_logits(values[judged], batch["labels"][judged].float(), reduction="none")
        loss = (weights * losses).sum() / weights.sum()
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", ((values > 0) == (batch["labels"] > 0))[judged].float().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_stable_decay(step, warmup=self.warmup, total=self.max_steps, decay=self.decay),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
