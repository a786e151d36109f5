"""Diagnostics against closed forms: the autoregressive process of order one, independent draws, constants."""

from __future__ import annotations

import math

import pytest
import torch

from nabla_rl.samplers.diagnostics import (
    acceptance_rate,
    autocorrelation,
    effective_sample_size,
    integrated_autocorrelation_time,
    r_hat,
)
from nabla_rl.types import UserError


def autoregressive(memory: float, chains: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Stationary AR(1): correlation memory^t at lag t, so τ = (1 + memory) / (1 - memory)."""
    noise = torch.randn(chains, steps, dtype=torch.float64, generator=generator)
    values = [noise[:, 0]]
    for step in range(1, steps):
        values.append(memory * values[-1] + math.sqrt(1 - memory**2) * noise[:, step])
    return torch.stack(values, 1)


@pytest.mark.parametrize("memory", [-0.5, 0.0, 0.5, 0.9])
def test_autocorrelation_time_of_the_autoregressive_process(memory, generator):
    values = autoregressive(memory, 64, 2000, generator)
    rho = autocorrelation(values)
    expected = torch.tensor([memory**t for t in range(5)], dtype=torch.float64)
    torch.testing.assert_close(rho[:5], expected, atol=0.02, rtol=0)
    time = (1 + memory) / (1 - memory)
    assert integrated_autocorrelation_time(values) == pytest.approx(time, rel=0.08)
    assert effective_sample_size(values) == pytest.approx(64 * 2000 / time, rel=0.08)


def test_autocorrelation_is_the_naive_sum(generator):
    values = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    centred = values - values.mean()
    for lag in range(7):
        naive = (centred[:, : 7 - lag] * centred[:, lag:]).sum(1).mean() / (7 - lag)
        assert float(autocorrelation(values)[lag]) == pytest.approx(float(naive / centred.square().mean()))


def test_r_hat_is_near_one_for_chains_that_agree_and_large_for_those_that_do_not(generator):
    agreeing = torch.randn(8, 1000, generator=generator)
    assert r_hat(agreeing) == pytest.approx(1.0, abs=0.01)
    shift = torch.arange(8.0)[:, None]
    # variance of the means 6 (of 8 equally spaced, sample), within 1: sqrt(1 + 6 · 16/15 ...) by the formula below
    halves = torch.cat([(agreeing + shift)[:, :500], (agreeing + shift)[:, 500:]]).double()
    within, between = halves.var(1).mean(), halves.mean(1).var()
    assert r_hat(agreeing + shift) == pytest.approx(math.sqrt(float(499 / 500 + between / within)))
    assert r_hat(agreeing + shift) > 2
    drifting = agreeing + torch.linspace(0, 4, 1000)
    assert r_hat(drifting) > 1.3  # every chain alike, and none at rest: the halves tell


def test_constants_have_no_effective_samples():
    constant = torch.ones(3, 10)
    assert integrated_autocorrelation_time(constant) == math.inf
    assert effective_sample_size(constant) == 0.0
    assert r_hat(constant) == 1.0
    assert r_hat(torch.tensor([[0.0] * 6, [1.0] * 6])) == math.inf


def test_rates_and_shapes():
    assert acceptance_rate(torch.tensor([[True, False], [True, True]])) == 0.75
    with pytest.raises(UserError, match=r"expected \(chains, steps\)"):
        autocorrelation(torch.zeros(5))
    with pytest.raises(UserError, match="at least 4 steps"):
        r_hat(torch.zeros(2, 3))
