"""A key-value prefix, soft tokens and padding change nothing but the cost."""

from __future__ import annotations

import pytest
import torch

from nabla_rl.functional import SoftTokens
from nabla_rl.functional.energy import energy_gradient
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Backbone, Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError
from tests import toys_hf as toys

BUILDERS = {
    "llama": toys.build_llama,
    "qwen2": toys.build_qwen2,
    "gpt2": toys.build_gpt2,
    "window": toys.build_mistral,
    "eager": lambda: toys.build_llama(attn_implementation="eager"),
}


@pytest.fixture(params=BUILDERS)
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy(BUILDERS[request.param](), toys.tokenizer())


def soft_tokens(ids: torch.Tensor, seed: int = 3) -> torch.Tensor:
    noise = torch.randn(*ids.shape, toys.VOCAB, generator=torch.Generator().manual_seed(seed))
    return noise.mul(2).softmax(-1)


def tensors_of(prefix: Prefix) -> list[torch.Tensor]:
    return [*prefix.keys, *prefix.values, prefix.mask, prefix.hidden, prefix.problems]


def test_cached_log_probabilities_equal_the_models_own_uncached_forward(policy: Policy):
    """completion_logps and completion_log_probs of a padded batch are what the model says of each sequence alone."""
    prompts, rows = toys.prompts(5), toys.completions(5)
    ids, mask = toys.pad_right(rows)
    prefix = toys.prefill(policy, prompts)
    logps = policy.completion_logps(prefix, ids, mask)
    log_probs = policy.completion_log_probs(prefix, SoftTokens(toys.one_hot(ids), ids), mask)
    product = policy.completion_log_probs(prefix, SoftTokens(toys.one_hot(ids)), mask)
    assert (logps[~mask] == 0).all()
    for row, (prompt, completion) in enumerate(zip(prompts, rows, strict=True)):
        expected = toys.reference_log_probs(policy.backbone.model, prompt, completion)
        for found in (log_probs, product):
            torch.testing.assert_close(found[row, : len(completion)], expected, atol=2e-5, rtol=1e-5)
        expected = toys.reference_logps(policy.backbone.model, prompt, completion)
        torch.testing.assert_close(logps[row, : len(completion)], expected, atol=2e-5, rtol=1e-5)


def test_the_logits_after_a_prefix_are_those_of_the_next_token(policy: Policy):
    """next_logits of left-padded prompts are the uncached logits at each prompt's last token."""
    prompts = toys.prompts(4)
    found = policy.next_logits(toys.prefill(policy, prompts))
    for row, prompt in enumerate(prompts):
        expected = policy.backbone.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=1e-5)


