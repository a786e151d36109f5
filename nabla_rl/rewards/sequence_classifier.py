"""A sequence classifier as a reward: outcome reward at the last token, process values at every token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_rl.functional.logps import upcast
from nabla_rl.functional.relaxation import SoftTokens
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Backbone, Encoded, Prefix, Track
from nabla_rl.models.loading import RewardOptions, load_classifier
from nabla_rl.models.prompts import encode_judged
from nabla_rl.rewards.base import AbstractProcessReward, Scored
from nabla_rl.types import UserError


class SequenceClassifierReward(AbstractProcessReward):
    """r(x, y) = the classifier's logit at the last real token of the conversation, pooled by mask.

    The same head read at token i is the process value V(y_≤i).

    Args:
        model: a Hugging Face causal sequence classifier with one label.
        tokenizer: its tokenizer; its own chat template writes the conversation where there is one.
        system_prompt: the system turn of that template.
        proposer: a copy of the model that was taught its gradient (`nabla_rl.tiny_world.taught`); where there is
            one, first-order changes are its, on top of what the untaught model has encoded.
    """

    name: ClassVar[str] = "sequence_classifier"

    @classmethod
    def load(cls, options: RewardOptions, *, device: torch.device, argument: str) -> SequenceClassifierReward:
        assert options.name is not None
        model, tokenizer = load_classifier(options.name, options, device=device, argument=f"{argument}.name")
        try:
            return cls(
                model, tokenizer, system_prompt=options.system_prompt,
                proposer=load_proposer(options, device=device, argument=argument),
            )  # fmt: skip
        except UserError as error:
            raise error.renamed(lambda name: name.replace("reward", argument, 1)) from error

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        proposer: PreTrainedModel | None = None,
    ):
        super().__init__()
        if model.config.num_labels != 1 or "score" not in dict(model.named_children()):
            raise UserError(
                "reward.name",
                "a sequence classifier with one label and a `score` head",
                f"{type(model).__name__} with {model.config.num_labels} labels",
                "Take a reward model.",
            )
        self.backbone = Backbone(model, "reward")
        self.proposer = None if proposer is None else Backbone(proposer, "reward")
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.tail = encode_judged(tokenizer, "?", system_prompt=system_prompt)[1]

    def prefill(self, problems: list[str], accounts: Tensor, ledger: Ledger) -> Prefix:
        prompts = [encode_judged(self.tokenizer, p, system_prompt=self.system_prompt)[0] for p in problems]
        return self.backbone.prefill(prompts, accounts, ledger)

    def forward(
        self,
        prefix: Prefix,
        tokens: SoftTokens,
        mask: Tensor,
        *,
        support: Tensor | None = None,
    ) -> Tensor:
        encoded = self.backbone.encode_soft(prefix, tokens, mask, support=support)
        return self._finish(encoded)

    @torch.no_grad()
    def score(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Scored:
        encoded = self.backbone.encode(prefix, ids, mask)
        return Scored(self._finish(encoded), encoded)

    @torch.no_grad()
    def values(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Tensor:
        encoded = self.backbone.encode(prefix, ids, mask)
        self.backbone.record_head(prefix, mask.sum(-1))
        return self._head(encoded.hidden[:, 1:])

    @torch.no_grad()
    def read(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> Encoded:
        return self.backbone.encode(prefix, ids, mask)

    @torch.no_grad()
    def encoded_values(self, encoded: Encoded) -> Tensor:
        self.backbone.record_head(encoded.prefix, encoded.mask.sum(-1))
        return self._head(encoded.hidden[:, 1:])

    @torch.no_grad()
    def fork_values(self, tracks: Sequence[Track], positions: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        prefix, depths = _cut(tracks, positions, mask)
        hidden = self.backbone.encode_forks(prefix, depths, self.backbone.weight[ids], mask)
        self.backbone.record_head(prefix, mask.sum(-1))
        return self._head(hidden)

    @torch.enable_grad()
    def fork_changes(
        self,
        tracks: Sequence[Track],
        positions: Tensor,
        ids: Tensor,
        mask: Tensor,
        alternatives: Tensor,
        *,
        create_graph: bool = False,
    ) -> Tensor:
        """As in the base class; `create_graph` keeps the graph, to teach the proposer its gradient."""
        prefix, depths = _cut(tracks, positions, mask)
        reader = self.proposer or self.backbone
        weight, count, formula = reader.weight, mask.sum(-1), reader.formula
        embeds = weight[ids].detach().requires_grad_()
        hidden = reader.encode_forks(prefix, depths, embeds, mask)
        reader.record_head(prefix, count)
        reader.book_backward(hidden, prefix, count, formula.head(count), is_pass=False)
        values = upcast(reader.model.get_submodule("score")(hidden)).squeeze(-1).masked_fill(~mask, 0.0)
        (gradient,) = torch.autograd.grad(values.sum(), embeds, create_graph=create_graph)
        products = formula.soft_embedding(count, alternatives.shape[-1])
        prefix.ledger.record("reward", "backward", prefix.problems, count, products, is_pass=False)
        difference = weight[alternatives] - weight[ids][:, :, None]
        return upcast(torch.einsum("bnh,bnkh->bnk", gradient, difference))

    def _finish(self, encoded: Encoded) -> Tensor:
        """Read the template's closing tokens, where there are any, and score the last token."""
        if self.tail:
            ids = torch.tensor([self.tail] * len(encoded.mask), device=encoded.mask.device)
            whole, count = encoded.prefix_at(encoded.mask.sum(-1)), torch.full_like(ids[:, 0], len(self.tail))
            encoded = self.backbone.encode(whole, ids, torch.ones_like(ids).bool())
            flops = self.backbone.formula.backward(count, whole.lengths)
            self.backbone.book_backward(encoded.hidden, whole, count, flops)
        prefix, rows = encoded.prefix, torch.arange(len(encoded.mask), device=encoded.mask.device)
        value, one = self._head(encoded.hidden[rows, encoded.mask.sum(-1)]), torch.ones_like(rows)
        self.backbone.record_head(prefix, one)
        self.backbone.book_backward(value, prefix, one, self.backbone.formula.head(one), is_pass=False)
        return value

    def _head(self, hidden: Tensor) -> Tensor:
        value = upcast(self.backbone.model.get_submodule("score")(hidden)).squeeze(-1)
        if not torch.isfinite(value).all():
            raise UserError("reward.dtype", "finite scores", "NaN or infinity", "Check the weights, or use float32.")
        return value


def load_proposer(options: RewardOptions, *, device: torch.device, argument: str) -> PreTrainedModel | None:
    """The copy that was taught its gradient, a model or a PEFT adapter; None where none is named."""
    taught = options.taught
    if taught is None:
        return None
    if (Path(taught) / "adapter_config.json").is_file():
        from nabla_rl.models.adapters import merge_adapter  # PEFT takes seconds to import

        copy, _ = load_classifier(str(options.name), options, device=device, argument=f"{argument}.name")
        return merge_adapter(copy, taught, argument=f"{argument}.taught")
    return load_classifier(taught, options, device=device, argument=f"{argument}.taught")[0]


def _cut(tracks: Sequence[Track], positions: Tensor, mask: Tensor) -> tuple[Prefix, Tensor]:
    """What forks at `positions` see of the tracks, as a batch, and how deep the forks stand in it."""
    last = positions.masked_fill(~mask, 0).amax(-1).tolist()
    prefix = Prefix.cat([track.prefix_at(at) for track, at in zip(tracks, last, strict=True)])
    before = torch.tensor([track.before for track in tracks], device=positions.device)
    return prefix, positions + before[:, None]
