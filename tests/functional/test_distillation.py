"""The losses of distillation against closed forms; test_distiller.py holds them to TRL's trainers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nabla_rl.functional.distillation import dpo_loss, reward_weights, sft_loss, soft_target_kl, tilted_log_probs
from nabla_rl.functional.kl import forward_kl

DOUBLE = torch.float64


def laws(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE).log_softmax(-1)


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# Likelihood


def test_sft_is_cross_entropy_over_the_real_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=DOUBLE)
    ids, mask = torch.randint(5, (3, 4), generator=generator), mask_of(4, 2, 1)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~mask, -100).flatten())
    torch.testing.assert_close(sft_loss(logps, mask), expected)


def test_padding_has_no_effect_even_where_it_is_no_number():
    logps = torch.tensor([[-1.0, math.nan], [-2.0, -3.0]])
    assert sft_loss(logps, mask_of(1, 2)).item() == pytest.approx(2.0)


def test_equal_weights_change_nothing_and_a_zero_weight_leaves_its_row_out():
    logps, mask = laws(2, 3), mask_of(3, 2)
    torch.testing.assert_close(sft_loss(logps, mask, weights=torch.full((2,), 7.0)), sft_loss(logps, mask))
    alone = sft_loss(logps[1:], mask[1:])
    torch.testing.assert_close(sft_loss(logps, mask, weights=torch.tensor([0.0, 0.3])), alone)


def test_parts_of_a_step_add_up_to_the_whole():
    logps, mask, weights = laws(4, 3), mask_of(3, 1, 2, 3), torch.tensor([0.5, 1.0, 2.0, 0.1])
    items = float((weights * mask.sum(-1)).sum())
    parts = [sft_loss(logps[i : i + 2], mask[i : i + 2], weights=weights[i : i + 2], num_items=items) for i in (0, 2)]
    torch.testing.assert_close(sum(parts), sft_loss(logps, mask, weights=weights))


def test_without_any_weight_the_loss_is_zero():
    assert sft_loss(laws(2, 3), mask_of(3, 2), weights=torch.zeros(2)).item() == 0.0


# Weights


@given(st.floats(0.05, 10.0), st.floats(-50.0, 50.0))
def test_weights_sum_to_one_for_each_prompt_and_ignore_a_constant(beta, constant):
    rewards, groups = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE), torch.tensor([0, 1, 0, 1])
    weights = reward_weights(rewards, groups, beta=beta)
    sums = torch.zeros(2, dtype=DOUBLE).index_add(0, groups, weights)
    torch.testing.assert_close(sums, torch.ones(2, dtype=DOUBLE))
    torch.testing.assert_close(reward_weights(rewards + constant, groups, beta=beta), weights)


def test_weights_are_exponential_in_the_reward_over_beta():
    weights = reward_weights(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), beta=0.5)
    assert (weights[1] / weights[0]).item() == pytest.approx(math.exp(2.0))
    assert torch.equal(
        reward_weights(torch.tensor([0.0, 9.0]), torch.tensor([0, 0]), beta=math.inf), torch.ones(2) / 2
    )


def test_enormous_rewards_do_not_overflow():
    weights = reward_weights(torch.tensor([1e4, 0.0, -1e4]), torch.tensor([0, 0, 1]), beta=0.01)
    assert weights.tolist() == [1.0, 0.0, 1.0]


def test_weighted_likelihood_heads_for_the_tilted_policy():
    """On all sequences, weighted by π: the minimum of the loss is ρ* ∝ π exp(r/β)."""
    policy, rewards, beta = laws(6), torch.linspace(-1.0, 2.0, 6, dtype=DOUBLE), 0.7
    weights = policy.exp() * torch.exp(rewards / beta)
    logits = torch.zeros(6, dtype=DOUBLE, requires_grad=True)
    logps = logits.log_softmax(-1)[:, None]
    sft_loss(logps, torch.ones(6, 1, dtype=torch.bool), weights=weights).backward()
    tilted = tilted_log_probs(policy, rewards, beta=beta)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.softmax(-1).detach() - tilted.exp())


# Preferences


def test_dpo_of_an_unchanged_policy_is_log_two_with_half_the_slope():
    chosen = torch.tensor([-3.0, -5.0], dtype=DOUBLE, requires_grad=True)
    rejected = torch.tensor([-4.0, -1.0], dtype=DOUBLE)
    losses = dpo_loss(chosen, rejected, chosen.detach(), rejected, beta=0.3)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2.0), dtype=DOUBLE))
    losses.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full((2,), -0.15, dtype=DOUBLE))


def test_dpo_is_the_logistic_loss_of_the_implicit_rewards():
    a, b, c, d = laws(4, 5)
    beta = 0.2
    expected = torch.log1p(torch.exp(-beta * ((a - c) - (b - d))))
    torch.testing.assert_close(dpo_loss(a, b, c, d, beta=beta), expected)


# Soft targets


def test_tilted_law_is_the_exact_conditional():
    """Two tokens of three letters: with V = β log E[exp(r/β) | prefix], the first token's tilt is ρ*'s marginal."""
    first, second, beta = laws(3), laws(3, 3, seed=1), 0.6
    rewards = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    joint = (first[:, None] + second + rewards / beta).flatten().softmax(0).view(3, 3)
    values = beta * (second + rewards / beta).logsumexp(-1)
    torch.testing.assert_close(tilted_log_probs(first, values, beta=beta).exp(), joint.sum(-1))


def test_tilt_ignores_a_constant_and_an_infinite_beta_leaves_the_policy():
    policy, changes = laws(2, 4), torch.randn(2, 4, dtype=DOUBLE)
    torch.testing.assert_close(
        tilted_log_probs(policy, changes + 3.0, beta=0.5), tilted_log_probs(policy, changes, beta=0.5)
    )
    torch.testing.assert_close(tilted_log_probs(policy, changes, beta=math.inf), policy)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_soft_target_kl_is_zero_at_the_target_alone(direction):
    target = laws(3, 4)
    torch.testing.assert_close(soft_target_kl(target, target, direction=direction), torch.zeros(3, dtype=DOUBLE))
    assert (soft_target_kl(laws(3, 4, seed=9), target, direction=direction) > 1e-3).all()


def test_forward_is_the_kl_over_the_whole_vocabulary():
    policy, target = laws(7), laws(3, seed=1)
    inside = policy[:3]
    whole = torch.cat([target, torch.full((4,), -math.inf, dtype=DOUBLE)])
    torch.testing.assert_close(soft_target_kl(inside, target), forward_kl(policy, whole))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_mass_outside_the_alternatives_is_charged_its_log(direction):
    inside, target = laws(3), laws(3, seed=1)
    less = soft_target_kl(inside + math.log(0.5), target, direction=direction)
    torch.testing.assert_close(less, soft_target_kl(inside, target, direction=direction) + math.log(2.0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradient_agrees_with_finite_differences(direction):
    target = laws(2, 3, seed=1)
    logits = torch.randn(2, 5, dtype=DOUBLE, requires_grad=True)

    def divergence(z):
        return soft_target_kl(z.log_softmax(-1)[:, :3], target, direction=direction)

    assert torch.autograd.gradcheck(divergence, (logits,))


def test_impossible_tokens_of_the_target_are_no_nan():
    target = torch.tensor([0.0, -math.inf], requires_grad=False)
    policy = torch.tensor([0.5, 0.5]).log().requires_grad_()
    loss = soft_target_kl(policy, target)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2.0)) and policy.grad is not None and policy.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(beta):
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match="`beta` must be positive"):
        reward_weights(zero, torch.zeros(1, dtype=torch.int64), beta=beta)
    with pytest.raises(ValueError, match="`beta` must be positive"):
        dpo_loss(zero, zero, zero, zero, beta=beta)
    with pytest.raises(ValueError, match="`beta` must be positive"):
        tilted_log_probs(zero, zero, beta=beta)


def test_an_unknown_direction_is_named():
    with pytest.raises(ValueError, match="got 'sideways'"):
        soft_target_kl(laws(2), laws(2), direction="sideways")  # pyright: ignore
