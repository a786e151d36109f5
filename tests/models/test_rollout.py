"""Completions drawn from the policy follow its law, row by row."""

from __future__ import annotations

import pytest
import torch

from nabla_rl.functional.logps import top_p_filter
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.models.policy import Policy
from nabla_rl.models.sampling import Sampling
from nabla_rl.types import UserError
from tests import toys_hf as toys

FAMILIES = {"llama": toys.build_llama, "gpt2": toys.build_gpt2, "window": toys.build_mistral}


TWELVE = Sampling(1.0, max_new_tokens=12)


def draw(policy: Policy, prompts: list[list[int]], keys: list[int], sampling: Sampling = TWELVE, **options):
    generators = [seeded_generator("draw", key) for key in keys]
    return policy.rollout(toys.prefill(policy, prompts), sampling, generators, **options)


def rows_of(rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """The statistic over tokens expected at least 5 times (the rest pooled), and its degrees of freedom."""
    expected = probs.double() * counts.sum()
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]]).double()
    expected = torch.cat([expected[big], expected[~big].sum()[None]]).clamp(min=1e-9)
    return float(((observed - expected) ** 2 / expected)[expected > 1e-6].sum()), int(big.sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str):
    """A left-padded greedy batch is what Hugging Face's own greedy generate gives for each prompt alone."""
    policy = Policy(FAMILIES[family](eos_token_id=[2, 9, 17]), toys.tokenizer())
    prompts = toys.prompts(5)
    found = rows_of(toys.greedy(policy, toys.prefill(policy, prompts), 9))
    for prompt, row in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.backbone.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, eos_token_id=[2, 9, 17]
        )
        assert row == expected[0, len(prompt) :].tolist()


def test_temperature_zero_is_greedy():
    """Temperature 0 ignores the generators, and its sampling law is certain."""
    policy, prompts = toys.policy(), toys.prompts(3)
    greedy = toys.greedy(policy, toys.prefill(policy, prompts), 8)
    cold = draw(policy, prompts, [1, 2, 3], Sampling(0.0, max_new_tokens=8))
    assert rows_of(greedy) == rows_of(cold)
    assert (cold.sampling_logps == 0).all() and (cold.logps[cold.mask] < 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_sample_depends_on_its_generator_alone(family: str):
    """The same prompt and generator draw the same tokens alone, among 3, among 16 and in another order."""
    policy = Policy(FAMILIES[family](eos_token_id=[2, 9, 17]), toys.tokenizer())
    prompts = [toys.prompts(5, seed=i)[i % 5] for i in range(16)]
    whole = draw(policy, prompts, list(range(16)), keep_logits=True)
    rows = rows_of(whole)
    assert len({len(row) for row in rows}) > 3
    order = torch.randperm(16).tolist()
    shuffled = draw(policy, [prompts[i] for i in order], order)
    assert rows_of(shuffled) == [rows[i] for i in order]
    for start in range(0, 16, 3):
        part = list(range(16))[start : start + 3]
        found = draw(policy, [prompts[i] for i in part], part)
        assert rows_of(found) == [rows[i] for i in part]
    for i in range(16):
        alone = draw(policy, [prompts[i]], [i], keep_logits=True)
        assert rows_of(alone) == [rows[i]]
        n = len(rows[i])
        torch.testing.assert_close(alone.logps[0, :n], whole.logps[i, :n], atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(alone.logits[0, :n], whole.logits[i, :n], atol=1e-4, rtol=1e-4)
        assert alone.finished[0] == whole.finished[i]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.8), (2.0, 0.95)])
