"""Update rules: against the divergences that they promise, and against the equations of natural gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nabla_rl.functional import kl_step_size, reverse_kl, straight_through_vjp, trust_region_


def drawn(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def divergence(new: Tensor, old: Tensor) -> Tensor:
    return reverse_kl(new.double().log_softmax(-1), old.double().log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trust_region", [1e-3, 0.05, 0.5, 1.0])
def test_every_position_changes_by_the_trust_region(dtype: torch.dtype, trust_region: float) -> None:
    """The divergence is met to 1e-4 of a nat, on flat and on peaked positions, whatever the gradient's scale."""
    old = torch.cat([drawn(2, 30, 40, scale=s, seed=i, dtype=dtype) for i, s in enumerate((0.1, 1.0, 4.0))])
    for scale in (1e-6, 1.0, 1e6):
        gradient = drawn(6, 30, 40, scale=scale, seed=9, dtype=dtype)
        # where the best token is less likely than e^-δ
        best = old.double().log_softmax(-1).gather(-1, gradient.argmin(-1, keepdim=True)).squeeze(-1)
        reachable = -0.999 * best > trust_region
        assert reachable.double().mean() > 0.9
        new = old.clone()
        trust_region_(new, gradient, trust_region=trust_region)
        found = divergence(new, old)
        assert (found[reachable] - trust_region).abs().max() < 1e-4
        torch.testing.assert_close(found[~reachable], -0.999 * best[~reachable], rtol=1e-3, atol=1e-4)


def test_the_step_does_not_depend_on_the_gradients_scale_or_offset() -> None:
    """Neither a factor of the gradient nor a constant added to it changes the new distribution."""
    old, gradient = drawn(5, 20), drawn(5, 20, seed=1)
    plain = old - kl_step_size(old, gradient, 0.2)[:, None] * gradient
    for other in (1e-8 * gradient, 1e8 * gradient, gradient + 3.0):
        new = old - kl_step_size(old, other, 0.2)[:, None] * other
        torch.testing.assert_close(new.log_softmax(-1), plain.log_softmax(-1), rtol=0, atol=1e-5)


def test_small_steps_are_those_of_the_fisher_metric() -> None:
    """For a small divergence the step is sqrt(2δ / Var_p[u])."""
    old, gradient = drawn(7, 12), drawn(7, 12, seed=1)
    p = old.softmax(-1)
    variance = (p * gradient.square()).sum(-1) - (p * gradient).sum(-1).square()
    torch.testing.assert_close(kl_step_size(old, gradient, 1e-8), (2e-8 / variance).sqrt(), rtol=1e-3, atol=0)


def test_positions_that_cannot_move_do_not() -> None:
    """A gradient of zeros or constants, a divergence of 0 and a best token that is certain all give a step of 0."""
    old = drawn(3, 10)
    assert torch.equal(kl_step_size(old, torch.zeros_like(old), 0.3), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(kl_step_size(old, torch.full_like(old, 2.0), 0.3), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(kl_step_size(old, drawn(3, 10, seed=1), 0.0), torch.zeros(3, dtype=torch.float64))
    certain = torch.tensor([[1000.0, 0.0]], dtype=torch.float64)
    assert kl_step_size(certain, torch.tensor([[-1.0, 0.0]], dtype=torch.float64), 0.3).tolist() == [0.0]
    # and one that is nearly certain stays finite
    nearly, new = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([[20.0, 0.0, 0.0]])
    trust_region_(new, torch.tensor([[-1.0, 0.0, 1e4]]), trust_region=0.3)
    assert bool(new.isfinite().all()) and divergence(new, nearly) < 1e-8


def test_impossible_tokens_do_not_disturb() -> None:
    """A token of logit -inf, or one with the stand-in gradient of log 0, takes no part."""
    old, gradient = drawn(1, 6), drawn(1, 6, seed=1)
    plain = kl_step_size(old, gradient, 0.2)
    padded = [torch.cat([old, torch.full((1, 1), value, dtype=torch.float64)], -1) for value in (-math.inf, -80.0)]
    stand_in = torch.cat([gradient, torch.full((1, 1), 1e4, dtype=torch.float64)], -1)
    for logits in padded:
        torch.testing.assert_close(kl_step_size(logits, stand_in, 0.2), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_trust_region_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="`trust_region` must be at least 0 and finite"):
        kl_step_size(drawn(1, 3), drawn(1, 3), value)


def test_the_decay_is_part_of_the_direction() -> None:
    """With weight decay w the direction is g + w z, and the divergence is still met."""
    old, gradient = drawn(4, 9), drawn(4, 9, seed=1)
    new = old.clone()
    trust_region_(new, gradient, trust_region=0.1, weight_decay=0.7)
    direction = gradient + 0.7 * old
    moved = old - new
    torch.testing.assert_close(moved / moved[:, :1], direction / direction[:, :1])
    torch.testing.assert_close(divergence(new, old), torch.full((4,), 0.1, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_token_gradient_is_the_natural_gradient_of_the_logits() -> None:
    """The chain rule of the softmax is the Fisher matrix: F g = d, and g minus its mean under p solves it."""
    logits, gradient = drawn(8), drawn(8, seed=1)
    p = logits.softmax(-1)
    fisher = p.diag() - p[:, None] * p
    chained = straight_through_vjp(logits, gradient)
    torch.testing.assert_close(fisher @ gradient, chained)
    solved = torch.linalg.pinv(fisher, hermitian=True) @ chained
    torch.testing.assert_close(solved - solved.mean(), gradient - gradient.mean())
