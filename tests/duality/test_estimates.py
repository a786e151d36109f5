"""Estimates on samples against what is known exactly on a listed space."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nabla_rl.duality import estimates
from nabla_rl.duality.exact import expected_reward, gibbs_policy, kl_divergence, log_partition
from nabla_rl.duality.landscape import random_landscape
from nabla_rl.duality.laws import best_of_n_law

LANDSCAPE = random_landscape(4, 3, seed=2, reward_scale=0.7)
LOGPS, REWARDS = LANDSCAPE.logps, LANDSCAPE.rewards


def pool(problems: int, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of sequences drawn from the policy."""
    return torch.multinomial(LOGPS.exp(), problems * draws, replacement=True, generator=generator).view(problems, -1)


def near(values: torch.Tensor, truth: float, slack: float = 0.0) -> bool:
    """Is the mean within 4.5 standard errors, and a known bias, of the truth?"""
    return abs(float(values.mean()) - truth) < 4.5 * float(values.std()) / math.sqrt(len(values)) + slack


def test_best_of_n_weights_are_those_of_all_subsets():
    """Every way to take n of the draws, counted out; draws of equal score share."""
    scores = torch.tensor([[0.3, 2.0, -1.0, 2.0, 0.5]])
    for n in (1, 2, 3, 5):
        expected = torch.zeros(5, dtype=torch.float64)
        for subset in itertools.combinations(range(5), n):
            best = max(scores[0, list(subset)])
            winners = [k for k in subset if scores[0, k] == best]
            for k in winners:
                expected[k] += 1 / len(winners)
        expected /= expected.sum()
        torch.testing.assert_close(estimates.best_of_n_weights(scores, n)[0], expected)
    with pytest.raises(ValueError, match=r"`n` must be in \[1, 5\]"):
        estimates.best_of_n_weights(scores, 6)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_on_a_pool_has_the_reward_and_the_kl_of_the_exact_law(n, generator):
    index = pool(1500, 200, generator)
    law = best_of_n_law(LOGPS, REWARDS, n)
    weights = estimates.best_of_n_weights(REWARDS[index], n)
    assert near((weights * REWARDS[index]).sum(1), float(expected_reward(law, REWARDS)))
    kl = estimates.best_of_n_kl(LOGPS[index], REWARDS[index], index, n)
    truth = float(kl_divergence(law, LOGPS))
    assert near(kl, truth, slack=0.04 * truth + 0.005)  # F is known from 200 draws
    assert truth < estimates.best_of_n_kl_bound(n)


def test_the_analytic_bound_is_the_kl_where_no_completion_is_likely():
    size = 20_000
    logps, scores = torch.full((size,), -math.log(size), dtype=torch.float64), torch.arange(size).double()
    for n in (2, 8, 32):
        truth = float(kl_divergence(best_of_n_law(logps, scores, n), logps))
        assert truth == pytest.approx(estimates.best_of_n_kl_bound(n), abs=2e-3)
        assert truth < estimates.best_of_n_kl_bound(n)


@pytest.mark.parametrize("beta", [4.0, 1.0])
def test_a_reweighted_pool_is_the_tilted_policy(beta, generator):
    index = pool(1500, 400, generator)
    tilted, law = estimates.tilt_pool(REWARDS[index], beta), gibbs_policy(LOGPS, REWARDS, beta)
    assert near((tilted.weights * REWARDS[index]).sum(1), float(expected_reward(law, REWARDS)), slack=0.02)
    assert near(tilted.kl, float(kl_divergence(law, LOGPS)), slack=0.02)
    assert near(tilted.log_partition, log_partition(LOGPS, REWARDS, beta), slack=0.02)
    assert float(tilted.effective.min()) > 10
    none = estimates.tilt_pool(REWARDS[index], 1e9)
    torch.testing.assert_close(none.effective, torch.full_like(none.effective, 400.0))


@pytest.mark.parametrize("beta", [3.0, 0.5])
def test_the_least_kl_is_below_the_truth_and_near_it_for_a_tilted_policy(beta, generator):
    index = pool(400, 200, generator)
    law = gibbs_policy(LOGPS, REWARDS, beta)
    drawn = torch.multinomial(law.exp(), 400 * 8, replacement=True, generator=generator).view(400, 8)
    truth = float(kl_divergence(law, LOGPS))
    found = estimates.least_kl(REWARDS[drawn], REWARDS[index])
    assert 0.4 * truth < found < 1.05 * truth
    # of the policy itself nothing can be said but the noise; and rewards beyond every draw are no infinite evidence
    assert estimates.least_kl(REWARDS[index[:, :8]], REWARDS[index[:, 8:]]) < 0.02
    beyond = torch.full((400, 1), 100.0, dtype=torch.float64)
    assert estimates.least_kl(beyond, REWARDS[index]) <= math.log(200 / estimates.CARRIED) + 1e-9


def test_overlap_and_wins_by_hand():
    assert estimates.token_overlap([(1, 2, 3)], [(1, 5, 3, 4), (1, 2, 3)]) == pytest.approx((2 / 4 + 1) / 2)
    assert estimates.token_overlap([(1, 2), (1, 3)], [(1, 2), (1, 3)], same=True) == pytest.approx(0.5)
    wins = estimates.win_share(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert wins == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_correlations_and_their_intervals(generator):
    x = torch.randn(400, generator=generator, dtype=torch.float64)
    y = 0.6 * x + 0.8 * torch.randn(400, generator=generator, dtype=torch.float64)
    found = estimates.correlation(x, y, generator)
    assert found.low < 0.6 < found.high and found.value == pytest.approx(
        float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    )
    ranks = estimates.correlation(x, x.exp(), generator, ranks=True)
    assert ranks.value == pytest.approx(1.0)
    tied = estimates.correlation(
        torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([5.0, 5.0, 6.0, 9.0]), generator, ranks=True
    )
    assert tied.value == pytest.approx(1.0)


def test_the_probe_tells_laws_apart_that_differ_and_only_those(generator):
    """Each problem has features of its own, far larger than what the laws differ in."""
    problems = torch.arange(150).repeat_interleave(3)
    own = 5 * torch.randn(150, 6, generator=generator)[problems]
    first, same = (own + torch.randn(450, 6, generator=generator) for _ in range(2))
    other = own + torch.randn(450, 6, generator=generator) + 0.5
    found = estimates.two_sample_test(first, other, problems, generator)
    assert found.accuracy.low > 0.65 and found.p_value == pytest.approx(1 / (1 + estimates.PERMUTATIONS))
    null = estimates.two_sample_test(first, same, problems, generator)
    assert null.accuracy.low < 0.5 < null.accuracy.high and null.p_value > 0.01
    # equal completions are a coin's flip each
    half = torch.where(torch.arange(450)[:, None] % 2 == 0, first, other)
    assert estimates.two_sample_test(first, half, problems, generator).accuracy.value < 0.5 + 0.5 * 0.5
    nothing = estimates.two_sample_test(first, first, problems, generator)
    assert nothing.accuracy == (0.5, 0.5, 0.5) and nothing.p_value == 1.0


def test_the_permutation_test_rejects_one_law_no_more_often_than_it_says(generator):
    problems, rejected = torch.arange(40).repeat_interleave(2), 0
    for _ in range(60):
        first, second = (torch.randn(80, 4, generator=generator) for _ in range(2))
        rejected += estimates.two_sample_test(first, second, problems, generator).p_value <= 0.1
    assert rejected <= 14  # of Binomial(60, 0.1): beyond with probability 0.001
