"""Groups of completions of one prompt, scored with gradients to the policy's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from nabla_rl.ledger import Ledger, Stopwatch
from nabla_rl.models.backbone import cache_tensors
from nabla_rl.models.policy import Policy


def group_logits(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    ids: Tensor,
    mask: Tensor,
    ledger: Ledger,
    *,
    trainable: int = 0,
) -> Tensor:
    """The logits that predict every token of the completions, with gradients where grad mode is on.

    Each prompt is read once for its whole group, gradients included, and its keys and values are shared: what a
    trainer saves that repeats it for every completion. Nothing is approximated.

    Args:
        policy: the language model, with or without an adapter in it.
        prompts: P prompts, as token ids.
        ids: (P · G, length), right padded; rows G·i … G·i + G - 1 are the completions of prompt i.
        mask: (P · G, length), True at real tokens.
        ledger: its account 0 gets forward and backward.
        trainable: weights that get a gradient, for the ledger.

    Returns:
        (P · G, length, vocab), float32 (float64 for a float64 model), before temperature.
    """
    backbone, size, device = policy.backbone, len(ids) // len(prompts), policy.device
    width = max(map(len, prompts))
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device).bool()
    prompt_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = prompt_mask.sum(-1)
    watch, cache = Stopwatch(device), DynamicCache()
    hidden = backbone.base(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=(prompt_mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    flops = [backbone.formula.forward(lengths, torch.zeros_like(lengths)).sum()]
    back = [backbone.formula.backward(lengths, torch.zeros_like(lengths)).sum()]
    hidden = hidden.repeat_interleave(size, 0)
    context, fed = lengths.repeat_interleave(size), mask[:, 1:]
    if fed.shape[1]:
        pairs = zip(*cache_tensors(cache), strict=True)
        shared = DynamicCache([(k.repeat_interleave(size, 0), v.repeat_interleave(size, 0)) for k, v in pairs])
        later = backbone.base(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([prompt_mask.repeat_interleave(size, 0), fed], 1).long(),
            position_ids=context[:, None] + (fed.cumsum(-1) - 1).clamp(min=0),
            past_key_values=shared,
            use_cache=True,
        ).last_hidden_state
        hidden = torch.cat([hidden, later], 1)
        flops.append(backbone.formula.forward(fed.sum(-1), context).sum())
        back.append(backbone.formula.backward(fed.sum(-1), context).sum())
    logits = policy.logits(hidden)
    tokens = (lengths.sum() + fed.sum())[None]
    head = backbone.formula.head(mask.sum()[None])
    account = torch.zeros(1, dtype=torch.int64)
    ledger.record("policy", "forward", account, tokens, sum(flops) + head, watch.seconds())  # pyright: ignore
    if logits.requires_grad:
        # through the activations, and once more for the weights that train
        total = sum(back) + head + 2.0 * trainable * tokens  # pyright: ignore
        ledger.record("policy", "backward", account, tokens, total)
    return logits