def test_soft_tokens_and_their_gradient_equal_one_dense_product(policy: Policy):
    """Values and gradients of soft completions on a cached, padded prefix are those of an uncached product with E."""
    prompts, rows = toys.prompts(3), toys.completions(3)
    ids, mask = toys.pad_right(rows)
    soft = soft_tokens(ids).requires_grad_()
    weights = torch.randn(*soft.shape, generator=torch.Generator().manual_seed(4)) * mask[..., None]
    log_probs = policy.completion_log_probs(toys.prefill(policy, prompts), SoftTokens(soft), mask)
    (gradient,) = torch.autograd.grad((log_probs * weights).sum(), soft)
    assert (gradient[~mask] == 0).all()
    for row, (prompt, completion) in enumerate(zip(prompts, rows, strict=True)):
        alone = soft.detach()[row, : len(completion)].requires_grad_()
        expected = toys.reference_soft_log_probs(policy.backbone.model, prompt, alone)
        torch.testing.assert_close(log_probs[row, : len(completion)], expected, atol=2e-5, rtol=1e-5)
        value = (expected * weights[row, : len(completion)]).sum()
        (expected_gradient,) = torch.autograd.grad(value, alone)
        torch.testing.assert_close(gradient[row, : len(completion)], expected_gradient, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("looked_up", [True, False])
def test_one_hot_tokens_have_the_gradient_of_a_dense_product(policy: Policy, looked_up: bool):
    """With `tokens` the forward is a look-up, and the gradient to all the vocabulary is that of one-hot @ E."""
    prompts, rows = toys.prompts(3), toys.completions(3)
    ids, mask = toys.pad_right(rows)
    probs = toys.one_hot(ids).requires_grad_()
    log_probs = policy.completion_log_probs(
        toys.prefill(policy, prompts), SoftTokens(probs, ids if looked_up else None), mask
    )
    picked = log_probs.gather(-1, ids[..., None]).squeeze(-1)
    (gradient,) = torch.autograd.grad((picked * mask).sum(), probs)
    assert gradient.abs().max() > 1e-2
    for row, (prompt, completion) in enumerate(zip(prompts, rows, strict=True)):
        alone = toys.one_hot(torch.tensor(completion)).requires_grad_()
        expected = toys.reference_soft_log_probs(policy.backbone.model, prompt, alone)
        total = expected.gather(-1, torch.tensor(completion)[:, None]).sum()
        (expected_gradient,) = torch.autograd.grad(total, alone)
        torch.testing.assert_close(gradient[row, : len(completion)], expected_gradient, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("hard", [True, False])
def test_a_support_gives_the_dense_result_gathered(policy: Policy, hard: bool):
    """Log-probabilities on top-k supports, and their gradients, equal the dense ones scattered to the vocabulary."""
    prompts, rows = toys.prompts(4), toys.completions(4)
    ids, mask = toys.pad_right(rows)
    prefix = toys.prefill(policy, prompts)
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(*ids.shape, toys.VOCAB, generator=generator).scatter(-1, ids[..., None], 2.0)
    support = order.topk(6).indices  # the completion's token stands first
    probs = torch.rand(*ids.shape, 6, generator=generator).softmax(-1)
    if hard:
        probs = toys.one_hot(torch.zeros_like(ids), 6)
    weights = torch.randn(*support.shape, generator=generator) * mask[..., None]
    small, dense = probs.clone().requires_grad_(), torch.zeros(*ids.shape, toys.VOCAB).scatter(-1, support, probs)
    dense.requires_grad_()
    found = policy.completion_log_probs(prefix, SoftTokens(small, ids if hard else None), mask, support=support)
    expected = policy.completion_log_probs(prefix, SoftTokens(dense), mask).gather(-1, support)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad((found * weights).sum(), small)
    (whole,) = torch.autograd.grad((expected * weights).sum(), dense)
    torch.testing.assert_close(gradient, whole.gather(-1, support), atol=3e-5, rtol=1e-4)


def test_a_prefix_is_not_changed_by_what_is_fed_after_it(policy: Policy):
    """Scoring, differentiating and rolling out leave every tensor of the prefix as it was: results repeat exactly."""
    ids, mask = toys.pad_right(toys.completions(3))
    prefix = toys.prefill(policy, toys.prompts(3))
    before = [t.clone() for t in tensors_of(prefix)]
    first = policy.completion_logps(prefix, ids, mask)
    probs = toys.one_hot(ids).requires_grad_()
    torch.autograd.grad(policy.completion_log_probs(prefix, SoftTokens(probs), mask).sum(), probs)
    toys.greedy(policy, prefix, 4, keep_states=True)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(prefix), strict=True))
    assert torch.equal(policy.completion_logps(prefix, ids, mask), first)


@pytest.mark.parametrize("source", ["encoded", "track", "rollout"])
def test_a_cut_anywhere_is_a_fresh_prefill(policy: Policy, source: str):
    """Prefixes cut out of an encoded batch, of tracks or of a rollout equal prompt + tokens encoded from scratch."""
    prompts = toys.prompts(4)
    prefix = toys.prefill(policy, prompts)
    if source == "rollout":
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        budgets = torch.tensor([7, 3, 5, 1])
        drawn = policy.rollout(prefix, Sampling(1.0, max_new_tokens=7), generators, lengths=budgets, keep_states=True)
        ids, mask, encoded = drawn.ids, drawn.mask, drawn.encoded
        fed = mask.sum(-1) - 1
        assert len(set(fed.tolist())) > 1
    else:
        ids, mask = toys.pad_right(toys.completions(4))
        encoded, fed = policy.backbone.encode(prefix, ids, mask), mask.sum(-1)
    assert encoded is not None
    tracks = encoded.tracks([0] * 4)
    next_ids, next_mask = toys.pad_right(toys.completions(4, seed=9))
    for share in (0.0, 0.5, 1.0):
        cuts = (fed * share).long()
        if source == "track":
            cut = Prefix.cat([track.prefix_at(n) for track, n in zip(tracks, cuts.tolist(), strict=True)])
        else:
            cut = encoded.prefix_at(cuts)
        rows = [[*prompt, *row[:n].tolist()] for prompt, row, n in zip(prompts, ids, cuts.tolist(), strict=True)]
        fresh = toys.prefill(policy, rows)
        assert torch.equal(cut.lengths, fresh.lengths)
        assert torch.equal(cut.problems, fresh.problems)
        torch.testing.assert_close(cut.hidden, fresh.hidden, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            policy.completion_logps(cut, next_ids, next_mask),
            policy.completion_logps(fresh, next_ids, next_mask),
            atol=3e-5,
            rtol=1e-4,
        )
        for found, expected in zip((*cut.keys, *cut.values), (*fresh.keys, *fresh.values), strict=True):
            real = fresh.mask[:, None, :, None]
            torch.testing.assert_close(found * real, expected * real, atol=2e-5, rtol=1e-4)


