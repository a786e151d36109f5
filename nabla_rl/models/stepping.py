"""One more token for every row of a rollout: the cached step that decoding spends most of its time in.

`GenericSteps` hands the step to transformers, which does for one token all that it does for a thousand: it builds a
mask, wraps a cache, and goes through several layers of calls that find nothing to do. For Llama's architecture
`LlamaSteps` calls the model's own submodules in the same order on the same shapes, so that its results are the same to
the last bit, and leaves the rest out. `open_steps` takes it wherever it is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nabla_rl.models.backbone import Backbone, Prefix, build_cache, cache_tensors


class Steps(ABC):
    """What the rows of a rollout have seen so far, and the pass that adds a token to each.

    Attributes:
        columns: (batch, length), True at real tokens.
    """

    columns: Tensor

    @abstractmethod
    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Feed one token (batch,) at its position (batch,) to every row: the last layer's state (batch, hidden)."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows`."""

    @abstractmethod
    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer, (batch, heads, length, head_dim)."""


def open_steps(backbone: Backbone, prefix: Prefix) -> Steps:
    """Begin a rollout after a prefix, which stays as it is."""
    return LlamaSteps(backbone, prefix) if is_plain_llama(backbone) else GenericSteps(backbone, prefix)


def is_plain_llama(backbone: Backbone) -> bool:
    """Does `LlamaSteps` do exactly what this model's own forward does? Hooks on the model want to see its passes."""
    base = backbone.base
    return (
        type(base) is LlamaModel
        and base.config._attn_implementation == "sdpa"
        and base.rotary_emb.rope_type == "default"
        and not base._forward_hooks
        and not base._forward_pre_hooks
    )


class GenericSteps(Steps):
    """Through the model's own forward."""

    def __init__(self, backbone: Backbone, prefix: Prefix):
        self.base, self.columns, self.cache = backbone.base, prefix.mask, build_cache(prefix)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.columns = with_column(self.columns)
        return self.base(
            input_ids=tokens[:, None],
            attention_mask=self.columns.long(),
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.columns = self.columns[rows]
        self.cache = DynamicCache([(k[rows], v[rows]) for k, v in zip(*cache_tensors(self.cache), strict=True)])

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        return cache_tensors(self.cache)


class LlamaSteps(Steps):
    """Through the submodules of a Llama model, in the order of its forward (transformers' `modeling_llama.py`)."""

    def __init__(self, backbone: Backbone, prefix: Prefix):
        base = backbone.base
        assert isinstance(base, LlamaModel)
        self.base, self.columns = base, prefix.mask
        self.keys, self.values = list(prefix.keys), list(prefix.values)
        self.layers = [layer for layer in base.layers if isinstance(layer, LlamaDecoderLayer)]
        self.head_dim = self.layers[0].self_attn.head_dim
        self.padded = not bool(prefix.mask.all())

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.columns = with_column(self.columns)
        # as transformers does: no mask where nothing is padded; one conversion to what is added, not one a layer
        bias = None
        hidden = self.base.embed_tokens(tokens[:, None])
        if self.padded:
            bias = torch.zeros_like(self.columns, dtype=hidden.dtype).masked_fill(~self.columns, -torch.inf)
            bias = bias[:, None, None]
        cos, sin = (t[:, :, None] for t in self.base.rotary_emb(hidden, position_ids=positions[:, None]))
        half = self.head_dim // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # the minus sign of the rotation, once for all layers
        shape = (len(tokens), 1, -1, self.head_dim)
        for index, layer in enumerate(self.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query, key = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
            # queries and keys turn alike: together, (batch, 1, heads, head_dim)
            both = torch.cat([query, key], 2)
            both = both * cos + torch.cat([both[..., half:], both[..., :half]], -1) * sin
            both = both.transpose(1, 2)
            heads = query.shape[2]
            self.keys[index] = torch.cat([self.keys[index], both[:, heads:]], 2)
            value = attention.v_proj(normed).view(shape).transpose(1, 2)
            self.values[index] = torch.cat([self.values[index], value], 2)
            mixed, _ = sdpa_attention_forward(
                attention, both[:, :heads], self.keys[index], self.values[index], bias, scaling=attention.scaling
            )
            hidden = hidden + attention.o_proj(mixed.reshape(len(tokens), 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.base.norm(hidden)[:, -1]

    def keep(self, rows: Tensor) -> None:
        self.columns = self.columns[rows]
        self.padded = not bool(self.columns.all())
        self.keys, self.values = ([t[rows] for t in tensors] for tensors in (self.keys, self.values))

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.keys, self.values


def with_column(columns: Tensor) -> Tensor:
    """A mask with one more real token in every row."""
    return torch.nn.functional.pad(columns, (0, 1), value=True)
