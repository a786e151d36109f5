"""Paired comparisons against hand-counted binomials, enumerated sign flips, and the normal approximation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nabla_rl.metrics.paired import bootstrap_interval, mcnemar_p, paired_difference, sign_flip_p


def pairs(both: int, first_only: int, second_only: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    counts = ((1, 1, both), (1, 0, first_only), (0, 1, second_only), (0, 0, neither))
    rows = [pair for a, b, count in counts for pair in [(a, b)] * count]
    first, second = torch.tensor(rows).T
    return first, second


# bootstrap_interval


def test_the_width_is_that_of_the_normal_law(generator):
    """For many problems the percentile interval is mean ± 1.96 s/√n."""
    values = torch.randn(2000, generator=generator, dtype=torch.float64)
    value, low, high = bootstrap_interval(values, generator=generator)
    error = float(values.std(correction=0)) / math.sqrt(2000)
    assert float(value) == pytest.approx(float(values.mean()))
    assert float(low) == pytest.approx(float(value) - 1.96 * error, abs=0.1 * error)
    assert float(high) == pytest.approx(float(value) + 1.96 * error, abs=0.1 * error)


def test_two_problems_by_enumeration(generator):
    """Means of two draws from {0, 1}: 0, ½, 1 with probabilities ¼, ½, ¼."""
    values = torch.tensor([0.0, 1.0])
    assert [float(x) for x in bootstrap_interval(values, generator=generator)] == [0.5, 0.0, 1.0]
    assert [float(x) for x in bootstrap_interval(values, generator=generator, confidence=0.4)] == [0.5, 0.5, 0.5]


def test_columns_share_their_draws_and_equal_each_alone():
    values = torch.rand(30, 2, 3, generator=torch.Generator().manual_seed(1))
    every = bootstrap_interval(values, generator=torch.Generator().manual_seed(2))
    assert every.value.shape == every.low.shape == every.high.shape == (2, 3)
    alone = bootstrap_interval(values[:, 1, 2], generator=torch.Generator().manual_seed(2))
    for column, single in zip(every, alone, strict=True):
        assert float(column[1, 2]) == pytest.approx(float(single), abs=1e-12)


def test_equal_values_have_no_width_and_no_problem_has_no_mean(generator):
    assert [float(x) for x in bootstrap_interval(torch.full((5,), 0.5), generator=generator)] == [0.5, 0.5, 0.5]
    assert all(math.isnan(x) for x in bootstrap_interval(torch.zeros(0), generator=generator))


def test_the_generator_decides():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    runs = [bootstrap_interval(values, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_coverage_of_a_paired_difference():
    """Of 200 experiments about 95% have the true difference, zero, inside; binomial error 1.5 points."""
    generator = torch.Generator().manual_seed(3)
    inside = 0
    for _ in range(200):
        skill = torch.rand(100, 1, generator=generator)  # problems differ, and both decoders feel it
        first, second = (torch.bernoulli(skill.expand(100, 3), generator=generator) for _ in range(2))
        _, low, high = paired_difference(first, second, generator=generator, resamples=400)
        inside += bool(low <= 0 <= high)
    assert 0.90 <= inside / 200 <= 0.99


# paired_difference


def test_the_difference_is_of_seed_means():
    first, second = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[0], [1]])
    value, low, high = paired_difference(first, second, generator=torch.Generator().manual_seed(0))
    assert float(value) == pytest.approx((2 / 3 + (1 / 3 - 1)) / 2)
    assert (float(low), float(high)) == pytest.approx((-2 / 3, 2 / 3))


def test_swapping_turns_the_interval_round():
    outcomes = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(4)).round()
    ours, theirs = (
        paired_difference(a, b, generator=torch.Generator().manual_seed(5))
        for a, b in ((outcomes[0], outcomes[1]), (outcomes[1], outcomes[0]))
    )
    assert torch.allclose(torch.stack(ours), -torch.stack([theirs.value, theirs.high, theirs.low]))


def test_seeds_of_one_problem_are_not_problems(generator):
    """Copies of one seed say nothing new: the interval stays as wide."""
    first, second = torch.rand(2, 80, 1, generator=generator).round()
    once = paired_difference(first, second, generator=torch.Generator().manual_seed(0))
    thrice = paired_difference(first.repeat(1, 3), second.repeat(1, 3), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(torch.stack(once), torch.stack(thrice))


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 2), (4, 2)), ((3, 0), (3, 2))])
def test_shapes_that_do_not_pair(shapes, generator):
    first, second = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="must be of shape"):
        paired_difference(first, second, generator=generator)
    with pytest.raises(ValueError, match="must be of shape"):
        sign_flip_p(first, second)


# mcnemar_p


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (6, 1, 2 * (1 + 7) / 128),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (3, 3, 1.0),
    ],
)
def test_mcnemar_by_hand(wins, losses, p):
    assert mcnemar_p(*pairs(4, wins, losses, 2)) == pytest.approx(p)


def test_mcnemar_of_thousands_does_not_overflow():
    assert 0 < mcnemar_p(*pairs(10, 1200, 1000, 10)) < 1e-4


# sign_flip_p


@given(st.integers(0, 12), st.integers(0, 12))
def test_with_one_seed_it_is_mcnemar(wins, losses):
    first, second = pairs(2, wins, losses, 1)
    assert sign_flip_p(first[:, None], second[:, None]) == pytest.approx(mcnemar_p(first, second))


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 5), min_size=1, max_size=7))
def test_all_sign_choices_by_enumeration(rows):
    """Three seeds of one decoder, two of the other."""
    outcomes = torch.tensor(rows)
    first, second = outcomes[:, :3], outcomes[:, 3:]
    differences = [
        round(6 * float(a - b)) for a, b in zip(first.double().mean(1), second.double().mean(1), strict=True)
    ]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((-1, 1), repeat=len(rows))]  # fmt: skip
    expected = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip_p(first, second) == pytest.approx(expected)