def test_a_track_knows_the_completion_tokens_before_it():
    """A track that starts after committed tokens counts cuts from the prompt, and refuses nothing that it covers."""
    policy = toys.policy()
    prompt, row = toys.prompts(1)[0], toys.completions(2)[1]
    start = toys.prefill(policy, [[*prompt, *row[:3]]])
    ids, mask = toys.pad_right([row[3:]])
    (track,) = policy.backbone.encode(start, ids, mask).tracks([3])
    for length in range(3, 8):
        fresh = toys.prefill(policy, [[*prompt, *row[:length]]])
        torch.testing.assert_close(track.prefix_at(length).hidden, fresh.hidden, atol=2e-5, rtol=1e-4)


def test_selected_rows_are_those_rows():
    """select() repeats and reorders rows, drops columns that are padding in all of them, and keeps their accounts."""
    policy, prompts = toys.policy(), toys.prompts(3)
    chosen = toys.prefill(policy, prompts).select(torch.tensor([1, 1, 0]))
    fresh = toys.prefill(policy, [prompts[1], prompts[1], prompts[0]])
    assert chosen.problems.tolist() == [1, 1, 0]
    assert torch.equal(chosen.mask, fresh.mask)
    torch.testing.assert_close(chosen.hidden, fresh.hidden, atol=2e-5, rtol=1e-4)


