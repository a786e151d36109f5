"""The policy: a frozen causal language model that is sampled from, scored, and differentiated with respect to
tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_rl.functional.logps import (
    categorical_from_uniform,
    compute_entropy,
    log_softmax,
    selective_log_softmax,
    top_p_filter,
    upcast,
)
from nabla_rl.functional.relaxation import SoftTokens
from nabla_rl.ledger import Ledger, Stopwatch
from nabla_rl.models.backbone import Backbone, Encoded, Prefix
from nabla_rl.models.prompts import encode_prompt, special_id
from nabla_rl.models.sampling import Sampling
from nabla_rl.models.stepping import open_steps
from nabla_rl.types import UserError

COMPACT_BELOW = 0.7
"""A rollout drops its ended rows from the batch when fewer than this share of the rows are still going."""


@dataclass
class Rollout:
    """Completions of a batch.

    Attributes:
        ids: (batch, length), right padded.
        mask: (batch, length), True up to and including the end-of-sequence token.
        logps: (batch, length), the policy's own log-probabilities of the tokens (temperature 1), zero at padding.
        sampling_logps: (batch, length), log-probabilities under the law the tokens were drawn from (temperature and
            nucleus applied; zero for greedy), zero at padding.
        finished: (batch,), did the completion end by itself, or was it cut at the maximum length?
        logits: (batch, length, vocab) before temperature, float32 (float64 for a float64 model), where they were
            asked for.
        encoded: keys, values and hidden states of prefix and completion, where states were asked for.
        entropy: (batch, length), of the policy at temperature 1, zero at padding, where states were asked for.
        top_ids, top_logps: (batch, length, k), the policy's likeliest tokens at each position and their
            log-probabilities, where they were asked for.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor
    sampling_logps: Tensor
    finished: Tensor
    logits: Tensor | None = None
    encoded: Encoded | None = None
    entropy: Tensor | None = None
    top_ids: Tensor | None = None
    top_logps: Tensor | None = None


class SupportLogProbs(torch.autograd.Function):
    """log π on a support, from hidden states, without keeping anything of the vocabulary's width.

    log π(s_j) = h·W_{s_j} - log Σ_v exp(h·W_v), so ∂/∂h of Σ_j c_j log π(s_j) is Σ_j c_j W_{s_j} - (Σ_j c_j) m with
    the mean output embedding m = Σ_v softmax(hW)_v W_v. The forward computes m a few positions at a time and keeps it:
    O(length·hidden).
    """

    CHUNK_CPU, CHUNK = 32, 256  # positions: on a GPU fewer would read the head's weights too often

    @staticmethod
    def parts(rows: Tensor) -> list[slice]:
        """A few rows at a time."""
        size = SupportLogProbs.CHUNK_CPU if rows.device.type == "cpu" else SupportLogProbs.CHUNK
        return [slice(start, start + size) for start in range(0, len(rows), size)]

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, support: Tensor) -> Tensor:
        flat_hidden, flat_support = hidden.flatten(0, 1), support.flatten(0, 1)
        means, chunks = torch.empty_like(flat_hidden), []
        for part in SupportLogProbs.parts(flat_hidden):
            logits = upcast(flat_hidden[part] @ weight.T)
            total = logits.logsumexp(-1, keepdim=True)
            chunks.append(logits.gather(-1, flat_support[part]) - total)
            means[part] = logits.sub_(total).exp_().to(weight.dtype) @ weight
        ctx.save_for_backward(weight, support, means)
        return torch.cat(chunks).view(support.shape)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        weight, support, means = ctx.saved_tensors
        grad, flat_support, out = grad.flatten(0, 1).to(weight.dtype), support.flatten(0, 1), torch.empty_like(means)
        for part in SupportLogProbs.parts(grad):
            picked = (grad[part, None] @ weight[flat_support[part]]).squeeze(1)
            out[part] = picked - grad[part].sum(-1, keepdim=True) * means[part]
        return out.view(*support.shape[:2], -1), None, None


