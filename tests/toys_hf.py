"""Tiny Hugging Face models with random weights, made in milliseconds: nothing is read from disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import SORTING, build_tokenizer
from nabla_rl.decoding import AbstractDecoder, Decoded, Setting
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy, Rollout
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward

VOCAB = 31
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
}
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def build_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return sharpened(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **SPECIAL, **overrides})))


def build_classifier(seed: int = 1, **overrides) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**{**SHAPE, **SPECIAL, "num_labels": 1, **overrides})).eval()


def build_qwen2(seed: int = 0, **overrides) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return sharpened(Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, **SPECIAL, "tie_word_embeddings": False, **overrides})))


def build_mistral(seed: int = 0, **overrides) -> MistralForCausalLM:
    """Attention within a window of 4 tokens."""
    torch.manual_seed(seed)
    return sharpened(MistralForCausalLM(MistralConfig(**{**SHAPE, **SPECIAL, "sliding_window": 4, **overrides})))


def build_gpt2(seed: int = 0, **overrides) -> GPT2LMHeadModel:
    """The one whose float64 is float64 throughout, and whose positions are learned."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(gpt2_config(**overrides)).eval()


def build_gpt2_classifier(seed: int = 1, **overrides) -> GPT2ForSequenceClassification:
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(gpt2_config(num_labels=1, **overrides)).eval()


def gpt2_config(**overrides) -> GPT2Config:
    shape = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    return GPT2Config(**{**shape, **SPECIAL, **overrides})


def sharpened(model):
    """Separate input and output embeddings, and a law that is far from uniform."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    return model.eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(SORTING)


@cache
def chat_tokenizer() -> PreTrainedTokenizerBase:
    made = build_tokenizer(SORTING)
    made.chat_template = CHAT_TEMPLATE
    return made


@cache
def policy() -> Policy:
    """Three tokens end a completion, so that lengths differ."""
    return Policy(build_llama(eos_token_id=[2, 9, 17]), tokenizer())


@cache
def reward() -> SequenceClassifierReward:
    return SequenceClassifierReward(build_classifier(), tokenizer())


@cache
def models() -> tuple[Policy, SequenceClassifierReward]:
    return policy(), reward()


def decode(
    decoder: AbstractDecoder,
    asked: Sequence[Problem],
    policy: Policy | None = None,
    reward: AbstractReward | None = None,
    **given,
) -> tuple[list[Decoded], Ledger]:
    """Answers, and the ledger that they are booked on; `given` is the rest of the setting."""
    ours, theirs = models()
    ledger = Ledger(len(asked))
    return decoder.decode(asked, Setting(policy or ours, reward or theirs, ledger, **given)), ledger


def greedy(policy: Policy, prefix: Prefix, length: int, **options) -> Rollout:
    """The likeliest token at every position, `length` of them at most."""
    return policy.rollout(prefix, Sampling(0.0, max_new_tokens=length), **options)


def problems(n: int = 16) -> list[Problem]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(n):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        letters = [chr(97 + int(c)) for c in torch.randint(26, (length,), generator=generator)]
        made.append(Problem(f"p{index}", "".join(letters), "".join(sorted(letters))))
    return made


def prompts(n: int = 3, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [5, 2, 8, 3, 6][:n]
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def completions(n: int = 3, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [4, 7, 1, 3, 6][:n]
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def one_hot(ids: Tensor, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.one_hot(ids, vocab).to(dtype)


def prefill(policy_or_backbone, rows: Sequence[Sequence[int]]) -> Prefix:
    return policy_or_backbone.prefill(rows, torch.arange(len(rows)), Ledger(len(rows)))


def reference_log_probs(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """The model's own uncached forward over one whole sequence: log π at each completion position, (length, vocab)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def reference_logps(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    return reference_log_probs(model, prompt, ids).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)


def reference_soft_log_probs(model: PreTrainedModel, prompt: Sequence[int], token_probs: Tensor) -> Tensor:
    """The same for soft tokens (length, vocab), mixed in one dense product; differentiable."""
    table = model.get_input_embeddings().weight
    embeds = torch.cat([table[torch.tensor(prompt)], token_probs @ table])
    return model(inputs_embeds=embeds[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def reference_reward(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """The classifier's head at the last token of one sequence (its own pooling would skip a final padding token)."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).last_hidden_state
        return float(model.get_submodule("score")(hidden[0, -1]))
