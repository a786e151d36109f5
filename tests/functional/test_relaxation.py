"""Relaxations: exact forward values, exact gradients, the Gumbel law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_rl.functional import (
    gumbel_softmax,
    one_hot_argmax,
    sample_gumbel,
    soft,
    straight_through,
    straight_through_vjp,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.3, 1.0, 7.0]), st.sampled_from([1.0, 50.0]))
def test_straight_through_forward_is_exactly_one_hot(seed: int, tau: float, scale: float) -> None:
    """The forward value of straight-through is the one-hot argmax to the bit, in float32 and at any temperature."""
    logits = (scale * draw(3, 4, 7, seed=seed, dtype=torch.float32)).requires_grad_()
    y = straight_through(logits, tau)
    assert torch.equal(y, torch.nn.functional.one_hot(logits.argmax(-1), 7).float())


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_straight_through_gradient_is_the_soft_one(tau: float) -> None:
    """The gradient of straight-through is that of the softmax, and both are the closed form p (g - p.g) / tau."""
    logits, grad = draw(2, 3, 5), draw(2, 3, 5, seed=1)

    def gradient(relaxation) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad((relaxation(leaf, tau) * grad).sum(), leaf)[0]

    p = torch.softmax(logits / tau, dim=-1)
    closed_form = p * (grad - (p * grad).sum(-1, keepdim=True)) / tau
    assert torch.equal(gradient(straight_through), gradient(soft))
    torch.testing.assert_close(gradient(soft), closed_form, rtol=0, atol=1e-14)
    torch.testing.assert_close(straight_through_vjp(logits, grad, tau), closed_form, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # from inside torch.func.jacfwd
def test_soft_jacobian_four_ways() -> None:
    """The softmax Jacobian (diag(p) - p pᵀ) / tau agrees with reverse mode, forward mode and central differences."""
    logits, tau, h = draw(4), 0.7, 1e-6
    p = torch.softmax(logits / tau, dim=-1)
    closed_form = (torch.diag(p) - torch.outer(p, p)) / tau
    by_vjp = torch.stack([straight_through_vjp(logits, row, tau) for row in torch.eye(4, dtype=torch.float64)])
    steps = h * torch.eye(4, dtype=torch.float64)
    differences = torch.stack([(soft(logits + s, tau) - soft(logits - s, tau)) / (2 * h) for s in steps], dim=-1)
    torch.testing.assert_close(by_vjp, closed_form, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.func.jacfwd(lambda z: soft(z, tau))(logits), closed_form, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.func.jacrev(lambda z: soft(z, tau))(logits), closed_form, rtol=0, atol=1e-14)
    torch.testing.assert_close(differences, closed_form, rtol=0, atol=1e-8)


def test_vjp_is_differentiable() -> None:
    """The closed-form gradient can itself be differentiated, in the logits and in the incoming gradient."""
    inputs = (draw(2, 4).requires_grad_(), draw(2, 4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda z, g: straight_through_vjp(z, g, 0.5), inputs)


def test_vjp_leaves_its_arguments_alone() -> None:
    """The closed form writes into its own temporaries only."""
    logits, grad = draw(2, 4), draw(2, 4, seed=1)
    before = logits.clone(), grad.clone()
    straight_through_vjp(logits, grad, 1.0)
    assert torch.equal(logits, before[0]) and torch.equal(grad, before[1])


def test_vjp_of_an_impossible_token_is_zero() -> None:
    """A token with logit -inf gets gradient 0, however large the gradient at it, and disturbs no other token."""
    logits, grad = torch.tensor([1.0, 2.0, float("-inf")]), torch.tensor([0.3, -0.2, 1e4])
    moved = straight_through_vjp(logits, grad)
    assert moved[2] == 0
    torch.testing.assert_close(moved[:2], straight_through_vjp(logits[:2], grad[:2]))


def test_gumbel_argmax_law() -> None:
    """E[one-hot argmax(z + Gumbel)] = softmax(z): observed frequencies are within four standard errors."""
    n, logits = 40_000, torch.tensor([1.0, 0.0, -1.0, 0.5])
    noise = sample_gumbel((n, 4), torch.Generator().manual_seed(3))
    frequencies = gumbel_softmax(logits.expand(n, 4), 0.5, noise).mean(dim=0)
    p = torch.softmax(logits, dim=-1)
    assert bool(((frequencies - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all())
    # A law with twice the temperature is clearly excluded by the same test.
    wrong = torch.softmax(logits / 2, dim=-1)
    assert not bool(((frequencies - wrong).abs() < 4 * (p * (1 - p) / n).sqrt()).all())


def test_gumbel_softmax_is_straight_through_at_the_noisy_logits() -> None:
    """Gumbel-softmax is hard at argmax(z + noise) forward, and its gradient is the closed form there."""
    logits, noise, grad = (
        draw(3, 5),
        sample_gumbel((3, 5), torch.Generator().manual_seed(0)).double(),
        draw(3, 5, seed=2),
    )
    leaf = logits.clone().requires_grad_()
    y = gumbel_softmax(leaf, 0.7, noise)
    assert torch.equal(y, one_hot_argmax(logits + noise))
    (gradient,) = torch.autograd.grad((y * grad).sum(), leaf)
    torch.testing.assert_close(gradient, straight_through_vjp(logits + noise, grad, 0.7), rtol=0, atol=1e-14)


def test_gumbel_noise_is_reproducible_and_finite() -> None:
    """The same generator seed gives the same noise, and a million draws are all finite."""
    a, b = (sample_gumbel((1000, 1000), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and bool(a.isfinite().all())


def test_ties_give_one_token() -> None:
    """Equal logits still give exactly one token per position."""
    assert torch.equal(one_hot_argmax(torch.zeros(2, 3, 4)).sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_tau_is_named(tau: float) -> None:
    """A temperature that is not positive and finite is refused by name."""
    with pytest.raises(ValueError, match="`tau` must be positive and finite"):
        straight_through(torch.zeros(3), tau)