class Policy(nn.Module):
    """A causal language model with its tokenizer, frozen.

    Args:
        model: any Hugging Face causal language model.
        tokenizer: its tokenizer; where it has a chat template, prompts are written with it.
        system_prompt: the system turn of that template; ignored (with an error when set) without a template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None = None
    ):
        super().__init__()
        self.backbone = Backbone(model, "policy")
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        eos = {special_id(tokenizer, "eos")}
        for config in (model.config, model.generation_config):
            ids = None if config is None else config.eos_token_id
            eos |= set(ids if isinstance(ids, list) else [ids])
        ends = sorted(token for token in eos if token is not None)
        if not ends:
            raise UserError(
                "policy.name", "a model with an end-of-sequence token", "none", "Set `eos_token` on the tokenizer."
            )
        self.register_buffer("eos_ids", torch.tensor(ends, device=self.backbone.device), persistent=False)
        pad = special_id(tokenizer, "pad")
        self.pad_id = ends[0] if pad is None else pad

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    @property
    def max_new_tokens(self) -> int:
        """Maximum tokens of a completion by the model's own generation config; 512 without one, or half the context
        where that is less."""
        config = self.backbone.model.generation_config
        own = None if config is None else config.max_new_tokens
        return own or min(512, max(self.backbone.context_length // 2, 1))

    @property
    def head_weight(self) -> Tensor:
        """The output embedding matrix, (vocab, hidden)."""
        head = self.backbone.model.get_output_embeddings()
        assert head is not None
        return head.weight

    def encode_prompt(self, problem: str) -> list[int]:
        """The ids that ask `problem` of this model."""
        return encode_prompt(self.tokenizer, problem, system_prompt=self.system_prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of completion ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def prefill(self, prompts: Sequence[Sequence[int]], problems: Tensor, ledger: Ledger) -> Prefix:
        """Encode prompts once (see `Backbone.prefill`)."""
        return self.backbone.prefill(prompts, problems, ledger)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, (..., vocab), in float32 (float64 for a float64 model)."""
        head = self.backbone.model.get_output_embeddings()
        assert head is not None
        return upcast(head(hidden))

    def next_logits(self, prefix: Prefix) -> Tensor:
        """Logits of the token that follows each prefix, (batch, vocab). No transformer pass."""
        return self.logits(prefix.hidden)

    @torch.no_grad()
    def completion_logps(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
        """log π of given completion ids, (batch, length) float32, zero at padding. Gradient-free."""
        encoded = self.backbone.encode(prefix, ids[:, :-1], mask[:, 1:])
        self.backbone.record_head(prefix, mask.sum(-1))
        logps = self.logits(encoded.hidden).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return logps.masked_fill(~mask, 0.0)

    def completion_log_probs(
        self,
        prefix: Prefix,
        tokens: SoftTokens,
        mask: Tensor,
        *,
        support: Tensor | None = None,
    ) -> Tensor:
        """log π(· | x, y_<i) at every position of a relaxed completion, with gradients to `tokens.probs`.

        Args:
            prefix: the encoded prompt.
            tokens: Probabilities (batch, length, support or vocab); `ids` are those of the vocabulary.
            mask: (batch, length), True at real positions (right padded).
            support: (batch, length, support) token ids of the last axis; None means the whole vocabulary.

        Returns:
            (batch, length, support or vocab), float32.
        """
        # token i is predicted from the tokens before it: the last one is not fed
        encoded = self.backbone.encode_soft(prefix, tokens, mask[:, 1:], support=support)
        count = mask.sum(-1)
        self.backbone.record_head(prefix, count)
        hidden = encoded.hidden
        # the first position's state is the prefix's own and needs no backward
        later = (count - 1).clamp(min=0)
        self.backbone.book_backward(hidden, prefix, later, self.backbone.formula.head(later), is_pass=False)
        if support is None:
            return log_softmax(self.logits(hidden))
        return SupportLogProbs.apply(hidden, self.head_weight, support)

    @torch.no_grad()
    def rollout(
        self,
        prefix: Prefix,
        sampling: Sampling,
        generators: Sequence[torch.Generator] | None = None,
        *,
        lengths: Tensor | None = None,
        first_tokens: Tensor | None = None,
        stops: Tensor | None = None,
        keep_states: bool = False,
        keep_logits: bool = False,
        keep_top: int = 0,
    ) -> Rollout:
        """Sample completions to the end.

        Args:
            prefix: Encoded prompts, one row for each completion wanted; not changed.
            sampling: Temperature, nucleus and maximum length.
            generators: One CPU generator for each row, on which alone its tokens depend; None where nothing is drawn.
            lengths: (batch,), maximum tokens of each row; None is `sampling.max_new_tokens` for all.
            first_tokens: (batch,), tokens to begin with, instead of a draw (their `sampling_logps` are zero).
            stops: Token ids that end a rollout as its length does: it is not `finished`.
            keep_states: Return keys, values, hidden states and entropies, so that any position can become a prefix
                without a pass.
            keep_logits: Return the raw logits of every position.
            keep_top: Number of likeliest tokens to return at every position.

        Raises:
            UserError: The model gave logits that are not finite.
        """
        temperature, top_p = sampling.temperature, sampling.top_p
        max_new_tokens = sampling.length if lengths is None else int(lengths.max())
        rows, device = len(prefix), self.device
        greedy = temperature == 0
        uniforms = None
        if not greedy:
            assert generators is not None
            uniforms = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators]).to(device)
        ids = torch.full((rows, max_new_tokens), self.pad_id, device=device)
        mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
        dtype = torch.promote_types(prefix.hidden.dtype, torch.float32)
        logps, sampling_logps, entropy = (
            torch.zeros(rows, max_new_tokens, dtype=dtype, device=device) for _ in range(3)
        )
        store = _Store(rows, max_new_tokens, prefix) if keep_states else None
        kept_logits: list[Tensor] = []
        top_ids = torch.zeros(rows, max_new_tokens, keep_top, dtype=torch.int64, device=device)
        top_logps = torch.zeros(rows, max_new_tokens, keep_top, dtype=dtype, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        lengths = None if lengths is None else lengths.to(device)

        active, hidden = torch.arange(rows, device=device), prefix.hidden
        live = torch.ones_like(active, dtype=torch.bool)  # rows of the running batch that have not ended
        steps, length = open_steps(self.backbone, prefix), 0
        watch, seconds = Stopwatch(device), []
        while True:
            logits = self.logits(hidden)
            if not torch.isfinite(logits).all():
                raise UserError(
                    "policy.dtype", "finite logits", "NaN or infinity", "Check the weights, or use float32."
                )
            alive = active[live]
            if length == 0 and first_tokens is not None:
                tokens = first_tokens
            elif greedy:
                tokens = logits.argmax(-1)
            else:
                assert uniforms is not None
                filtered = top_p_filter(logits / temperature, top_p)
                tokens = categorical_from_uniform(filtered, uniforms[active, length])
                drawn = selective_log_softmax(filtered, tokens)
                sampling_logps[alive, length] = drawn[live]
            ids[alive, length], mask[alive, length] = tokens[live], True
            logps[alive, length] = selective_log_softmax(logits, tokens)[live]
            if keep_states:
                entropy[alive, length] = compute_entropy(logits)[live]
            if keep_top:
                best = log_softmax(logits).topk(keep_top, -1)
                top_ids[alive, length], top_logps[alive, length] = best.indices[live], best.values[live]
            if keep_logits:
                full = logits.new_zeros(rows, logits.shape[-1])
                full[alive] = logits[live]
                kept_logits.append(full)
            if store is not None:
                store.hidden[active, length] = hidden
            length += 1
            ended = torch.isin(tokens, self.get_buffer("eos_ids")) & live
            finished[active[ended]] = True
            live = live & ~ended
            if lengths is not None:
                live = live & (lengths[active] > length)
            if stops is not None:
                live = live & ~torch.isin(tokens, stops)
            if length == max_new_tokens or not live.any():
                if store is not None:
                    store.add(active, *steps.tensors())
                break
            if live.float().mean() < COMPACT_BELOW:
                if store is not None:
                    gone = (~live).nonzero().squeeze(-1)
                    store.add(active[gone], *([t[gone] for t in tensors] for tensors in steps.tensors()))
                index = live.nonzero().squeeze(-1)
                active, tokens, live = active[index], tokens[index], live[index]
                steps.keep(index)
            context = steps.columns.sum(-1)
            # rows that have ended run on until they are dropped, perhaps beyond the context
            hidden = steps.step(tokens, context.clamp(max=self.backbone.context_length - 1))
            seconds.append(watch.seconds())
            watch = Stopwatch(device)
        self._book(prefix, mask[:, :length], seconds)
        return Rollout(
            ids[:, :length],
            mask[:, :length],
            logps[:, :length],
            sampling_logps[:, :length],
            finished,
            torch.stack(kept_logits, 1) if keep_logits else None,
            store.encoded(length, mask) if store is not None else None,
            entropy[:, :length] if keep_states else None,
            top_ids[:, :length] if keep_top else None,
            top_logps[:, :length] if keep_top else None,
        )

    def _book(self, prefix: Prefix, mask: Tensor, seconds: list[float]) -> None:
        """Book a rollout: a pass for every token that another one followed, and the head for every token."""
        fed = mask[:, 1:].cpu()  # booked once, not step by step: the device need not be waited for
        contexts = prefix.lengths.cpu()[:, None] + torch.arange(fed.shape[1])
        flops = self.backbone.formula.forward(fed, contexts).sum(-1)
        prefix.ledger.record_steps("policy", "forward", prefix.problems, fed, flops, seconds)
        self.backbone.record_head(prefix, mask.sum(-1))


class _Store:
    """Collects keys, values and hidden states of rows that leave a rollout at different times."""

    def __init__(self, rows: int, max_new_tokens: int, prefix: Prefix):
        self.prefix, self.rows = prefix, rows
        self.hidden = torch.zeros(
            rows, max_new_tokens + 1, prefix.hidden.shape[-1], dtype=prefix.hidden.dtype, device=prefix.hidden.device
        )
        self.parts: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []

    def add(self, rows: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        self.parts.append((rows, keys, values))

    def encoded(self, length: int, mask: Tensor) -> Encoded:
        """The last sampled token of a row was never fed: it counts as not encoded."""
        fed = mask[:, 1:length]
        width = self.prefix.mask.shape[1] + length - 1

        def assembled(pick: int) -> list[Tensor]:
            layers = []
            for layer, like in enumerate(self.prefix.keys):
                whole = like.new_zeros(self.rows, like.shape[1], width, like.shape[3])
                for part in self.parts:
                    tensor = part[pick][layer]  # pyright: ignore
                    whole[part[0], :, : tensor.shape[2]] = tensor
                layers.append(whole)
            return layers

        return Encoded(self.prefix, assembled(1), assembled(2), fed, self.hidden[:, :length])
