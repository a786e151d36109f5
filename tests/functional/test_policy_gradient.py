"""Group advantages and losses against closed forms, enumeration and the theory of the tilted policy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nabla_rl.functional.kl import kl_estimate
from nabla_rl.functional.policy_gradient import (
    clipped_surrogate,
    group_relative_advantages,
    grpo_loss,
    leave_one_out_advantages,
    penalise_rewards,
    rloo_loss,
)

NAN = float("nan")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Advantages


def test_leave_one_out_is_the_scaled_distance_from_the_mean():
    """g_i - mean of the others = G/(G - 1) (g_i - mean of all)."""
    returns = draw(12)
    groups = returns.view(3, 4)
    expected = 4 / 3 * (groups - groups.mean(1, keepdim=True))
    torch.testing.assert_close(leave_one_out_advantages(returns, 4), expected.flatten())


def test_equal_returns_have_no_advantage():
    assert not leave_one_out_advantages(torch.ones(6), 3).any()
    for scale in ("group", "batch", "none"):
        assert not group_relative_advantages(torch.ones(6), 3, scale=scale).any()


def test_scales():
    rewards = torch.tensor([0.0, 2.0, 10.0, 10.0], dtype=torch.float64)
    none = torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(group_relative_advantages(rewards, 2, scale="none"), none)
    group = none / (torch.tensor([2.0, 2.0, 0.0, 0.0]).sqrt().double() + 1e-4)
    torch.testing.assert_close(group_relative_advantages(rewards, 2, scale="group"), group)
    torch.testing.assert_close(group_relative_advantages(rewards, 2, scale="batch"), none / (rewards.std() + 1e-4))


@pytest.mark.parametrize("function", [leave_one_out_advantages, group_relative_advantages])
def test_a_missing_reward_is_no_part_of_its_group(function):
    with_gap = function(torch.tensor([1.0, NAN, 4.0, 2.0, 3.0, 5.0]), 3)
    assert with_gap[1] == 0.0
    torch.testing.assert_close(with_gap[[0, 2]], function(torch.tensor([1.0, 4.0]), 2))
    torch.testing.assert_close(with_gap[3:], function(torch.tensor([2.0, 3.0, 5.0]), 3))
    assert not function(torch.tensor([NAN, NAN, 1.0]), 3).any()


def test_normalized_advantages_are_white():
    advantages = leave_one_out_advantages(draw(40), 4, normalize=True)
    assert advantages.mean().abs() < 1e-6 and abs(advantages.std() - 1) < 1e-3


@pytest.mark.parametrize("function", [leave_one_out_advantages, group_relative_advantages])
@pytest.mark.parametrize("size", [1, 4])
def test_groups_must_be_whole(function, size):
    with pytest.raises(ValueError, match="must be at least 2 and divide the batch of 6"):
        function(torch.zeros(6), size)


# The penalty


def test_penalty_ignores_padding():
    kl = torch.tensor([[1.0, NAN], [2.0, 3.0]])
    mask = torch.tensor([[True, False], [True, True]])
    penalised = penalise_rewards(torch.tensor([1.0, 1.0]), kl, mask, beta=0.5)
    torch.testing.assert_close(penalised, torch.tensor([0.5, -1.5]))


def test_at_the_tilted_policy_every_return_is_the_same():
    """r - β log(ρ*/π) = β log Z: nothing is left to learn, whatever is sampled, from whatever law."""
    ref, rewards, beta = draw(7).log_softmax(0), draw(7, seed=1), 0.3
    logits = ref + rewards / beta
    tilted = logits.log_softmax(0)
    kl = kl_estimate(tilted, ref, "k1")[:, None]
    returns = penalise_rewards(rewards, kl, torch.ones(7, 1, dtype=torch.bool), beta=beta)
    torch.testing.assert_close(returns, beta * logits.logsumexp(0).expand(7))
    assert leave_one_out_advantages(returns, 7).abs().max() < 1e-12


# Losses


def test_on_fresh_samples_the_gradient_is_minus_advantage_times_score():
    logps, advantages = draw(6).requires_grad_(), draw(6, seed=1)
    clipped_surrogate(logps, logps.detach(), advantages, epsilon=0.2).sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)


def test_clipping_stops_gains_and_not_losses():
    ratios = torch.tensor([0.5, 1.5, 0.5, 1.5], dtype=torch.float64)
    logps, advantages = ratios.log().requires_grad_(), torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    losses = clipped_surrogate(logps, torch.zeros(4, dtype=torch.float64), advantages, epsilon=0.2, epsilon_high=0.3)
    torch.testing.assert_close(losses, torch.tensor([-0.5, -1.3, 0.8, 1.5], dtype=torch.float64))
    losses.sum().backward()
    assert logps.grad is not None
    assert (logps.grad == 0).tolist() == [False, True, True, False]


def test_rloo_is_unbiased_by_enumeration():
    """The mean of the loss's gradient over all pairs of samples is -∇J, with the KL in the return."""
    logits, ref, rewards, beta = draw(4).requires_grad_(), draw(4, seed=1).log_softmax(0), draw(4, seed=2), 0.7
    log_probs = logits.log_softmax(0)
    objective = (log_probs.exp() * (rewards - beta * (log_probs - ref))).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    mask, total = torch.ones(2, 1, dtype=torch.bool), torch.zeros(4, dtype=torch.float64)
    for first in range(4):
        for second in range(4):
            pair = torch.tensor([first, second])
            logps = logits.log_softmax(0)[pair][:, None]
            kl = kl_estimate(logps.detach(), ref[pair][:, None], "k1")
            advantages = leave_one_out_advantages(penalise_rewards(rewards[pair], kl, mask, beta=beta), 2)
            loss = rloo_loss(logps, logps.detach().squeeze(1), advantages, mask)
            (gradient,) = torch.autograd.grad(loss, logits)
            total += log_probs[pair].sum().exp().detach() * gradient
    torch.testing.assert_close(total, -exact)


