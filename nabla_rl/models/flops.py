"""Operations of a causal transformer, by formula.

A forward costs 2N a token for the N weights of the blocks' linear layers, plus 4·heads·head_dim·layers for each pair
of query and key (the scores and the weighted values, without a discount for the causal mask: what
`torch.utils.flop_counter` counts too). A backward to activations with frozen weights costs the same again for the
linear layers and twice the attention term. Embedding look-ups are free; a soft embedding (probabilities times
embedding matrix) costs 2·support·hidden a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class FlopFormula:
    """The constants of one model."""

    block_weights: int
    attention_width: int
    hidden: int
    head_width: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> FlopFormula:
        config = model.config
        tables = [
            m for m in model.modules() if isinstance(m, nn.Embedding)
        ]  # of tokens, and of positions where learned
        embeddings = {id(p) for m in (*tables, model.get_output_embeddings()) if m is not None for p in m.parameters()}
        heads = {
            id(p) for name, p in model.named_parameters() if name.split(".")[0] in ("score", "lm_head", "classifier")
        }
        block_weights = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings | heads)
        head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        width = config.num_hidden_layers * config.num_attention_heads * head_dim
        return cls(block_weights, width, config.hidden_size, _head_width(model))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """`tokens` new tokens on top of `context` cached ones, per sequence."""
        tokens, context = tokens.double(), context.double()
        return 2 * self.block_weights * tokens + 4 * self.attention_width * tokens * (context + tokens)

    def backward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """The backward of the same to the input embeddings, weights frozen."""
        tokens, context = tokens.double(), context.double()
        return 2 * self.block_weights * tokens + 8 * self.attention_width * tokens * (context + tokens)

    def head(self, tokens: Tensor) -> Tensor:
        """Logits or scores of `tokens` positions; the backward to the hidden states costs the same."""
        return 2.0 * self.hidden * self.head_width * tokens.double()

    def soft_embedding(self, tokens: Tensor, support: int) -> Tensor:
        """Probabilities over `support` tokens times their embeddings, or the backward of it."""
        return 2.0 * self.hidden * support * tokens.double()


def _head_width(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0] if head is not None else model.config.num_labels or 1)
