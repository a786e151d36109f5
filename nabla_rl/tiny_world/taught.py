"""A judge is taught its own gradient: what the first-order change of its value says should be what happens.

An ordinary judge's gradient at a token says little about what another token would be worth (METHOD: rank correlation
0.14 on scratch models). Here a copy of the judge learns to read single tokens that fork off completions which the
*untaught* judge has encoded, so that its own-token gradient predicts the untaught judge's exact changes:

    ΔV̂_i(v) = (E_v - E_{y_i}) · ∂V̂_i/∂e_i   →   ΔV_i(v) = V(y_<i, v) - V(y_≤i)

Values, acceptance and all keys and values of other positions stay the untaught judge's: proposals are all that the
taught weights make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import lightning as L
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from nabla_rl.data.problems import Problem
from nabla_rl.data.tiny import Family, generate
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Track
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.tiny_world.language import warmup_stable_decay

MIN_ENTROPY = 0.02
"""Positions at which the policy is surer than that (nats) have no alternatives worth learning."""
POSITIONS = 12
"""Positions of one completion that are learnt from, at most."""
LIMIT = 8.0
"""Changes of the value (log-odds) beyond this are as good as this."""


@dataclass
class TaughtBatch:
    """Edits of sampled completions and what they are worth.

    Attributes:
        tracks: the completions as the untaught judge has encoded them.
        positions, ids, mask: (batch, n), where, the token that stands there, and which are real.
        alternatives: (batch, n, k), the policy's likeliest tokens there.
        logps: (batch, n, k), the policy's log-probabilities of them.
        changes: (batch, n, k), the untaught judge's exact V(y_<i, v) - V(y_≤i).
    """

    tracks: list[Track]
    positions: Tensor
    ids: Tensor
    mask: Tensor
    alternatives: Tensor
    logps: Tensor
    changes: Tensor


class TaughtBatches(IterableDataset):
    """Endless batches of edits of the policy's own completions; batch k depends on (seed, k) alone.

    Problems are fresh ones of a family, or drawn from `problems` where there are any.
    """

    def __init__(
        self,
        family: Family,
        policy: Policy,
        judge: SequenceClassifierReward,
        *,
        batch_size: int,
        alternatives: int,
        seed: int,
        start: int = 0,
        split: str = "train",
        problems: Sequence[Problem] = (),
        max_new_tokens: int | None = None,
    ):
        self.problems, self.max_new_tokens = problems, max_new_tokens or family.max_new_tokens
        self.family, self.policy, self.judge, self.split = family, policy, judge, split
        self.batch_size, self.alternatives, self.seed, self.start = batch_size, alternatives, seed, start

    def __iter__(self) -> Iterator[TaughtBatch]:
        step = self.start
        while True:
            yield self.draw(step)
            step += 1

    def _asked(self, step: int) -> list[Problem]:
        if not self.problems:
            return list(islice(generate(self.family, self.split, f"taught/{self.seed}/{step}"), self.batch_size))
        order = torch.randperm(len(self.problems), generator=seeded_generator(self.seed, "problems", step))
        return [self.problems[index] for index in order[: self.batch_size].tolist()]

    @torch.no_grad()
    def draw(self, step: int) -> TaughtBatch:
        """Sample completions (half of them greedily), let the untaught judge read them, and try alternatives."""
        policy, judge = self.policy, self.judge
        problems = self._asked(step)
        ledger, accounts = Ledger(len(problems)), torch.arange(len(problems))
        prefix = policy.prefill([policy.encode_prompt(p.problem) for p in problems], accounts, ledger)
        rollout = policy.rollout(
            prefix,
            Sampling(0.0 if step % 2 else 1.0, 1.0, self.max_new_tokens),
            [seeded_generator(self.seed, "taught", step, index) for index in range(len(problems))],
            keep_states=True,
            keep_top=self.alternatives,
        )
        assert rollout.entropy is not None and rollout.top_ids is not None and rollout.top_logps is not None
        scored = judge.score(judge.prefill([p.problem for p in problems], accounts, ledger), rollout.ids, rollout.mask)
        tracks, values = scored.encoded.tracks([0] * len(problems)), judge.encoded_values(scored.encoded)
        generator = seeded_generator(self.seed, "positions", step)
        chosen = []
        for row in range(len(problems)):
            wanted = (rollout.mask[row] & (rollout.entropy[row] >= MIN_ENTROPY)).nonzero().squeeze(-1)
            order = torch.randperm(len(wanted), generator=generator)[:POSITIONS]
            chosen.append(wanted[order].sort().values)
        rows = [row for row in range(len(problems)) if len(chosen[row])]
        at = [chosen[row] for row in rows]

        def gathered(tensor: Tensor) -> Tensor:
            return pad_sequence([tensor[row][i] for row, i in zip(rows, at, strict=True)], batch_first=True)

        positions = pad_sequence(at, batch_first=True)
        mask = pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in at], batch_first=True)
        alternatives, k = gathered(rollout.top_ids), self.alternatives
        kept = [tracks[row] for row in rows]
        exact = judge.fork_values(
            kept, positions.repeat_interleave(k, 1), alternatives.flatten(1), mask.repeat_interleave(k, 1)
        )
        changes = exact.view_as(alternatives) - gathered(values)[..., None]
        return TaughtBatch(
            kept, positions, gathered(rollout.ids), mask, alternatives, gathered(rollout.top_logps), changes
        )


def taught_loss(predicted: Tensor, changes: Tensor, logps: Tensor, mask: Tensor) -> Tensor:
    """How far predicted changes of the value are from true ones, and how far the choice they lead to.

        smooth L1 of the changes (up to ±`LIMIT`)  +  KL( softmax(log π + ΔV) ‖ softmax(log π + ΔV̂) )

    over the alternatives of a position, averaged over positions.

    Args:
        predicted, changes: (batch, n, k), ΔV̂ and ΔV.
        logps: (batch, n, k), log π of the alternatives.
        mask: (batch, n), True at real positions.
    """
    near = F.smooth_l1_loss(predicted.clamp(-2 * LIMIT, 2 * LIMIT), changes.clamp(-LIMIT, LIMIT), reduction="none")
    wanted, found = (logps + changes).log_softmax(-1), (logps + predicted).log_softmax(-1)
    choice = (wanted.exp() * (wanted - found)).sum(-1)
    return (near.mean(-1) + choice)[mask].mean()


def rank_correlation(predicted: Tensor, changes: Tensor) -> float:
    """Spearman's correlation of predicted and true changes, both flat."""
    ranks = [x.flatten().argsort().argsort().double() for x in (predicted, changes)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


class TinyTaught(L.LightningModule):
    """Training of a taught judge: its first-order changes against the untaught judge's exact ones.

    Args:
        reward: the untaught judge, with the taught one as its `proposer` (see `SequenceClassifierReward`).
        policy: whose completions and alternatives it learns on.
        family: which problems, where `problems` is empty.
        problems: what to learn on instead.
        max_new_tokens: tokens of a completion at most; None: the family's.
        adapter: the LoRA in the proposer (`build_adapter`), which then is all that trains; None: all weights do.
    """

    def __init__(
        self,
        reward: SequenceClassifierReward,
        policy: Policy,
        family: Family,
        *,
        batch_size: int = 32,
        alternatives: int = 8,
        learning_rate: float = 1e-3,
        warmup: int = 50,
        decay: float = 0.5,
        max_steps: int = 400,
        seed: int = 0,
        problems: Sequence[Problem] = (),
        max_new_tokens: int | None = None,
        adapter: PeftModel | None = None,
    ):
        super().__init__()
        assert reward.proposer is not None
        # lists: the untaught judge and the policy are no part of this module's weights
        self.model, self.reward, self.policy, self.family = reward.proposer.model, [reward], [policy], family
        self.adapter, self.problems, self.max_new_tokens = [adapter], problems, max_new_tokens
        if adapter is None:
            self.model.requires_grad_(True)
            self.model.get_input_embeddings().requires_grad_(False)
        self.batch_size, self.alternatives, self.seed = batch_size, alternatives, seed
        self.learning_rate, self.warmup, self.decay, self.max_steps = learning_rate, warmup, decay, max_steps

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        data = TaughtBatches(
            self.family, self.policy[0], self.reward[0], batch_size=self.batch_size, alternatives=self.alternatives,
            seed=self.seed, start=self.trainer.global_step, problems=self.problems,
            max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        return torch.utils.data.DataLoader(data, batch_size=None)

    def transfer_batch_to_device(self, batch: TaughtBatch, device: torch.device, dataloader_idx: int) -> TaughtBatch:
        """The batch is made where the models are."""
        return batch

    def training_step(self, batch: TaughtBatch, batch_index: int) -> Tensor:
        predicted = self.reward[0].fork_changes(
            batch.tracks, batch.positions, batch.ids, batch.mask, batch.alternatives, create_graph=True
        )
        loss = taught_loss(predicted, batch.changes, batch.logps, batch.mask)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.mask))
        correlation = rank_correlation(predicted.detach()[batch.mask], batch.changes[batch.mask])
        self.log("correlation", correlation, prog_bar=True, batch_size=len(batch.mask))
        return loss

    def configure_optimizers(self):
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_stable_decay(step, warmup=self.warmup, total=self.max_steps, decay=self.decay),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
