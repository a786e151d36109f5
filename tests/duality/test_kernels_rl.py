"""Exact transition matrices and tabular RL: both sides end at the tilted policy."""

from __future__ import annotations

import pytest
import torch

from nabla_rl.duality.exact import kl_divergence, log_partition, objective, total_variation
from nabla_rl.duality.kernels import (
    Kernel,
    alternate,
    converge,
    discrete_langevin_kernel,
    gibbs_with_gradients_kernel,
    independence_kernel,
    law_after,
)
from nabla_rl.duality.landscape import Landscape, random_landscape
from nabla_rl.duality.rl import leave_one_out_loss, train_exact, train_sampled
from nabla_rl.duality.space import TabularPolicy
from nabla_rl.types import UserError

LANDSCAPE = random_landscape(4, 3, seed=1, reward_scale=0.5)
BETAS = (2.0, 1.0, 0.5, 0.2, 0.1)


def kernels(landscape: Landscape, beta: float) -> dict[str, Kernel]:
    local, wide = gibbs_with_gradients_kernel(landscape, beta), independence_kernel(landscape, beta)
    return {
        "gibbs": local,
        "langevin": discrete_langevin_kernel(landscape, beta, 2.0),
        "independence": wide,
        "both": alternate(local, wide),
    }


@pytest.mark.parametrize("beta", BETAS)
def test_corrected_kernels_are_reversible_and_end_at_the_tilted_policy(beta):
    target = LANDSCAPE.tilted(beta)
    for name, kernel in kernels(LANDSCAPE, beta).items():
        flow = target.exp()[:, None] * kernel.matrix
        torch.testing.assert_close(flow, flow.T, atol=1e-13, rtol=0, msg=name)
        torch.testing.assert_close(kernel.matrix.sum(1), torch.ones(64, dtype=torch.float64))
        path = converge(kernel, LANDSCAPE.logps, target, max_steps=20_000)
        assert path.tv[-1] < 0.02, name
        assert path.kl == sorted(path.kl, reverse=True), name  # a kernel that keeps ρ* never moves away from it


def test_a_wrong_gradient_does_not_change_where_the_corrected_kernels_end():
    """The reward's gradient is noise: only the speed suffers."""
    wrong = torch.randn(64, 3, 4, dtype=torch.float64)
    landscape = Landscape(LANDSCAPE.space, LANDSCAPE.logps, LANDSCAPE.rewards, None, wrong)
    for kernel in (gibbs_with_gradients_kernel(landscape, 0.5), discrete_langevin_kernel(landscape, 0.5, 2.0)):
        path = converge(kernel, landscape.logps, landscape.tilted(0.5), max_steps=5000)
        assert path.tv[-1] < 1e-4


def test_without_the_correction_discrete_langevin_ends_elsewhere():
    kernel = discrete_langevin_kernel(LANDSCAPE, 0.5, 2.0, corrected=False)
    path = converge(kernel, LANDSCAPE.logps, LANDSCAPE.tilted(0.5), max_steps=500)
    assert path.tv[-1] > 0.05
    assert total_variation(kernel.apply(path.law.exp()).log(), path.law) < 1e-6  # at rest


def test_convergence_counts_what_was_proposed():
    path = converge(kernels(LANDSCAPE, 0.5)["gibbs"], LANDSCAPE.logps, LANDSCAPE.tilted(0.5), max_steps=40, kl=0.0)
    assert path.steps == list(range(41))
    assert path.evaluations == pytest.approx(list(range(1, 42)))  # every proposal is a change, and the start was read
    steps = path.steps_to_tv(0.02)
    assert steps is not None and path.tv[steps] <= 0.02 < path.tv[steps - 1]
    assert path.steps_to_tv(-1.0) is None and path.evaluations_to_tv(-1.0) is None


