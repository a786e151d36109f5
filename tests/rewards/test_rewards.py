"""Rewards of hard and soft completions: pooled where the completion ends, by the reward model's own template."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from nabla_rl.functional import SoftTokens
from nabla_rl.ledger import Ledger
from nabla_rl.models.backbone import Prefix
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import check_shared_vocabulary, last_valid
from nabla_rl.rewards.likelihood import LikelihoodReward
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError
from tests import toys_hf as toys

BUILDERS = {"llama": toys.build_classifier, "gpt2": toys.build_gpt2_classifier}
QUESTIONS = ["cab", "zebra", "q", "sorted"]


@pytest.fixture(params=BUILDERS)
def classifier(request: pytest.FixtureRequest):
    return BUILDERS[request.param]()


def start(reward, questions=QUESTIONS):
    return reward.prefill(list(questions), torch.arange(len(questions)), Ledger(len(questions)))


def likelihood() -> LikelihoodReward:
    return LikelihoodReward(Policy(toys.build_llama(seed=5), toys.tokenizer()))


def test_the_reward_is_the_classifiers_own_under_padding_on_both_sides(classifier):
    """Prompts padded left and completions padded right score as the classifier scores each whole sequence alone."""
    reward = SequenceClassifierReward(classifier, toys.tokenizer())
    rows = toys.completions(4)
    ids, mask = toys.pad_right(rows)
    ids = ids.masked_fill(~mask, 23)  # what stands at padding has no say
    hard = reward.score(start(reward), ids, mask).reward
    soft = reward(start(reward), SoftTokens(toys.one_hot(ids)), mask)
    looked_up = reward(start(reward), SoftTokens(toys.one_hot(ids), ids), mask)
    expected = []
    for question, row in zip(QUESTIONS, rows, strict=True):
        sequence = torch.tensor([[*toys.tokenizer()(f"{question}\n").input_ids, *row]])
        expected.append(float(classifier(input_ids=sequence).logits[0, 0]))
    for found in (hard, soft, looked_up):
        torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=1e-5)
    last_column = reward.backbone.encode(start(reward), ids, mask).hidden[:, -1]
    assert (reward._head(last_column) - hard).abs().max() > 1e-2  # position -1 would have been wrong


def test_the_gradient_of_a_reward_is_that_of_one_dense_product(classifier):
    """∂r/∂y of a padded batch is that of one-hot @ E through each uncached sequence, and 0 at padding."""
    reward = SequenceClassifierReward(classifier, toys.tokenizer())
    rows = toys.completions(4)
    ids, mask = toys.pad_right(rows)
    probs = toys.one_hot(ids).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(start(reward), SoftTokens(probs, ids), mask).sum(), probs)
    assert (gradient[~mask] == 0).all()
    table = classifier.get_input_embeddings().weight
    for row, (question, completion) in enumerate(zip(QUESTIONS, rows, strict=True)):
        alone = toys.one_hot(torch.tensor(completion)).requires_grad_()
        prompt = torch.tensor(toys.tokenizer()(f"{question}\n").input_ids)
        embeds = torch.cat([table[prompt], alone @ table])[None]
        hidden = classifier.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
        (expected,) = torch.autograd.grad(classifier.score(hidden).sum(), alone)
        torch.testing.assert_close(gradient[row, : len(completion)], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [lambda: toys.reward(), likelihood], ids=["classifier", "likelihood"])
def test_a_reward_on_a_support_is_the_dense_one_gathered(build):
    """Value and gradient on top-k supports equal those over the whole vocabulary."""
    reward = build()
    ids, mask = toys.pad_right(toys.completions(4))
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(*ids.shape, toys.VOCAB, generator=generator).topk(7).indices
    small = torch.rand(*ids.shape, 7, generator=generator).softmax(-1).requires_grad_()
    dense = torch.zeros(*ids.shape, toys.VOCAB).scatter(-1, support, small.detach()).requires_grad_()
    found, expected = (
        reward(start(reward), SoftTokens(small), mask, support=support),
        reward(start(reward), SoftTokens(dense), mask),
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), probs)[0] for value, probs in ((found, small), (expected, dense))]
    torch.testing.assert_close(gradients[0], gradients[1].gather(-1, support), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [lambda: toys.reward(), likelihood], ids=["classifier", "likelihood"])
def test_the_process_value_at_the_last_token_is_the_outcome_reward(build):
    """V(y_≤i) is the reward of the completion cut after token i, so at the last token the reward itself."""
    reward = build()
    rows = toys.completions(4)
    ids, mask = toys.pad_right(rows)
    values = reward.values(start(reward), ids, mask)
    assert values.shape == ids.shape
    outcome = reward.score(start(reward), ids, mask).reward
    torch.testing.assert_close(values.gather(-1, last_valid(mask)[:, None]).squeeze(-1), outcome, atol=2e-5, rtol=1e-5)
    for row, completion in enumerate(rows):
        for n in range(1, len(completion) + 1):
            cut = toys.pad_right([completion[:n]])
            alone = reward.score(start(reward, [QUESTIONS[row]]), *cut).reward
            torch.testing.assert_close(values[row, n - 1 : n], alone, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("system_prompt", [None, "sort"])
def test_a_templated_reward_is_that_of_the_whole_conversation(classifier, system_prompt: str | None):
    """With a chat template, closing tokens included, a batch scores as the classifier scores the templated text."""
    tokenizer: PreTrainedTokenizerBase = toys.chat_tokenizer()
    reward = SequenceClassifierReward(classifier, tokenizer, system_prompt=system_prompt)
    assert len(reward.tail) == 1
    answers = ["abc", "aberz", "q", "deorst"]
    rows = [[*tokenizer(a, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for a in answers]
    ids, mask = toys.pad_right(rows)
    expected = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if system_prompt:
            turns = [{"role": "system", "content": system_prompt}, *turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(classifier(**encoded).logits[0, 0]))
    scored = reward.score(start(reward), ids, mask)
    probs = toys.one_hot(ids).requires_grad_()
    soft = reward(start(reward), SoftTokens(probs), mask)
    for found in (scored.reward, soft):
        torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(soft.sum(), probs)
    assert (gradient[~mask] == 0).all() and (gradient.abs().amax(-1)[mask] > 0).all()
    # what is kept for later prefixes ends before the closing tokens
    assert torch.equal(scored.encoded.mask, mask)
    assert scored.encoded.prefix_at(mask.sum(-1)).lengths.tolist() == (start(reward).lengths + mask.sum(-1)).tolist()


def test_a_templated_gradient_agrees_with_finite_differences_in_float64():
    """∂r/∂y through the closing tokens of a template is the slope of r, in float64."""
    reward = SequenceClassifierReward(toys.build_gpt2_classifier().double(), toys.chat_tokenizer())
    ids, mask = toys.pad_right(toys.completions(4))
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(*ids.shape, toys.VOCAB, generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
    direction = torch.randn(*probs.shape, generator=generator, dtype=torch.float64)
    prefix = start(reward)
    (gradient,) = torch.autograd.grad(reward(prefix, SoftTokens(probs), mask).sum(), probs)
    up, down = (reward(prefix, SoftTokens(probs.detach() + s * direction), mask).sum() for s in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "build", [lambda: SequenceClassifierReward(toys.build_classifier(), toys.chat_tokenizer()), likelihood],
    ids=["classifier", "likelihood"],
)  # fmt: skip
def test_a_reward_is_continued_from_a_kept_prefix(build):
    """Scoring the rest of a completion on a prefix cut out of an earlier scoring equals scoring all of it."""
    reward = build()
    rows = [*toys.completions(4)[:2], [8, 9], [7, 7, 5]]
    ids, mask = toys.pad_right(rows)
    scored = reward.score(start(reward), ids, mask)
    cuts = torch.tensor([len(row) // 2 for row in rows])
    rest = toys.pad_right([row[n:] for row, n in zip(rows, cuts.tolist(), strict=True)])
    tracks = scored.encoded.tracks([0] * 4)
    for kept in (
        scored.encoded.prefix_at(cuts),
        Prefix.cat([track.prefix_at(n) for track, n in zip(tracks, cuts.tolist(), strict=True)]),
    ):
        again = reward.score(kept, *rest)
        soft = reward(kept.select(torch.tensor([3, 1])), SoftTokens(toys.one_hot(rest[0][[3, 1]])), rest[1][[3, 1]])
        values = reward.values(kept, *rest).gather(-1, last_valid(rest[1])[:, None]).squeeze(-1)
        torch.testing.assert_close(again.reward, scored.reward, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(soft, scored.reward[[3, 1]], atol=2e-5, rtol=1e-5)
        if not getattr(reward, "tail", None):
            torch.testing.assert_close(values, scored.reward, atol=2e-5, rtol=1e-5)
    # spliced: the first half of one scoring, then another end
    ends = [[4, 11], [6], [30, 5, 9], [12]]
    new = reward.score(scored.encoded.prefix_at(cuts), *toys.pad_right(ends))
    spliced = [old.spliced(tail) for old, tail in zip(tracks, new.encoded.tracks(cuts.tolist()), strict=True)]
    for cut in (0, 1):
        wholes = [[*row[:n], *end] for row, n, end in zip(rows, cuts.tolist(), ends, strict=True)]
        rest = toys.pad_right([row[cut:] for row in wholes])
        again = reward.score(Prefix.cat([track.prefix_at(cut) for track in spliced]), *rest)
        torch.testing.assert_close(again.reward, new.reward, atol=2e-5, rtol=1e-5)
        whole = reward.score(start(reward), *toys.pad_right(wholes)).reward
        torch.testing.assert_close(again.reward, whole, atol=2e-5, rtol=1e-5)


def test_the_likelihood_reward_is_a_sum_of_log_softmax():
    """r = Σ log π_strong(y_i | x, y_<i): hard, soft, in partial sums, and with the gradient of both roles."""
    reward = likelihood()
    rows = toys.completions(4)
    ids, mask = toys.pad_right(rows)
    model = reward.judge.backbone.model
    prompts = [toys.tokenizer()(f"{q}\n").input_ids for q in QUESTIONS]
    per_token = [toys.reference_logps(model, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    expected = torch.stack([logps.sum() for logps in per_token])
    probs = toys.one_hot(ids).requires_grad_()
    soft = reward(start(reward), SoftTokens(probs, ids), mask)
    for found in (reward.score(start(reward), ids, mask).reward, soft):
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
    values = reward.values(start(reward), ids, mask)
    for row, logps in enumerate(per_token):
        torch.testing.assert_close(values[row, : len(logps)], logps.cumsum(-1), atol=5e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(soft.sum(), probs)
    for row, (prompt, completion) in enumerate(zip(prompts, rows, strict=True)):
        alone = toys.one_hot(torch.tensor(completion)).requires_grad_()
        value = (alone * toys.reference_soft_log_probs(model, prompt, alone)).sum()
        (wanted,) = torch.autograd.grad(value, alone)
        torch.testing.assert_close(gradient[row, : len(completion)], wanted, atol=5e-5, rtol=1e-4)


def test_the_likelihood_judge_is_booked_as_the_reward():
    """A language model that judges costs on the reward's account."""
    reward, ledger = likelihood(), Ledger(1)
    prefix = reward.prefill(["cab"], torch.tensor([0]), ledger)
    reward.score(prefix, *toys.pad_right([[4, 5, 6]]))
    assert ledger.cost(0).calls == ledger.cost(0, model="reward").calls == 2
    assert ledger.cost(0, model="reward").tokens == 5 + 3


