"""Values of single-token edits: exact under the tree mask, and own-token gradients from one backward."""

from __future__ import annotations

import copy

import pytest
import torch

from nabla_rl.ledger import Ledger
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from tests import toys_hf as toys

QUESTIONS = ["cab", "zebra", "q", "sorted"]


def build(kind: str):
    if kind == "likelihood":
        return LikelihoodReward(Policy(toys.build_llama(seed=5), toys.tokenizer()))
    model = toys.build_gpt2_classifier() if kind == "gpt2" else toys.build_classifier()
    return SequenceClassifierReward(model, toys.tokenizer())


@pytest.fixture(params=["llama", "gpt2", "likelihood"])
def judge(request: pytest.FixtureRequest):
    return build(request.param)


def read(judge, rows):
    """The judge's view of completions (without padding), and its ledger."""
    ids, mask = toys.pad_right(rows)
    ledger = Ledger(len(rows))
    prefix = judge.prefill(QUESTIONS[: len(rows)], torch.arange(len(rows)), ledger)
    scored = judge.score(prefix, ids, mask)
    return scored.encoded.tracks([0] * len(rows)), judge.encoded_values(scored.encoded), ids, mask, ledger


def forks(rows, k: int, seed: int = 0):
    """Some positions of each row, padded, with k alternatives each."""
    generator = torch.Generator().manual_seed(seed)
    width = max(1, min(len(row) for row in rows))
    positions = torch.stack([torch.randperm(len(row), generator=generator)[:width] for row in rows])
    mask = torch.ones_like(positions, dtype=torch.bool)
    mask[0, -1] = width == 1
    positions = positions.masked_fill(~mask, 0)
    return positions, mask, torch.randint(3, toys.VOCAB, (*positions.shape, k), generator=generator)


def test_the_values_of_forks_are_those_of_each_prefix_read_alone(judge):
    """V(y_<i, v) from one pass over all alternatives is V of that sequence from a pass of its own."""
    rows = [row for row in toys.completions(4) if len(row) > 1]
    tracks, _, _, _, _ = read(judge, rows)
    positions, mask, alternatives = forks(rows, 3)
    found = judge.fork_values(
        tracks, positions.repeat_interleave(3, 1), alternatives.flatten(1), mask.repeat_interleave(3, 1)
    ).view_as(alternatives)
    for row, question in zip(range(len(rows)), QUESTIONS, strict=False):
        for j in mask[row].nonzero().squeeze(-1).tolist():
            for v in range(3):
                at = int(positions[row, j])
                edited = torch.tensor([[*rows[row][:at], int(alternatives[row, j, v])]])
                prefix = judge.prefill([question], torch.zeros(1, dtype=torch.int64), Ledger(1))
                alone = judge.values(prefix, edited, torch.ones_like(edited).bool())[0, -1]
                torch.testing.assert_close(found[row, j, v], alone, atol=3e-5, rtol=1e-4)


def test_the_encoded_values_are_the_values(judge):
    rows = toys.completions(4)
    _, values, ids, mask, _ = read(judge, rows)
    prefix = judge.prefill(QUESTIONS, torch.arange(4), Ledger(4))
    torch.testing.assert_close(values[mask], judge.values(prefix, ids, mask)[mask], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_first_order_changes_are_those_of_one_backward_a_position(kind):
    """(E_v - E_y) · ∂V_i/∂e_i, where the derivative is of an uncached pass over x, y_≤i with y_<i held fixed."""
    judge = build(kind)
    rows = [row for row in toys.completions(4) if len(row) > 1]
    tracks, _, ids, _, _ = read(judge, rows)
    positions, mask, alternatives = forks(rows, 4)
    found = judge.fork_changes(tracks, positions, ids.gather(1, positions), mask, alternatives)
    weight, model = judge.backbone.weight, judge.backbone.model
    for row in range(len(rows)):
        for j in mask[row].nonzero().squeeze(-1).tolist():
            at = int(positions[row, j])
            prompt = toys.tokenizer()(f"{QUESTIONS[row]}\n").input_ids
            own = weight[rows[row][at]].clone().requires_grad_()
            embeds = torch.cat([weight[torch.tensor([*prompt, *rows[row][:at]])], own[None]])[None]
            value = model.get_submodule("score")(judge.backbone.base(inputs_embeds=embeds).last_hidden_state)[0, -1, 0]
            (gradient,) = torch.autograd.grad(value, own)
            expected = (weight[alternatives[row, j]] - weight[rows[row][at]]) @ gradient
            torch.testing.assert_close(found[row, j], expected, atol=3e-5, rtol=1e-3)


def test_first_order_is_exact_where_the_value_is_linear():
    """A likelihood's own token enters its value as log π_strong(v): the change is exact, and no pass is made."""
    judge = build("likelihood")
    rows = [row for row in toys.completions(4) if len(row) > 1]
    tracks, values, ids, _, ledger = read(judge, rows)
    positions, mask, alternatives = forks(rows, 3)
    before = ledger.cost(0)
    changes = judge.fork_changes(tracks, positions, ids.gather(1, positions), mask, alternatives)
    exact = judge.fork_values(
        tracks, positions.repeat_interleave(3, 1), alternatives.flatten(1), mask.repeat_interleave(3, 1)
    ).view_as(alternatives)
    torch.testing.assert_close(
        changes[mask], (exact - values.gather(1, positions)[..., None])[mask], atol=1e-4, rtol=1e-4
    )
    assert ledger.cost(0).calls == before.calls


def test_a_proposer_speaks_for_first_order_changes_alone():
    """Values stay the untaught judge's; the same weights as a proposer change nothing, others do."""
    model = toys.build_classifier()
    plain = SequenceClassifierReward(model, toys.tokenizer())
    same = SequenceClassifierReward(model, toys.tokenizer(), proposer=copy.deepcopy(model))
    other = SequenceClassifierReward(model, toys.tokenizer(), proposer=toys.build_classifier(seed=8))
    rows = [row for row in toys.completions(4) if len(row) > 1]
    positions, mask, alternatives = forks(rows, 3)
    outcomes = []
    for judge in (plain, same, other):
        tracks, values, ids, _, _ = read(judge, rows)
        changes = judge.fork_changes(tracks, positions, ids.gather(1, positions), mask, alternatives)
        outcomes.append((values, changes[mask]))
    assert torch.equal(outcomes[0][0], outcomes[2][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])
    assert (outcomes[0][1] - outcomes[2][1]).abs().max() > 1e-3


def test_forks_are_booked_token_by_token():
    """One pass and one token for each fork; a gradient adds one pass back over the same tokens."""
    judge = build("llama")
    rows = [row for row in toys.completions(4) if len(row) > 1]
    tracks, _, ids, _, ledger = read(judge, rows)
    positions, mask, alternatives = forks(rows, 3)
    with ledger.phase("probe"):
        judge.fork_changes(tracks, positions, ids.gather(1, positions), mask, alternatives)
    for problem in range(len(rows)):
        forward, back = (ledger.cost(problem, phase="probe", direction=d) for d in ("forward", "backward"))
        assert (forward.calls, forward.tokens) == (1, int(mask[problem].sum()))
        assert (back.calls, back.tokens) == (1, int(mask[problem].sum()))
        context = torch.tensor([len(toys.tokenizer()(f"{QUESTIONS[problem]}\n").input_ids)])
        context += int(positions[problem].max())
        formula, count = judge.backbone.formula, mask[problem].sum()[None]
        assert forward.flops == pytest.approx(float(formula.forward(count, context) + formula.head(count)))
