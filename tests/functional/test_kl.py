"""KL divergences and their estimators, by enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from nabla_rl.functional import forward_kl, kl_estimate, reverse_kl


def laws() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, ref = torch.log_softmax(logits, dim=-1)
    return policy, ref


def test_directions() -> None:
    """forward_kl is KL(ref‖policy) and reverse_kl is KL(policy‖ref), as torch.distributions has them."""
    policy, ref = laws()
    p, q = (torch.distributions.Categorical(logits=x) for x in (policy, ref))
    torch.testing.assert_close(forward_kl(policy, ref), torch.distributions.kl_divergence(q, p))
    torch.testing.assert_close(reverse_kl(policy, ref), torch.distributions.kl_divergence(p, q))
    assert abs(forward_kl(policy, ref) - reverse_kl(policy, ref)) > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    """The expectation of k1 and of k3 under the policy is KL(policy‖ref), by summing over all tokens."""
    policy, ref = laws()
    expectation = (policy.exp() * kl_estimate(policy, ref, estimator)).sum()
    torch.testing.assert_close(expectation, reverse_kl(policy, ref), rtol=0, atol=1e-14)


def test_k2_is_biased_but_right_to_second_order() -> None:
    """k2 misses the divergence of distant laws, and its relative bias vanishes as the laws meet."""
    policy, ref = laws()

    def relative_bias(mix: float) -> float:
        near = torch.log_softmax((1 - mix) * policy + mix * ref, dim=-1)
        exact = reverse_kl(policy, near)
        return abs(((policy.exp() * kl_estimate(policy, near, "k2")).sum() - exact) / exact).item()

    assert relative_bias(1.0) > 0.03  # 4.2%
    assert relative_bias(0.01) < 0.01 and relative_bias(0.001) < relative_bias(0.01) / 5  # first order in the distance


def test_k3_is_never_negative_and_k1_is_sometimes() -> None:
    """Every single k3 is at least 0; k1 has negative values on the same samples."""
    policy, ref = laws()
    assert bool((kl_estimate(policy, ref, "k3") >= 0).all()) and bool((kl_estimate(policy, ref, "k1") < 0).any())


def test_excluded_tokens() -> None:
    """A token of probability 0 adds 0 with gradient 0; a token that only the other law excludes makes KL infinite."""
    some, all_ = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    assert reverse_kl(some, some) == 0
    torch.testing.assert_close(reverse_kl(some, all_), torch.tensor(math.log(2)))
    torch.testing.assert_close(forward_kl(all_, some), torch.tensor(math.log(2)))
    assert forward_kl(some, all_) == math.inf and reverse_kl(all_, some) == math.inf
    leaf = some.clone().requires_grad_()
    reverse_kl(leaf, some).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


def test_gradients() -> None:
    """Both divergences pass gradcheck through a log-softmax, in both arguments."""
    inputs = tuple(x.clone().requires_grad_() for x in laws())
    for kl in (forward_kl, reverse_kl):
        assert torch.autograd.gradcheck(lambda a, b, kl=kl: kl(a.log_softmax(-1), b.log_softmax(-1)), inputs)


def test_unknown_estimator() -> None:
    """An unknown estimator is refused by name."""
    with pytest.raises(ValueError, match="`estimator` must be 'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
