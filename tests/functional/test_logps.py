"""Log-probabilities: closed forms, precision, truncation, inversion sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_rl.functional import (
    categorical_from_uniform,
    compute_entropy,
    selective_log_softmax,
    sequence_logps,
    top_p_filter,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_selective_log_softmax_equals_gathered_log_softmax() -> None:
    """Picking before normalising equals normalising before picking, for one index per row and for several."""
    logits = 5 * draw(2, 3, 11)
    one, many = torch.tensor([[0, 3, 10], [1, 1, 2]]), torch.randint(11, (2, 3, 4), generator=torch.manual_seed(0))
    everything = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(selective_log_softmax(logits, one), everything.gather(-1, one[..., None])[..., 0])
    torch.testing.assert_close(selective_log_softmax(logits, many), everything.gather(-1, many))


def test_bfloat16_logits_give_float32_logps() -> None:
    """Half-precision logits are normalised in float32: the result is that of the upcast logits to the bit."""
    logits = draw(2, 1000, dtype=torch.float32).bfloat16()
    index = torch.tensor([3, 700])
    logps = selective_log_softmax(logits, index)
    assert logps.dtype == torch.float32 and torch.equal(logps, selective_log_softmax(logits.float(), index))
    assert compute_entropy(logits).dtype == torch.float32
    assert selective_log_softmax(logits.double(), index).dtype == torch.float64


def test_sequence_logps_ignores_masked_positions() -> None:
    """Masked positions have no effect on the sum and get no gradient, even if they hold NaN or -inf."""
    logps = torch.tensor([[-1.0, float("nan"), -2.0, float("-inf")]], requires_grad=True)
    total = sequence_logps(logps, torch.tensor([[True, False, True, False]]))
    total.sum().backward()
    assert total.item() == -3.0 and logps.grad is not None
    assert logps.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_entropy_closed_forms_and_gradient() -> None:
    """Entropy is log n for n equal tokens, 0 for a certain one; impossible tokens add 0 and no NaN to gradients."""
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf], [0.0, -math.inf, -math.inf, -math.inf]]
    )
    torch.testing.assert_close(compute_entropy(logits), torch.tensor([math.log(4), math.log(2), 0.0]))
    leaf = logits.clone().requires_grad_()
    compute_entropy(leaf).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    assert torch.autograd.gradcheck(compute_entropy, (draw(2, 5).requires_grad_(),))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_nucleus_is_the_smallest_set_with_enough_mass(seed: int, top_p: float) -> None:
    """What is kept has mass at least top_p, has less without its least likely token, and is likelier than the rest."""
    logits = 2 * draw(9, seed=seed)
    kept = top_p_filter(logits, top_p).isfinite()
    probs = torch.softmax(logits, dim=-1)
    mass, least = probs[kept].sum(), probs[kept].min()
    assert mass >= top_p - 1e-12 and mass - least < top_p
    assert kept.all() or probs[~kept].max() <= least


def test_top_p_limits() -> None:
    """At 1 nothing changes; at nearly 0 exactly the best token stays; kept logits are untouched; the dtype stays."""
    logits = draw(4, 9, dtype=torch.float32).bfloat16()
    assert torch.equal(top_p_filter(logits, 1.0), logits)
    greedy = top_p_filter(logits, 1e-9)
    assert greedy.dtype == torch.bfloat16 and torch.equal(greedy.isfinite().sum(-1), torch.ones(4, dtype=torch.long))
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and torch.equal(greedy.amax(-1), logits.amax(-1))
    for wrong in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="`top_p` must be in"):
            top_p_filter(logits, wrong)


def test_inversion_reproduces_the_law() -> None:
    """Equally spaced uniforms give each token as often as its probability says, up to one."""
    probs = torch.tensor([0.1, 0.0, 0.4, 0.5, 0.0], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = categorical_from_uniform(probs.log().expand(1000, 5), uniform)
    counts = torch.bincount(tokens, minlength=5)
    assert bool(((counts - 1000 * probs).abs() <= 1).all())


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0])
def test_impossible_tokens_are_never_sampled(uniform: float) -> None:
    """At both ends of the unit interval, and beyond rounding, the token drawn has positive probability."""
    logits = torch.full((1, 12), -math.inf)
    logits[0, [3, 5, 8]] = torch.tensor([0.0, 1e-3, -60.0])
    token = categorical_from_uniform(logits, torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in (3, 5, 8)


def test_sampling_a_row_does_not_depend_on_the_batch() -> None:
    """Given its uniform, a row's token is the same alone and in a batch."""
    logits, uniform = draw(6, 50), torch.rand(6, generator=torch.Generator().manual_seed(0))
    together = categorical_from_uniform(logits, uniform)
    alone = torch.cat([categorical_from_uniform(logits[i : i + 1], uniform[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_law_is_refused(bad: float) -> None:
    """Logits that are NaN, +inf or all -inf raise instead of giving an arbitrary token."""
    for logits in (torch.tensor([[0.0, bad]]), torch.full((1, 2), -math.inf)):
        with pytest.raises(ValueError, match="`logits` must give every row a distribution"):
            categorical_from_uniform(logits, torch.tensor([0.5]))
