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
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import Family, generate
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.tiny_world.language import warmup_stable_decay


def judge_from_language_model(model: LlamaForCausalLM, extra_layers: int) -> LlamaForSequenceClassification:
    """A classifier with the language model's weights and `extra_layers` fresh layers above them."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_hidden_layers += extra_layers
    config.num_labels = 1
    config.tie_word_embeddings = False
    judge = LlamaForSequenceClassification(config)
    weights = {
        name.removeprefix("model."): value for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    judge.model.load_state_dict(weights, strict=False)
    return judge


def with_fresh_layers(judge: LlamaForSequenceClassification, extra_layers: int) -> LlamaForSequenceClassification:
    """The judge with `extra_layers` more blocks below its last norm that change nothing yet (their outputs are
    zero)."""
    if not extra_layers:
        return judge
    config = type(judge.config).from_dict(judge.config.to_dict())
    config.num_hidden_layers += extra_layers
    deeper = LlamaForSequenceClassification(config)
    deeper.load_state_dict(judge.state_dict(), strict=False)
    for layer in deeper.model.layers[-extra_layers:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return deeper


def process_labels(tokens: Sequence[int], right: Sequence[int]) -> list[int]:
    """For each token of a completion: 1 while it agrees with the right solution from its start, 0 from the first
    error on."""
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


@torch.no_grad()
def agreement(base: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """For each token, (batch, length): 1 if it is what the language model would have written there, else 0.

    After an error it says whether the solution is at least consistent with it.
    """
    expected = base(input_ids=input_ids).logits.argmax(-1)[:, :-1]
    return F.pad((expected == input_ids[:, 1:]).long(), (1, 0))


def corrupt(tokens: Sequence[int], alphabet: Sequence[int], rng: random.Random) -> list[int]:
    """The solution with one token of `alphabet` replaced by another one of it: a hard negative."""
    places = [index for index, token in enumerate(tokens) if token in alphabet]
    place = rng.choice(places)
    wrong = rng.choice([token for token in alphabet if token != tokens[place]])
    return [*tokens[:place], wrong, *tokens[place + 1 :]]


FIRST_ERROR, AFTER_ERROR = 4.0, 0.1
"""Weights of the loss at the first wrong token of a completion and at those after it."""

REPLACED = 0.25
"""Share of tokens replaced in agreement batches."""

JudgedRow = tuple[list[int], list[int], list[int]]
"""Prompt ids, completion ids, and the completion's labels."""


class JudgedBatches(IterableDataset):
    """Endless batches of labelled completions of fresh training problems; chunk k depends on (seed, k) alone.

    A quarter of a batch are right solutions, a quarter corrupted ones, half are samples of the policy at temperature
    1. Where answers are judged, half of the right and of the corrupted ones give way to solutions with a wrong step
    that may or may not come back to the right answer (`Family.slip`): the policy's own samples have few of those.

    The first `agreement_steps` batches are something simpler: see `agreement`.

    Yields `input_ids` (batch, length), `labels` (batch, length): 0 or 1 on completion tokens, -100 elsewhere, and
    `weights`.
    """

    CHUNK = 32
    """Batches whose samples are drawn together."""

    def __init__(
        self,
        family: Family,
        policy: Policy,
        base: LlamaForCausalLM,
        *,
        batch_size: int,
        seed: int,
        start: int,
        agreement_steps: int,
        answer_weight: float = 0.0,
        slips: bool = False,
    ):
        self.family, self.policy, self.base = family, policy, base
        self.answer_weight, self.slip = answer_weight, family.slip if slips else None
        self.batch_size, self.seed, self.start, self.agreement_steps = batch_size, seed, start, agreement_steps
        vocabulary = policy.tokenizer.get_vocab()
        self.alphabet = [vocabulary[t] for t in family.alphabet]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.start, self.agreement_steps):
            yield self.agreement(step)
        chunk, skip = divmod(max(self.start - self.agreement_steps, 0), self.CHUNK)
        while True:
            for rows in self.draw(chunk)[skip:]:
                yield self.collate(rows)
            chunk, skip = chunk + 1, 0

    @torch.no_grad()
    def agreement(self, step: int) -> dict[str, Tensor]:
        """Solutions with many tokens replaced; the label says whether a token is what the base model would have
        written.

        This asks for nothing but the comparison that judging rests on, with a signal at every token.
        """
        rng = random.Random(f"agreement/{self.seed}/{step}")
        source = generate(self.family, "train", f"agreement/{self.seed}/{step}")
        tokenizer, rows = self.policy.tokenizer, []
        for problem in (next(source) for _ in range(self.batch_size)):
            right = [*tokenizer(problem.solution, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            noisy = [rng.choice(self.alphabet) if rng.random() < REPLACED else token for token in right]
            rows.append((self.policy.encode_prompt(problem.problem), noisy, [0] * len(noisy)))
        batch = self.collate(rows)
        batch["labels"] = torch.where(batch["labels"] >= 0, agreement(self.base, batch["input_ids"]), batch["labels"])
        return batch | {"weights": torch.ones_like(batch["labels"], dtype=torch.float32)}

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
        if self.slip is not None:
            start, stop = half + quarter // 2, half + quarter + quarter // 2
            slipped = [self.slip(problem, rng) for problem in problems[start:stop]]
            ids = [[*tokenizer(text, add_special_tokens=False).input_ids, eos] for text in slipped]
            completions = [*completions[:start], *ids, *completions[stop:]]
        rows = [
            (prompt, completion, self.label(completion, right))
            for prompt, completion, right in zip(prompts, completions, rights, strict=True)
        ]
        rng.shuffle(rows)
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))  # little padding in a batch
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def label(self, completion: list[int], right: list[int]) -> list[int]:
        """Right so far, at every token; at the end token, where answers are judged, whether the answer is right.

        Steps can go wrong and come back, and an outcome is about the answer.
        """
        labels = process_labels(completion, right)
        if self.answer_weight and completion[-1] == right[-1]:
            answer, wanted = (self.family.extract(self.policy.decode(ids)) for ids in (completion, right))
            labels[-1] = int(answer == wanted)
        return labels

    def collate(self, rows: list[JudgedRow]) -> dict[str, Tensor]:
        width = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
        for row, (prompt, completion, label) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : end] = torch.tensor(label)
        weights = token_weights(labels)
        if self.answer_weight:
            ends = [len(prompt) + len(completion) - 1 for prompt, completion, _ in rows]
            weights[torch.arange(len(rows)), torch.tensor(ends)] = self.answer_weight
        return {"input_ids": ids, "labels": labels, "weights": weights}