def test_rows_of_a_padded_batch_equal_the_rows_alone():
    """Log-probabilities, rewards and energy gradients of a row do not depend on the rows beside it."""
    policy, reward, problems, rows = toys.policy(), toys.reward(), toys.problems(4), toys.completions(4)
    questions = [p.problem for p in problems]

    def gradient(chosen: list[int]):
        ids, mask = toys.pad_right([rows[i] for i in chosen])
        asked = [questions[i] for i in chosen]
        ours = toys.prefill(policy, [policy.encode_prompt(q) for q in asked])
        theirs = reward.prefill(asked, torch.arange(len(chosen)), Ledger(len(chosen)))
        return energy_gradient(
            toys.one_hot(ids), mask, torch.arange(len(chosen)),
            lambda p, r: policy.completion_log_probs(ours.select(r), p._replace(ids=ids[r]), mask[r]),
            lambda p, r: reward(theirs.select(r), p._replace(ids=ids[r]), mask[r]),
            beta=0.5,
        )  # fmt: skip

    batch = gradient([0, 1, 2, 3])
    for i in range(4):
        alone = gradient([i])
        torch.testing.assert_close(batch.energy[i], alone.energy[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(batch.reward[i], alone.reward[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.gradient[i, : len(rows[i])], alone.gradient[0], atol=3e-5, rtol=1e-4)
        assert (batch.gradient[i, len(rows[i]) :] == 0).all()


@pytest.mark.parametrize("support", [None, 5])
def test_the_energy_gradient_agrees_with_finite_differences_in_float64(support: int | None):
    """∂L/∂y through two real transformers in float64 is the slope of L, prefix and padding included."""
    policy = Policy(toys.build_gpt2().double(), toys.tokenizer())
    reward = SequenceClassifierReward(toys.build_gpt2_classifier().double(), toys.tokenizer())
    ids, mask = toys.pad_right(toys.completions(2))
    ours, theirs = toys.prefill(policy, toys.prompts(2)), toys.prefill(reward.backbone, toys.prompts(2, seed=7))
    generator, width = torch.Generator().manual_seed(0), support or toys.VOCAB
    chosen = torch.rand(*ids.shape, toys.VOCAB, generator=generator).topk(width).indices if support else None
    probs = torch.rand(*ids.shape, width, generator=generator, dtype=torch.float64).softmax(-1)
    calls = (
        lambda p, r: policy.completion_log_probs(ours, p, mask, support=chosen),
        lambda p, r: reward(theirs, p, mask, support=chosen),
    )
    rows, beta = torch.arange(2), 0.3
    exact = energy_gradient(probs, mask, rows, *calls, beta=beta)
    assert exact.energy.dtype == exact.gradient.dtype == torch.float64
    for seed in range(3):
        direction = torch.randn(*probs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-5 * direction
        up, down = (energy_gradient(probs + s, mask, rows, *calls, beta=beta, record=False) for s in (step, -step))
        slope = (up.energy - down.energy) / 2e-5
        torch.testing.assert_close((exact.gradient * direction).sum((1, 2)), slope, rtol=1e-7, atol=1e-7)


def test_double_precision_stays_double():
    """Nothing on the way of a float64 model rounds to float32: log-probabilities agree with the model's to 1e-12."""
    policy = Policy(toys.build_gpt2().double(), toys.tokenizer())
    prompt, row = toys.prompts(1)[0], toys.completions(2)[1]
    ids, mask = toys.pad_right([row])
    found = policy.completion_logps(toys.prefill(policy, [prompt]), ids, mask)
    torch.testing.assert_close(
        found[0], toys.reference_logps(policy.backbone.model, prompt, row), rtol=1e-12, atol=1e-12
    )
    drawn = toys.greedy(policy, toys.prefill(policy, [prompt]), 3, keep_logits=True, keep_states=True)
    assert drawn.logps.dtype == drawn.logits.dtype == torch.float64


@pytest.mark.parametrize("rows", [28, 34])
def test_an_embedding_matrix_of_another_padded_size_is_read_by_id(rows: int):
    """A policy with more or fewer embedding rows than the reward model gives it the same tokens by id."""
    model = toys.build_classifier(vocab_size=rows)
    backbone = Backbone(model, "reward")
    ids, mask = toys.pad_right([[4, 9, 12], [7, 7]])
    prefix = toys.prefill(backbone, [[5, 6], [8]])
    probs = toys.one_hot(ids).requires_grad_()
    values = []
    for tokens in (ids, None):
        hidden = backbone.encode_soft(prefix, SoftTokens(probs, tokens), mask).hidden
        torch.testing.assert_close(hidden, backbone.encode(prefix, ids, mask).hidden, atol=1e-5, rtol=1e-5)
        values.append(torch.autograd.grad(hidden[:, -1].sum(), probs)[0])
    assert values[0].shape == probs.shape
    assert (values[0][..., rows:] == 0).all() and values[0].abs().max() > 1e-3
    torch.testing.assert_close(values[0], values[1])


def test_the_models_are_frozen():
    """A gradient of the tokens leaves no gradient on any weight, and dropout off."""
    model = toys.build_gpt2().train()
    policy = Policy(model, toys.tokenizer())
    ids, mask = toys.pad_right(toys.completions(2))
    probs = toys.one_hot(ids).requires_grad_()
    policy.completion_log_probs(toys.prefill(policy, toys.prompts(2)), SoftTokens(probs), mask).sum().backward()
    assert not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_prompts_that_cannot_be_encoded_are_refused():
    """An empty prompt, one as long as the context, or a completion that leaves it, is an error with the figures."""
    policy = toys.policy()
    with pytest.raises(UserError, match="at least one token"):
        toys.prefill(policy, [[5], []])
    with pytest.raises(UserError, match="context of 96 tokens, found one of 96"):
        toys.prefill(policy, [[5] * 96])
    prefix = toys.prefill(policy, [[5] * 90])
    ids, mask = toys.pad_right([[5] * 7])
    with pytest.raises(UserError, match="context of 96 tokens, found 97"):
        policy.backbone.encode(prefix, ids, mask)
    policy.backbone.encode(prefix, ids[:, 1:], mask[:, 1:])