@pytest.mark.parametrize("estimator", ["k3", "k1"])
def test_the_kl_in_the_loss_is_unbiased_only_with_the_ratio(estimator):
    """What GRPO's bias correction is for: E[∇k] is not ∇KL, and is zero for k1; E[∇(ratio · k)] is ∇KL."""
    logits, ref = draw(5).requires_grad_(), draw(5, seed=1).log_softmax(0)
    log_probs = logits.log_softmax(0)
    probs = log_probs.exp().detach()
    (exact,) = torch.autograd.grad((log_probs.exp() * (log_probs - ref)).sum(), logits, retain_graph=True)
    kl = kl_estimate(log_probs, ref, estimator)
    (plain,) = torch.autograd.grad((probs * kl).sum(), logits, retain_graph=True)
    ratio = (log_probs - log_probs.detach()).exp()
    (corrected,) = torch.autograd.grad((probs * ratio * kl).sum(), logits)
    torch.testing.assert_close(corrected, exact)
    assert (plain - exact).norm() > 0.1 * exact.norm()
    if estimator == "k1":
        assert plain.abs().max() < 1e-12


def test_normalisations():
    logps, mask = torch.zeros(2, 3), torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([-1.0, -4.0])

    def loss(**options) -> float:
        return grpo_loss(logps, logps, advantages, mask, **options).item()

    assert loss(loss_type="grpo") == pytest.approx((1 + 4) / 2)
    assert loss(loss_type="dapo") == pytest.approx((3 * 1 + 4) / 4)
    assert loss(loss_type="dapo", num_items=14.0) == pytest.approx((3 * 1 + 4) / 14)
    assert loss(loss_type="dr_grpo", max_completion_length=5) == pytest.approx((3 * 1 + 4) / 10)
    kl = torch.full((2, 3), 0.5).masked_fill(~mask, NAN)
    assert loss(loss_type="dapo", per_token_kl=kl, beta=2.0) == pytest.approx(7 / 4 + 1.0)


def test_padding_has_no_part_in_a_loss_or_its_gradient():
    logps = torch.tensor([[0.1, NAN], [0.2, 0.3]]).requires_grad_()
    mask = torch.tensor([[True, False], [True, True]])
    old, advantages = torch.tensor([[0.0, NAN], [0.0, 0.0]]), torch.tensor([1.0, -1.0])
    loss = grpo_loss(logps, old, advantages, mask, loss_type="dapo")
    assert torch.isfinite(loss)
    assert torch.isfinite(rloo_loss(logps, torch.zeros(2), advantages, mask))


def test_what_is_divided_by_must_be_given():
    logps, mask = torch.zeros(2, 1), torch.ones(2, 1).bool()
    with pytest.raises(ValueError, match="`max_completion_length` must be given for 'dr_grpo'"):
        grpo_loss(logps, logps, torch.ones(2), mask, loss_type="dr_grpo")