def test_strides_of_many_steps_are_those_steps():
    """Late steps are taken many at a time: the law and its cost are those of single steps."""
    kernel, target = kernels(LANDSCAPE, 0.2)["gibbs"], LANDSCAPE.tilted(0.2)
    path = converge(kernel, LANDSCAPE.logps, target, max_steps=3000, kl=-1.0)
    assert path.steps[-1] >= 3000 and len(path.steps) < 1000
    probs, spent = LANDSCAPE.logps.exp(), 1.0
    for _ in range(path.steps[-1]):
        spent += float(probs @ kernel.evaluations)
        probs = kernel.apply(probs)
    torch.testing.assert_close(path.law.exp(), probs, atol=1e-12, rtol=0)
    assert path.evaluations[-1] == pytest.approx(spent, rel=1e-10)
    torch.testing.assert_close(law_after(kernel, LANDSCAPE.logps, path.steps[-1]).exp(), probs)


def test_a_matrix_of_a_large_space_is_refused():
    with pytest.raises(UserError, match="at most 8,192 sequences"):
        independence_kernel(random_landscape(10, 4), 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_rl_reaches_the_tilted_policy(beta, generator):
    exact = train_exact(LANDSCAPE, beta, num_steps=400)
    assert exact.kl[-1] <= 0.01
    sampled = train_sampled(
        LANDSCAPE, beta, num_steps=500, batch_size=128, learning_rate=0.1, generator=generator
    )  # fmt: skip
    assert sampled.kl[-1] <= 0.01
    assert sampled.kl[-1] == pytest.approx(float(kl_divergence(sampled.law, LANDSCAPE.tilted(beta))))
    best = beta * log_partition(LANDSCAPE.logps, LANDSCAPE.rewards, beta)
    gap = best - float(objective(exact.law, LANDSCAPE.logps, LANDSCAPE.rewards, beta))
    assert gap == pytest.approx(beta * exact.kl[-1], abs=1e-9)


def test_the_leave_one_out_gradient_is_unbiased(generator):
    """Its mean over many batches is the exact gradient of -J/β, within its own standard error."""
    landscape, beta = random_landscape(2, 2, seed=4), 0.5
    policy = TabularPolicy.from_logps(landscape.logps.roll(1), landscape.space)
    exact = -objective(policy(), landscape.logps, landscape.rewards, beta) / beta
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, list(policy.parameters()))])
    drawn = []
    for _ in range(800):
        loss = leave_one_out_loss(policy, landscape, policy.sample(16, generator), beta)
        drawn.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))]))
    found = torch.stack(drawn)
    assert bool(((found.mean(0) - expected).abs() < 4.5 * found.std(0) / 800**0.5 + 1e-12).all())


def test_at_the_optimum_every_return_is_the_same_and_the_noise_is_gone(generator):
    policy = TabularPolicy.from_logps(LANDSCAPE.tilted(0.5), LANDSCAPE.space)
    loss = leave_one_out_loss(policy, LANDSCAPE, policy.sample(32, generator), 0.5)
    for gradient in torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True):
        assert gradient is None or float(gradient.abs().max()) < 1e-10


def test_half_in_weights_and_half_at_test_time_is_all_in_one_place():
    """Composition with trained weights: a chain at λ/2 from the policy trained at λ/2 ends at λ."""
    beta, target = 0.2, LANDSCAPE.tilted(0.2)
    trained = train_exact(LANDSCAPE, 2 * beta, num_steps=400).law
    second = LANDSCAPE.with_policy(trained)
    path = converge(gibbs_with_gradients_kernel(second, 2 * beta), trained, target, max_steps=5000)
    alone = converge(gibbs_with_gradients_kernel(LANDSCAPE, beta), LANDSCAPE.logps, target, max_steps=5000)
    assert path.tv[-1] < 1e-3
    warm, cold = path.steps_to_tv(0.02), alone.steps_to_tv(0.02)
    assert warm is not None and cold is not None and warm < cold
