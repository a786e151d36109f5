"""The identities of the tilted policy in float64, laws and distances against naive sums, and the continuous case."""

from __future__ import annotations

import math

import pytest
import torch

from nabla_rl.duality.exact import (
    empirical_law,
    entropy,
    expected_iid_tv,
    expected_reward,
    fit_lambda,
    fit_lambda_tv,
    gibbs_policy,
    iid_tv_spread,
    kl_divergence,
    log_partition,
    objective,
    place,
    tilt,
    total_variation,
)
from nabla_rl.duality.gaussian import gaussian_kl, langevin_law, simulate, stationary_variance, target_law
from nabla_rl.duality.landscape import random_landscape
from nabla_rl.duality.rl import natural_gradient_law
from nabla_rl.functional.relaxation import one_hot_argmax, soft, straight_through
from nabla_rl.types import UserError

BETAS = (2.0, 1.0, 0.5, 0.2, 0.1)


def laws(size: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A policy, rewards and some other law."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(3, size, dtype=torch.float64, generator=generator)
    return normal[0].log_softmax(0), normal[1], normal[2].log_softmax(0)


@pytest.mark.parametrize("beta", BETAS)
def test_the_objective_is_its_best_value_less_the_divergence_to_the_tilted_policy(beta):
    """Identity 1: J(ρ) = β log Z - β KL(ρ‖ρ*), for any ρ."""
    logps, rewards, law = laws()
    gap = beta * log_partition(logps, rewards, beta) - beta * kl_divergence(law, gibbs_policy(logps, rewards, beta))
    torch.testing.assert_close(objective(law, logps, rewards, beta), gap, atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_the_tilted_policy_reaches_the_best_value(beta):
    """Identity 2: J(ρ*) = β log Z, and no other law does."""
    logps, rewards, law = laws()
    best = beta * log_partition(logps, rewards, beta)
    assert abs(float(objective(gibbs_policy(logps, rewards, beta), logps, rewards, beta)) - best) < 1e-12
    assert float(objective(law, logps, rewards, beta)) < best


def test_straight_through_is_hard_forward_and_soft_backward():
    """Identity 4."""
    weight = torch.randn(2, 5, dtype=torch.float64)
    gradients = []
    for relax in (straight_through, soft):
        logits = torch.linspace(-1, 2, 10, dtype=torch.float64).view(2, 5).requires_grad_()
        value = relax(logits)
        (value * weight).sum().backward()
        gradients.append(logits.grad)
        if relax is straight_through:
            assert torch.equal(value, one_hot_argmax(logits))
    torch.testing.assert_close(*gradients, atol=1e-15, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_half_the_strength_twice_is_all_of_it(beta):
    """Composition: tilting the tilted policy adds the strengths, in any split."""
    logps, rewards, _ = laws()
    whole = gibbs_policy(logps, rewards, beta)
    half = gibbs_policy(gibbs_policy(logps, rewards, 2 * beta), rewards, 2 * beta)
    uneven = tilt(tilt(logps, rewards, 0.3 / beta), rewards, 0.7 / beta)
    torch.testing.assert_close(half, whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(uneven, whole, atol=1e-11, rtol=0)


def test_without_reward_the_tilted_policy_is_the_policy():
    logps, rewards, _ = laws()
    torch.testing.assert_close(gibbs_policy(logps, rewards, math.inf), logps)
    assert abs(log_partition(logps, rewards, math.inf)) < 1e-12
    with pytest.raises(UserError, match="beta: expected positive"):
        gibbs_policy(logps, rewards, 0.0)


def test_natural_gradient_flow_passes_through_weaker_tilted_policies():
    """d log ρ/dt = -(log ρ/ρ* - KL) is met by the closed form (central difference)."""
    landscape, beta, time, step = random_landscape(3, 3), 0.5, 0.7, 1e-5
    target = landscape.tilted(beta)
    now = natural_gradient_law(landscape, beta, time)
    sides = [natural_gradient_law(landscape, beta, time + sign * step) for sign in (1, -1)]
    slope = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(slope, -(now - target - kl_divergence(now, target)), atol=1e-8, rtol=0)
    assert torch.equal(natural_gradient_law(landscape, beta, 0.0), landscape.logps)


def test_divergences_and_entropy_are_the_naive_sums():
    first, rewards, second = laws(6)
    p, q = first.exp(), second.exp()
    assert total_variation(first, second) == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
    assert float(kl_divergence(first, second)) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    )
    assert entropy(first) == pytest.approx(-sum(a * math.log(a) for a in p))
    assert float(expected_reward(first, rewards)) == pytest.approx(sum(a * r for a, r in zip(p, rewards, strict=True)))


def test_divergences_know_what_is_impossible():
    point, uniform = torch.tensor([0.0, -math.inf]).double(), torch.tensor([0.5, 0.5]).double().log()
    assert float(kl_divergence(point, uniform)) == pytest.approx(math.log(2))
    assert float(kl_divergence(uniform, point)) == math.inf
    assert entropy(point) == 0.0
    assert total_variation(point, uniform) == 0.5


def test_expected_distance_of_independent_draws_is_the_binomials(generator):
    """Against the direct sum over the binomial law, and against draws."""
    law, n = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), 7
    direct = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) * abs(k / n - p) / 2 for p in law.tolist() for k in range(n + 1)
    )
    assert expected_iid_tv(law.log(), n) == pytest.approx(direct, rel=1e-9)
    assert expected_iid_tv(torch.tensor([0.0, -math.inf]), 5) == pytest.approx(0.0, abs=1e-12)
    many = [
        total_variation(
            empirical_law(torch.multinomial(law, 500, replacement=True, generator=generator), 4), law.log()
        )
        for _ in range(300)
    ]
    spread = iid_tv_spread(law.log(), 500, generator)
    assert abs(sum(many) / 300 - expected_iid_tv(law.log(), 500)) < 4 * spread / math.sqrt(300)


