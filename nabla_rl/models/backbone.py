"""A frozen causal transformer with a key-value prefix that is encoded once, for hard ids and for soft tokens.

Policy and reward model share this: both read a prompt, then completions, and both need gradients with respect to the
completion's tokens. Layout of every batch: prefixes are left padded, what is fed after them is right padded, positions
are explicit. A row's results therefore do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nabla_rl.functional.relaxation import SoftTokens
from nabla_rl.ledger import Ledger, Stopwatch
from nabla_rl.models.flops import FlopFormula
from nabla_rl.types import UserError


@dataclass
class Prefix:
    """Encoded tokens of a batch: what later tokens attend to.

    Attributes:
        keys, values: one (batch, heads, length, head_dim) tensor for each layer, left padded.
        mask: (batch, length), True at real tokens.
        hidden: (batch, hidden), the last layer's state at the last real token: what predicts the next one.
        problems: (batch,), the problem that each row belongs to, for the ledger.
        ledger: where passes on top of this prefix are booked.
        earned: (batch,), what the completion tokens in it have earned already, for a reward that adds up over tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    hidden: Tensor
    problems: Tensor
    ledger: Ledger
    earned: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)

    def __len__(self) -> int:
        return self.mask.shape[0]

    def select(self, rows: Tensor) -> Prefix:
        """The rows `rows` (indices; repeats allowed), without columns that are padding in all of them."""
        mask = self.mask[rows]
        skip = int(mask.shape[1] - mask.sum(-1).max()) if len(rows) else 0
        return Prefix(
            [k[rows][:, :, skip:] for k in self.keys],
            [v[rows][:, :, skip:] for v in self.values],
            mask[:, skip:],
            self.hidden[rows],
            self.problems[rows.to(self.problems.device)],
            self.ledger,
            None if self.earned is None else self.earned[rows],
        )

    @staticmethod
    def cat(parts: Sequence[Prefix]) -> Prefix:
        """The rows of several prefixes, one after another."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.mask.shape[1] for part in parts)

        def padded(tensors: list[Tensor]) -> Tensor:
            return torch.cat([nn.functional.pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors])

        return Prefix(
            [padded([part.keys[layer] for part in parts]) for layer in range(len(parts[0].keys))],
            [padded([part.values[layer] for part in parts]) for layer in range(len(parts[0].values))],
            torch.cat([nn.functional.pad(part.mask, (width - part.mask.shape[1], 0)) for part in parts]),
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.problems for part in parts]),
            parts[0].ledger,
            None if parts[0].earned is None else torch.cat([part.earned for part in parts if part.earned is not None]),
        )


@dataclass
class Encoded:
    """A prefix and the completion tokens that were fed after it, ready to be cut anywhere.

    Attributes:
        prefix: the prefix they stand on.
        keys, values: (batch, heads, prefix + length, head_dim) for each layer.
        mask: (batch, length), True at real completion tokens that have been fed.
        hidden: (batch, length + 1, hidden): state i predicts token i (state 0 is the prefix's own).
        earned: (batch, length + 1), what the first i completion tokens have earned, the prefix's own included.
    """

    prefix: Prefix
    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    hidden: Tensor
    earned: Tensor | None = None

    def tracks(self, start: Sequence[int]) -> list[Track]:
        """The rows one by one, without padding; `start` are the completion tokens that each prefix holds already."""
        columns = torch.cat([self.prefix.mask, self.mask], 1)
        tracks = []
        for row, (length, problem) in enumerate(
            zip(self.mask.sum(-1).tolist(), self.prefix.problems.tolist(), strict=True)
        ):
            real = columns[row].nonzero().squeeze(-1)
            keys = [k[row : row + 1, :, real] for k in self.keys]
            values = [v[row : row + 1, :, real] for v in self.values]
            hidden = self.hidden[row, : length + 1]
            earned = None if self.earned is None else self.earned[row, : length + 1]
            tracks.append(Track(keys, values, hidden, start[row], problem, self.prefix.ledger, earned))
        return tracks

    def prefix_at(self, lengths: Tensor) -> Prefix:
        """The prefix extended by the first `lengths` (batch,) completion tokens of each row. No model runs."""
        steps = torch.arange(self.mask.shape[1], device=self.mask.device)
        mask = torch.cat([self.prefix.mask, self.mask & (steps < lengths[:, None])], 1)
        width = int(mask.sum(-1).max())
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, mask.shape[1] - width :]
        rows = torch.arange(len(mask), device=mask.device)

        def aligned(tensor: Tensor) -> Tensor:
            return tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))

        return Prefix(
            [aligned(k) for k in self.keys], [aligned(v) for v in self.values], mask.gather(1, order),
            self.hidden[rows, lengths], self.prefix.problems, self.prefix.ledger,
            None if self.earned is None else self.earned[rows, lengths],
        )  # fmt: skip


@dataclass
class Track:
    """One encoded sequence that can be cut anywhere: what a decoder keeps of a completion, so that nothing is read
    twice.

    Attributes:
        keys, values: (1, heads, prefix + length, head_dim) for each layer, without padding.
        hidden: (length + 1, hidden): state i predicts the i-th token after the prefix.
        start: completion tokens that are part of the prefix already.
        problem: its ledger account.
        ledger: where passes on top of it are booked.
        earned: (length + 1,), as in `Encoded`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor
    start: int
    problem: int
    ledger: Ledger
    earned: Tensor | None = None

    def spliced(self, tail: Track) -> Track:
        """The sequence that agrees with this one up to `tail.start` tokens and goes on as `tail`."""
        kept, earned = slice(tail.start - self.start), None
        if self.earned is not None and tail.earned is not None:
            earned = torch.cat([self.earned[kept], tail.earned])
        return replace(tail, hidden=torch.cat([self.hidden[kept], tail.hidden]), start=self.start, earned=earned)

    @property
    def before(self) -> int:
        """Tokens that come before the completion: the prompt's."""
        return self.keys[0].shape[2] - (len(self.hidden) - 1) - self.start

    def prefix_at(self, length: int) -> Prefix:
        """Prompt and the first `length` completion tokens (at least `start`), as a batch of one. No model runs."""
        fed = length - self.start
        end = self.keys[0].shape[2] - (self.hidden.shape[0] - 1) + fed
        device = self.hidden.device
        return Prefix(
            [k[:, :, :end] for k in self.keys],
            [v[:, :, :end] for v in self.values],
            torch.ones(1, end, dtype=torch.bool, device=device),
            self.hidden[fed][None],
            torch.tensor([self.problem]),
            self.ledger,
            None if self.earned is None else self.earned[fed][None],
        )


class SoftEmbedding(torch.autograd.Function):
    """Σ_v p_v E_v over a support, where `tokens` may say that p is exactly one-hot: then the forward is a look-up.

    Without a support p may be wider or narrower than the embedding matrix, as models of one family pad it to
    different sizes: ids that the matrix does not have count as a zero embedding. The backward adds to `gradient_sum`,
    and returns nothing, where it can.
    """

    @staticmethod
    def forward(
        ctx,
        token_probs: Tensor,
        weight: Tensor,
        support: Tensor | None,
        tokens: Tensor | None,
        gradient_sum: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(weight, support)
        ctx.dtype, ctx.width = token_probs.dtype, token_probs.shape[-1]
        fits = support is None and ctx.width == len(weight)
        ctx.sum = gradient_sum if fits else None
        if tokens is not None:
            return weight[tokens]
        if support is None:
            return token_probs[..., : len(weight)].to(weight.dtype) @ weight[: ctx.width]
        return torch.stack(
            [p.to(weight.dtype)[:, None] @ weight[s] for p, s in zip(token_probs, support, strict=True)]
        ).squeeze(2)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        weight, support = ctx.saved_tensors
        if ctx.sum is not None and ctx.sum.dtype == grad.dtype and not grad.requires_grad:
            ctx.sum.flatten(0, -2).addmm_(grad.flatten(0, -2), weight.T)
            return None, None, None, None, None
        if support is None:
            known = (grad @ weight[: ctx.width].T).to(ctx.dtype)
            missing = ctx.width - known.shape[-1]
            return nn.functional.pad(known, (0, missing)) if missing else known, None, None, None, None
        rows = [(weight[s] @ g[..., None]).squeeze(-1) for s, g in zip(support, grad, strict=True)]
        return torch.stack(rows).to(ctx.dtype), None, None, None, None


class Backbone(nn.Module):
    """The transformer under a policy or a reward model.

    Args:
        model: a Hugging Face causal language model or sequence classifier. Its weights are frozen here.
        name: "policy" or "reward": whose account its passes are booked on.
    """

    def __init__(self, model: PreTrainedModel, name: str):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.base = model.base_model
        self.name = name
        self.formula = FlopFormula.of(model)
        self._captured: list[Tensor] | None = None

    @contextmanager
    def capture_input_gradients(self) -> Iterator[list[Tensor]]:
        """Collect the gradients that arrive at the soft inputs' embeddings, (batch, length, hidden), in call order."""
        self._captured = []
        try:
            yield self._captured
        finally:
            self._captured = None

    @property
    def weight(self) -> Tensor:
        """The input embedding matrix, (vocab, hidden)."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def context_length(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], problems: Tensor, ledger: Ledger) -> Prefix:
        """Encode prompts, once: `prompts` are token ids, `problems` the ledger accounts of the rows."""
        for ids in prompts:
            if len(ids) == 0:
                raise UserError(f"{self.name}", "a prompt of at least one token", "an empty one")
            if len(ids) >= self.context_length:
                raise UserError(
                    f"{self.name}",
                    f"a prompt shorter than the model's context of {self.context_length} tokens",
                    f"one of {len(ids)}",
                    "Shorten the problem or take a model with a longer context.",
                )
        width = max(len(ids) for ids in prompts)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device).bool()
        ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=self.device)
        lengths = mask.sum(-1)
        watch, cache = Stopwatch(self.device), DynamicCache()
        with ledger.phase("prefill"):
            hidden = self.base(
                input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=cache, use_cache=True,
            ).last_hidden_state[:, -1]  # fmt: skip
            flops = self.formula.forward(lengths, torch.zeros_like(lengths))
            ledger.record(self.name, "forward", problems, lengths, flops, watch.seconds())
        keys, values = cache_tensors(cache)
        return Prefix(keys, values, mask, hidden, problems, ledger)

    def encode(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Encoded:
        """Feed completion ids (batch, length), right padded with `mask` False, after a prefix."""
        return self._encode(prefix, {"input_ids": ids}, mask)

    def encode_soft(
        self, prefix: Prefix, tokens: SoftTokens, mask: Tensor, *, support: Tensor | None = None
    ) -> Encoded:
        """Feed relaxed completion tokens after a prefix; gradients flow to `tokens.probs`.

        Args:
            prefix: Encoded prompts, not changed.
            tokens: Probabilities (batch, length, support or vocab); `ids` are those of the vocabulary.
            mask: (batch, length), True at real tokens; what is longer than it is not fed.
            support: (batch, length, support) token ids of the last axis; None means the whole vocabulary in order.
        """
        width, count = tokens.probs.shape[-1], mask.sum(-1)
        # cut after the product: the backward then pads embeddings, not probabilities
        embeds = SoftEmbedding.apply(tokens.probs, self.weight, support, tokens.ids, tokens.gradient_sum)
        embeds = embeds[:, : mask.shape[1]]
        encoded = self._encode(prefix, {"inputs_embeds": embeds}, mask)
        context = prefix.lengths
        product = self.formula.soft_embedding(count, width)
        if tokens.ids is None:
            prefix.ledger.record(self.name, "forward", prefix.problems, count, product, is_pass=False)
        flops = self.formula.backward(count, context) + product
        self._book_pass_back(encoded.hidden, embeds, prefix, count, flops)
        return encoded

    def encode_forks(self, prefix: Prefix, positions: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        """Read single tokens that fork off an encoded sequence, all in one pass under a tree attention mask.

        Token j of a row stands at depth `positions[j]`: it sees the encoded tokens before that depth, and itself. What
        it gives is what a pass over those tokens and it alone would have given, at the price of one token. Where
        `embeds` ask for gradients, each token's reach it through its own query, key and value alone, as nothing else
        sees it: all own-token gradients come from one backward.

        Args:
            prefix: encoded prompts and completions, not changed.
            positions: (batch, n), how many tokens of the sequence (prompt included) come before each fork.
            embeds: (batch, n, hidden), input embeddings of the forks.
            mask: (batch, n), True at real forks.

        Returns:
            (batch, n, hidden), the last layer's state at each fork.
        """
        count, context = mask.sum(-1), prefix.lengths
        depth = prefix.mask.cumsum(-1) - 1
        seen = prefix.mask[:, None] & (depth[:, None] < positions[..., None])
        own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device).expand(len(mask), -1, -1)
        allowed = torch.cat([seen, own], -1)[:, None]
        bias = torch.zeros_like(allowed, dtype=embeds.dtype).masked_fill(~allowed, torch.finfo(embeds.dtype).min)
        watch = Stopwatch(self.device)
        hidden = self.base(
            inputs_embeds=embeds,
            attention_mask=bias,
            position_ids=positions,
            past_key_values=build_cache(prefix),
            use_cache=True,
        ).last_hidden_state
        flops = self.formula.forward(count, context)
        prefix.ledger.record(self.name, "forward", prefix.problems, count, flops, watch.seconds())
        self._book_pass_back(hidden, embeds, prefix, count, self.formula.backward(count, context))
        return hidden

    def _book_pass_back(self, hidden: Tensor, embeds: Tensor, prefix: Prefix, count: Tensor, flops: Tensor) -> None:
        """Book the backward from `hidden` to `embeds` when it comes, with its seconds, on the phase of now."""
        if not hidden.requires_grad:
            return
        ledger, phase, watches = prefix.ledger, prefix.ledger.phase_name, []

        def start(_: Tensor) -> None:
            watches[:] = [Stopwatch(self.device)]

        def book(gradient: Tensor) -> None:
            if self._captured is not None:
                self._captured.append(gradient)
            with ledger.phase(phase):
                ledger.record(self.name, "backward", prefix.problems, count, flops, watches[0].seconds())

        hidden.register_hook(start)
        embeds.register_hook(book)

    def _encode(self, prefix: Prefix, inputs: dict[str, Tensor], mask: Tensor) -> Encoded:
        if mask.shape[1] == 0:
            return Encoded(prefix, prefix.keys, prefix.values, mask, prefix.hidden[:, None])
        longest = int((prefix.lengths + mask.sum(-1)).max())
        if longest > self.context_length:
            raise UserError(
                f"{self.name}",
                f"prompt and completion to fit the model's context of {self.context_length} tokens",
                str(longest),
                "Shorten the problem or lower {sampling.max_new_tokens}.",
            )
        cache = build_cache(prefix)
        watch = Stopwatch(self.device)
        hidden = self.base(
            **inputs,
            attention_mask=torch.cat([prefix.mask, mask], 1).long(),
            position_ids=prefix.lengths[:, None] + (mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        flops = self.formula.forward(mask.sum(-1), prefix.lengths)
        prefix.ledger.record(self.name, "forward", prefix.problems, mask.sum(-1), flops, watch.seconds())
        keys, values = cache_tensors(cache)
        return Encoded(prefix, keys, values, mask, torch.cat([prefix.hidden[:, None], hidden], 1))

    def record_head(self, prefix: Prefix, count: Tensor) -> None:
        """Book logits or scores of `count` (batch,) positions on the forward that they belong to."""
        prefix.ledger.record(self.name, "forward", prefix.problems, count, self.formula.head(count), is_pass=False)

    def book_backward(
        self, tensor: Tensor, prefix: Prefix, count: Tensor, flops: Tensor, *, is_pass: bool = True
    ) -> None:
        """Book a backward through `tensor` when it comes, on the phase of now (see `Ledger.record`)."""
        if not tensor.requires_grad:
            return
        phase = prefix.ledger.phase_name

        def book(_: Tensor) -> None:
            with prefix.ledger.phase(phase):
                prefix.ledger.record(self.name, "backward", prefix.problems, count, flops, is_pass=is_pass)

        tensor.register_hook(book)


def build_cache(prefix: Prefix) -> DynamicCache:
    """A cache that starts with a prefix. It concatenates, so the prefix's own tensors stay as they are.

    Every layer keeps all its keys, sliding windows included: the model masks what is out of a window, while a cache
    that dropped it could not be padded or cut.
    """
    return DynamicCache(list(zip(prefix.keys, prefix.values, strict=True)))


def cache_tensors(cache: DynamicCache) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer."""
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]  # pyright: ignore