def test_log_probabilities_of_samples(temperature: float, top_p: float):
    """logps are the policy's at temperature 1, sampling_logps those of the tempered, truncated law, logits raw."""
    policy, prompts = toys.policy(), toys.prompts(5)
    drawn = draw(policy, prompts, list(range(5)), Sampling(temperature, top_p, 12), keep_logits=True)
    assert (drawn.logps[~drawn.mask] == 0).all() and (drawn.sampling_logps[~drawn.mask] == 0).all()
    for row, (prompt, ids) in enumerate(zip(prompts, rows_of(drawn), strict=True)):
        n, tokens = len(ids), torch.tensor(ids)[:, None]
        log_probs = toys.reference_log_probs(policy.backbone.model, prompt, ids)
        torch.testing.assert_close(drawn.logits[row, :n].log_softmax(-1), log_probs, atol=5e-5, rtol=1e-4)
        own = log_probs.gather(-1, tokens).squeeze(-1)
        torch.testing.assert_close(drawn.logps[row, :n], own, atol=5e-5, rtol=1e-4)
        law = top_p_filter(log_probs / temperature, top_p).log_softmax(-1).gather(-1, tokens).squeeze(-1)
        torch.testing.assert_close(drawn.sampling_logps[row, :n], law, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_sampled_frequencies_follow_the_law(temperature: float, top_p: float):
    """Chi-square of first tokens, and of second tokens after a given first one, stays below its 1e-4 quantile."""
    policy, prompt, n = toys.policy(), toys.prompts(1)[0], 3000
    prefix = toys.prefill(policy, [prompt]).select(torch.zeros(n, dtype=torch.long))
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    forced = torch.full((n,), 5)
    one = policy.rollout(prefix, Sampling(temperature, top_p, 1), generators)
    two = policy.rollout(prefix, Sampling(temperature, top_p, 2), generators, first_tokens=forced)
    laws = [
        toys.reference_log_probs(policy.backbone.model, prompt, [5])[0],
        toys.reference_log_probs(policy.backbone.model, prompt, [5, 5])[1],
    ]
    for tokens, law in ((one.ids[:, 0], laws[0]), (two.ids[:, 1], laws[1])):
        probs = top_p_filter(law / temperature, top_p).softmax(-1)
        counts = torch.bincount(tokens, minlength=toys.VOCAB)
        assert (counts[probs == 0] == 0).all()
        statistic, freedom = chi_square(counts, probs)
        # Wilson and Hilferty's approximation of the quantile at 1 - 1e-4
        assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("family", FAMILIES)
def test_first_tokens_and_lengths(family: str):
    """A row starts with its given token and never exceeds its length, or the context, whoever is beside it."""
    policy = Policy(FAMILIES[family](), toys.tokenizer())
    context = policy.backbone.context_length
    prompts = [toys.prompts(1)[0], *([3] * (context - 4 + i) for i in range(3)), *([4, 5 + i] for i in range(7))]
    lengths = torch.tensor([12, 4, 3, 2, *[12] * 7])
    first = torch.tensor([5, 6, 7, 8, *[10] * 7])
    keys = list(range(len(prompts)))
    drawn = draw(policy, prompts, keys, first_tokens=first, lengths=lengths, keep_states=True)
    rows = rows_of(drawn)
    assert drawn.ids[:, 0].tolist() == first.tolist()
    assert (drawn.sampling_logps[:, 0] == 0).all()
    assert all(len(row) <= length for row, length in zip(rows, lengths.tolist(), strict=True))
    assert any(len(row) == length for row, length in zip(rows, lengths.tolist(), strict=True))
    for i in range(4):
        alone = draw(
            policy, [prompts[i]], [i], Sampling(1.0, max_new_tokens=int(lengths[i])), first_tokens=first[i : i + 1]
        )
        assert rows_of(alone) == [rows[i]]
        assert bool(drawn.finished[i]) == (rows[i][-1] == 2)
        expected = toys.reference_logps(policy.backbone.model, prompts[i], rows[i])
        torch.testing.assert_close(drawn.logps[i, : len(rows[i])], expected, atol=1e-4, rtol=1e-4)


def test_a_completion_ends_at_any_end_of_sequence_token():
    """The tokenizer's, the config's and the generation config's end tokens end a completion; nothing follows."""
    model = toys.build_llama(eos_token_id=9)
    model.generation_config.eos_token_id = [9, 17]
    policy = Policy(model, toys.tokenizer())
    assert policy.eos_ids.tolist() == [2, 9, 17]
    drawn = draw(policy, [[4, 5]] * 40, list(range(40)), Sampling(1.0, max_new_tokens=30))
    rows = rows_of(drawn)
    ends = {row[-1] for row, finished in zip(rows, drawn.finished.tolist(), strict=True) if finished}
    assert ends == {2, 9, 17}
    assert not {2, 9, 17} & {token for row in rows for token in row[:-1]}
    assert (drawn.ids[~drawn.mask] == policy.pad_id).all()


def test_a_policy_without_an_end_is_refused():
    """No end-of-sequence token anywhere is an error, not an endless completion."""
    model, tokenizer = toys.build_llama(eos_token_id=None), toys.build_tokenizer(toys.SORTING)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        Policy(model, tokenizer)


def test_weights_that_are_not_numbers_are_refused():
    """NaN logits stop a rollout with one line that says whose they are."""
    model = toys.build_llama(seed=3)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    policy = Policy(model, toys.tokenizer())
    with pytest.raises(UserError, match="policy.dtype: expected finite logits"):
        draw(policy, toys.prompts(1), [0])
