"""What the benchmarks share: random-weight models, their bare forward and backward passes, timing, tables, JSON."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from nabla_rl.data.tiny import SORTING, build_tokenizer  # noqa: E402
from nabla_rl.decoding.objective import Objective  # noqa: E402
from nabla_rl.ledger import Ledger  # noqa: E402
from nabla_rl.models.backbone import Prefix  # noqa: E402
from nabla_rl.models.policy import Policy  # noqa: E402
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward  # noqa: E402


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="file for the figures; those of other benchmarks in it are kept")
    made.add_argument("--quick", action="store_true", help="small shapes and few repetitions: does it run?")
    return made


def llama(
    kind: type[PreTrainedModel], *, dtype: torch.dtype, device: torch.device | str, seed: int, **shape: Any
) -> Any:
    """A Llama model of a shape, with small random weights, made on the device."""
    shape = {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | shape
    if kind is LlamaForSequenceClassification:
        shape |= {"num_labels": 1}
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(LlamaConfig(tie_word_embeddings=False, attn_implementation="sdpa", **shape)).eval()
    finally:
        torch.set_default_dtype(before)


def policy_and_reward(
    policy: Mapping[str, int], reward: Mapping[str, int], *, dtype: torch.dtype, device: torch.device | str
) -> tuple[Policy, SequenceClassifierReward]:
    """A language model and a sequence classifier with random weights, as the package wraps them."""
    tokenizer = build_tokenizer(SORTING)  # its few tokens are not used: ids are drawn from the whole vocabulary
    actor = llama(LlamaForCausalLM, dtype=dtype, device=device, seed=0, **policy)
    judge = llama(LlamaForSequenceClassification, dtype=dtype, device=device, seed=1, **reward)
    return Policy(actor, tokenizer), SequenceClassifierReward(judge, tokenizer)


def random_ids(batch: int, length: int, vocab: int, device: torch.device | str, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(4, vocab, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def build_objective(
    policy: Policy, reward: SequenceClassifierReward, batch: int, prompt: int, length: int, *, hard: bool = True
) -> Objective:
    """Completions of `length` tokens after cached random prompts, over the whole vocabulary."""
    ledger, accounts = Ledger(batch), torch.arange(batch)
    prompts = random_ids(batch, prompt, policy.vocab_size, "cpu", seed=1).tolist()
    prefixes = [backbone.prefill(prompts, accounts, ledger) for backbone in (policy.backbone, reward.backbone)]
    mask = torch.ones(batch, length, dtype=torch.bool, device=policy.device)
    return Objective(policy, reward, *prefixes, mask, None, hard)


class Bare:
    """The models' own forward and backward passes at hard tokens, written with transformers and nothing else.

    `policy()` feeds tokens 1..L-1 after the cached prompt, takes log_softmax of the L positions' logits (float32) and
    their sum at the tokens, and differentiates it: ∂/∂y = log π + (∂/∂embedding) Eᵀ, (batch, L, vocab). `reward()`
    feeds tokens 1..L after the judge's own cached prompt, reads the classifier's logit at the last one, and
    differentiates it: (∂/∂embedding) Eᵀ, (batch, L, vocab).

    Tokens enter as embedding look-ups, or with `dense=True` as what autograd needs in order to do all this by itself:
    a float32 one-hot tensor (batch, L, vocab) times the embedding matrix, and the likelihood as a product with it.
    Nothing else happens: no optimiser, no relaxation, no search for changed tokens, and the gradients are not added
    up.
    """

    def __init__(self, objective: Objective, ids: Tensor):
        self.actor, self.judge = objective.policy.backbone.model, objective.reward.backbone.model  # pyright: ignore
        self.prefixes = (objective.policy_prefix, objective.reward_prefix)
        self.ids = ids
        self.positions = self.prefixes[0].lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)

    def policy(self, dense: bool = False) -> tuple[Tensor, Tensor]:
        """Log-likelihoods and their gradient to the one-hot tokens."""
        matrix = self.actor.get_input_embeddings().weight
        probs, embeds = self._inputs(matrix, dense)
        hidden = self._hidden(self.actor, self.prefixes[0], embeds[:, :-1])
        hidden = torch.cat([self.prefixes[0].hidden[:, None], hidden], 1)
        log_probs = self.actor.get_output_embeddings()(hidden).float().log_softmax(-1)
        if probs is not None:
            logps = (probs * log_probs).sum((-1, -2))
            return logps.detach(), torch.autograd.grad(logps.sum(), probs)[0]
        logps = log_probs.gather(-1, self.ids[..., None]).sum((-1, -2))
        (gradient,) = torch.autograd.grad(logps.sum(), embeds)
        return logps.detach(), (gradient @ matrix.T).float().add_(log_probs.detach())

    def reward(self, dense: bool = False) -> tuple[Tensor, Tensor]:
        """Rewards and their gradient to the one-hot tokens."""
        matrix = self.judge.get_input_embeddings().weight
        probs, embeds = self._inputs(matrix, dense)
        rewards = self.judge.get_submodule("score")(self._hidden(self.judge, self.prefixes[1], embeds)[:, -1])
        rewards = rewards.float().squeeze(-1)
        if probs is not None:
            return rewards.detach(), torch.autograd.grad(rewards.sum(), probs)[0]
        (gradient,) = torch.autograd.grad(rewards.sum(), embeds)
        return rewards.detach(), (gradient @ matrix.T).float()

    def _inputs(self, matrix: Tensor, dense: bool) -> tuple[Tensor | None, Tensor]:
        if not dense:
            return None, matrix[self.ids].requires_grad_()
        probs = torch.zeros(*self.ids.shape, len(matrix), device=self.ids.device)
        probs.scatter_(-1, self.ids[..., None], 1.0).requires_grad_()
        return probs, probs.to(matrix.dtype) @ matrix

    def _hidden(self, model: Any, prefix: Prefix, embeds: Tensor) -> Tensor:
        cache = DynamicCache(list(zip(prefix.keys, prefix.values, strict=True)), config=model.config)
        mask = torch.ones(len(embeds), prefix.mask.shape[1] + embeds.shape[1], dtype=torch.long, device=embeds.device)
        return model.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=self.positions[:, : embeds.shape[1]],
            past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip


def clock(device: torch.device) -> float:
    """Seconds: this process's own on a CPU, which other processes do not lengthen; wall time on a GPU, once it is
    idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def interleave(
    works: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each piece of work, one after another and then backwards, `repetitions` times in all, after a
    warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(-warmup, repetitions):
        order = list(works) if repetition % 2 == 0 else list(works)[::-1]
        for name in order:
            start = clock(device)
            result = works[name]()
            seconds = clock(device) - start
            del result
            if repetition >= 0:
                times[name].append(seconds)
    return times


def ratio(times: Mapping[str, Sequence[float]], above: str, below: str) -> tuple[float, float, float]:
    """Median of the quotients of neighbouring repetitions, and their quartiles."""
    quotients = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
    return (
        statistics.median(quotients),
        quotients[len(quotients) // 4],
        quotients[math.ceil(len(quotients) * 3 / 4) - 1],
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for index, row in enumerate(cells):
        print(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
        if index == 0:
            print("  ".join("-" * width for width in widths))


def write_json(path: Path | None, name: str, figures: Mapping[str, Any]) -> None:
    """Put one benchmark's figures into a JSON file, beside those of the others."""
    if path is None:
        return
    held = json.loads(path.read_text()) if path.is_file() else {}
    held[name] = {"torch": torch.__version__, "threads": torch.get_num_threads(), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=2) + "\n")