def sample_completions(
    policy: Policy, problems: Sequence[Problem], key: tuple, max_new_tokens: int
) -> list[list[int]]:
    """One completion (ids, with the end token) of each problem, sampled at temperature 1."""
    accounts = torch.zeros(len(problems), dtype=torch.int64)
    prefix = policy.prefill([policy.encode_prompt(p.problem) for p in problems], accounts, Ledger(1))
    generators = [seeded_generator(*key, index) for index in range(len(problems))]
    rollout = policy.rollout(prefix, Sampling(1.0, 1.0, max_new_tokens), generators)
    return [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]


class TinyJudge(L.LightningModule):
    """Training of a judge: binary cross-entropy of "right so far" at every completion token."""

    def __init__(
        self,
        model: LlamaForSequenceClassification,
        base: LlamaForCausalLM,
        policy: Policy,
        family: Family,
        *,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        warmup: int = 100,
        decay: float = 0.3,
        max_steps: int = 1000,
        agreement_steps: int = 0,
        base_learning_rate: float = 2e-4,
        answer_weight: float = 0.0,
        slips: bool = False,
        agreement_weight: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.answer_weight, self.slips, self.agreement_weight = answer_weight, slips, agreement_weight
        # Reads what enters the last two layers, which can then count what it sees. Not kept with the judge.
        width = model.config.hidden_size
        self.agreement = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, 1))
        self.agreement.requires_grad_(agreement_weight > 0)
        self.model, self.base, self.family = model, [base], family
        self.agreement_steps, self.base_learning_rate = agreement_steps, base_learning_rate
        self.policy = [policy]  # in a list: not a part of this module's weights
        self.batch_size, self.learning_rate, self.seed = batch_size, learning_rate, seed
        self.warmup, self.decay, self.max_steps = warmup, decay, max_steps

    def train_dataloader(self) -> JudgedBatches:
        return JudgedBatches(
            self.family,
            self.policy[0],
            self.base[0],
            batch_size=self.batch_size,
            seed=self.seed,
            start=self.trainer.global_step,
            agreement_steps=self.agreement_steps,
            answer_weight=self.answer_weight,
            slips=self.slips,
        )

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """While the fresh layers learn to compare, what they read stays as it is."""
        thawed = self.trainer.global_step >= self.agreement_steps
        for parameter in self.base_parameters():
            parameter.requires_grad_(thawed)

    def base_parameters(self) -> list[torch.nn.Parameter]:
        """The weights that come from the language model."""
        layers = self.model.model.layers[: self.base[0].config.num_hidden_layers]
        return [p for module in (self.model.model.embed_tokens, *layers) for p in module.parameters()]

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        read = self.model.model(input_ids=batch["input_ids"], output_hidden_states=self.agreement_weight > 0)
        values = self.model.score(read.last_hidden_state).squeeze(-1).float()
        judged = batch["labels"] >= 0
        weights = batch["weights"][judged]
        losses = F.binary_cross_entropy_with_logits(values[judged], batch["labels"][judged].float(), reduction="none")
        loss = (weights * losses).sum() / weights.sum()
        self.log("loss", loss, prog_bar=True)
        if self.agreement_weight:
            agrees = self.agreement(read.hidden_states[-3]).squeeze(-1)
            loss = loss + self.agreement_weight * F.binary_cross_entropy_with_logits(
                agrees[judged], agreement(self.base[0], batch["input_ids"])[judged].float()
            )
        self.log("accuracy", ((values > 0) == (batch["labels"] > 0))[judged].float().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self):
        base = self.base_parameters()
        known = {id(parameter) for parameter in base}
        fresh = [parameter for parameter in self.parameters() if id(parameter) not in known]
        groups = [{"params": fresh, "lr": self.learning_rate}, {"params": base, "lr": self.base_learning_rate}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_stable_decay(step, warmup=self.warmup, total=self.max_steps, decay=self.decay),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
