"""Teaching a judge its gradient: what the loss asks for, what batches hold, and that it is learnt."""

from __future__ import annotations

import copy
from itertools import islice

import lightning as L
import pytest
import torch
from transformers import PreTrainedModel

from nabla_rl.data.tiny import SORTING, build_tokenizer
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.tiny_world.taught import TaughtBatches, TinyTaught, rank_correlation, taught_loss
from tests import toys_hf as toys


def reward() -> SequenceClassifierReward:
    torch.manual_seed(3)
    model: PreTrainedModel = toys.build_classifier(seed=4)
    with torch.no_grad():
        model.get_submodule("score").weight.mul_(20.0)
    proposer = copy.deepcopy(model)
    proposer.set_attn_implementation("eager")
    return SequenceClassifierReward(model, build_tokenizer(SORTING), proposer=proposer)


def taught(max_steps: int, **options) -> TinyTaught:
    return TinyTaught(
        reward(), toys.policy(), SORTING, batch_size=4, alternatives=4, warmup=1, decay=0.0, max_steps=max_steps,
        **options,
    )  # fmt: skip


def batches(start: int = 0) -> TaughtBatches:
    return TaughtBatches(SORTING, toys.policy(), reward(), batch_size=4, alternatives=4, seed=5, start=start)


def test_the_loss_is_zero_for_exact_predictions_and_not_for_others():
    changes = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    logps = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    assert float(taught_loss(changes, changes, logps, mask)) == pytest.approx(0.0, abs=1e-6)
    wrong = changes.clone()
    wrong[1, 1] += 5.0  # padding has no say
    assert float(taught_loss(wrong, changes, logps, mask)) == pytest.approx(0.0, abs=1e-6)
    wrong[0, 0, 0] += 1.0
    shifted, target = wrong[0, 0], changes[0, 0]
    near = 0.5 / 4
    p, q = (logps[0, 0] + target).softmax(-1), (logps[0, 0] + shifted).softmax(-1)
    expected = (near + float((p * (p / q).log()).sum())) / 5
    assert float(taught_loss(wrong, changes, logps, mask)) == pytest.approx(expected, rel=1e-5)


def test_a_batch_holds_exact_changes_of_the_untaught_judge():
    """The token that stands at a position changes nothing, where the policy lists it."""
    batch = next(iter(batches()))
    same = (batch.alternatives == batch.ids[..., None]) & batch.mask[..., None]
    assert same.any()
    assert batch.changes[same].abs().max() < 1e-4
    assert batch.changes[batch.mask].abs().max() > 1e-2


def test_batch_k_depends_on_the_seed_and_k_alone():
    whole, rest = list(islice(batches(), 3)), next(iter(batches(2)))
    for name in ("positions", "ids", "mask", "alternatives", "logps", "changes"):
        assert torch.equal(getattr(whole[2], name), getattr(rest, name)), name


def test_rank_correlation_is_one_for_the_same_order_and_minus_one_for_the_reverse():
    values = torch.tensor([0.1, 5.0, -2.0, 7.0])
    assert rank_correlation(values.exp(), values) == pytest.approx(1.0)
    assert rank_correlation(-values, values) == pytest.approx(-1.0)


def test_a_judge_learns_its_own_first_order_effect():
    """After some steps on one batch the loss has fallen, and the untaught judge is as it was."""
    module = taught(1, learning_rate=3e-3)
    batch = next(iter(batches()))
    before = copy.deepcopy(module.reward[0].backbone.model.state_dict())
    optimizer = torch.optim.AdamW([p for p in module.model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        predicted = module.reward[0].fork_changes(
            batch.tracks, batch.positions, batch.ids, batch.mask, batch.alternatives, create_graph=True
        )
        loss = taught_loss(predicted, batch.changes, batch.logps, batch.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, value in module.reward[0].backbone.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_it_trains_under_lightning_and_leaves_the_embeddings_alone():
    module = taught(2)
    embeddings = module.model.get_input_embeddings().weight.clone()
    head = module.model.get_submodule("score").weight.clone()
    trainer = L.Trainer(
        max_steps=2, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module)
    assert torch.equal(module.model.get_input_embeddings().weight, embeddings)
    assert not torch.equal(module.model.get_submodule("score").weight, head)