@pytest.mark.parametrize("strength", [-2.0, 0.0, 0.7, 5.0])
def test_the_strength_of_a_tilted_policy_is_found_again(strength):
    logps, rewards, _ = laws()
    law = tilt(logps, rewards, strength)
    assert fit_lambda(law, logps, rewards) == pytest.approx(strength, abs=1e-6)
    if strength >= 0:
        assert fit_lambda_tv(law, logps, rewards) == pytest.approx(strength, abs=1e-3)


def test_the_strength_of_the_best_sequence_alone_is_infinite():
    logps, rewards, _ = laws()
    point = torch.full_like(logps, -math.inf)
    point[rewards.argmax()] = 0.0
    assert fit_lambda(point, logps, rewards) == math.inf
    point = point.roll(int(rewards.argmin() - rewards.argmax()))
    assert fit_lambda(point, logps, rewards) == -math.inf


def test_a_placement_is_zero_at_the_target_and_signed_elsewhere():
    logps, rewards, _ = laws()
    there = place(gibbs_policy(logps, rewards, 0.5), logps, rewards, 0.5)
    assert abs(there.tv) + abs(there.reverse_kl) + abs(there.reward_excess) + abs(there.entropy_excess) < 1e-9
    assert there.lambda_eff == pytest.approx(2.0, abs=1e-6)
    hot = place(tilt(logps, rewards, 8.0), logps, rewards, 0.5)
    assert hot.reward_excess > 0 > hot.entropy_excess
    assert hot.kl_at_lambda_eff < 1e-9 < hot.reverse_kl


@pytest.mark.parametrize("step_size", [0.02, 0.2, 1.0])
def test_the_gaussian_chain_has_the_law_of_the_closed_form(step_size, generator):
    """Identity 3: mean a/β, variance 1/(1 - h/2), and every step on the way."""
    direction, beta, chains = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.5, 20_000
    for steps in (3, 400 if step_size < 0.1 else 60):
        law = langevin_law(direction, beta, step_size=step_size, steps=steps)
        found = simulate(
            direction, beta, step_size=step_size, steps=steps, chains=chains, generator=generator
        )  # fmt: skip
        assert float((found.mean(0) - law.mean).abs().max()) < 4.5 * math.sqrt(law.variance / chains)
        assert abs(float(found.var(0).mean()) - law.variance) < 4.5 * law.variance * math.sqrt(2 / (3 * chains))
    assert law.variance == pytest.approx(stationary_variance(step_size), rel=1e-3)


def test_without_noise_every_gaussian_sample_ends_at_the_mode():
    direction, beta = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5
    found = simulate(direction, beta, step_size=0.1, steps=400, chains=50, noise=False)
    torch.testing.assert_close(found, target_law(direction, beta).mean.expand(50, 2), atol=1e-12, rtol=0)
    law = langevin_law(direction, beta, step_size=0.1, steps=400, noise=False)
    assert gaussian_kl(law, target_law(direction, beta)) > 70  # its entropy is gone
    noisy = langevin_law(direction, beta, step_size=0.1, steps=400)
    assert gaussian_kl(noisy, target_law(direction, beta)) < 0.01
    with pytest.raises(UserError, match=r"expected in \(0, 2\)"):
        stationary_variance(2.0)