def test_vocabularies_that_differ_are_refused_with_the_count():
    """Every token that has another id, or is in one tokenizer only, is counted in the refusal."""
    ours = toys.tokenizer()
    check_shared_vocabulary(ours, toys.chat_tokenizer())
    swapped = toys.build_tokenizer(toys.SORTING)
    swapped.add_tokens(["zz", "yy"])
    with pytest.raises(UserError, match="31 tokens, found one of 33 in which 2 tokens differ"):
        check_shared_vocabulary(ours, swapped)
    with pytest.raises(UserError, match="33 tokens, found one of 31 in which 2 tokens differ"):
        check_shared_vocabulary(swapped, ours)

    class Renamed:
        def get_vocab(self) -> dict[str, int]:
            return {**ours.get_vocab(), "a": ours.get_vocab()["b"], "b": ours.get_vocab()["a"]}

    with pytest.raises(UserError, match="in which 2 tokens differ"):
        check_shared_vocabulary(ours, Renamed())


def test_what_is_no_reward_model_is_refused():
    """A language model, two labels, a system prompt without a template and NaN weights are errors of one line."""
    with pytest.raises(UserError, match="one label and a `score` head, found LlamaForCausalLM"):
        SequenceClassifierReward(toys.build_llama(), toys.tokenizer())
    with pytest.raises(UserError, match="with 2 labels"):
        SequenceClassifierReward(toys.build_classifier(num_labels=2), toys.tokenizer())
    with pytest.raises(UserError, match="system_prompt: expected a tokenizer with a chat template"):
        SequenceClassifierReward(toys.build_classifier(), toys.tokenizer(), system_prompt="sort")
    model = toys.build_classifier()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    reward = SequenceClassifierReward(model, toys.tokenizer())
    with pytest.raises(UserError, match="reward.dtype: expected finite scores"):
        reward.score(start(reward), *toys.pad_right(toys.completions(4)))
