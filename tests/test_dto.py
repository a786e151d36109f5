"""The optimiser on toys: equalities, limits, outcomes, and the contract of state and info."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nabla_rl import dto
from nabla_rl.dto import DTOConfig
from nabla_rl.functional import expected_logps, gumbel_softmax, one_hot_argmax, reverse_kl, soft, straight_through
from nabla_rl.types import Outcome
from tests.toys import EnumerablePolicy, EnumerableReward, ToyPolicy, ToyReward

ROOT = Path(__file__).parents[1]
VOCAB = 5
FAST = DTOConfig(num_steps=30, step_size=0.3, final_step_size=0.1, beta=0.3)
"""Steps large enough for argmaxes to flip."""


def problem(lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, ToyPolicy, ToyReward]:
    """Logits, right-padded mask, policy and reward of a batch with these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*mask.shape, VOCAB, generator=generator, dtype=torch.float64)
    return logits, mask, ToyPolicy(VOCAB, rows=len(lengths), seed=seed), ToyReward(mask, VOCAB, seed=seed + 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_alone(row: int, length: int, logits: Tensor, policy: ToyPolicy, reward: ToyReward, config: DTOConfig) -> Any:
    """The same problem for one row without its padding; the models still know it as that row."""
    mask = torch.ones(1, length, dtype=torch.bool)
    single = ToyReward(mask.expand(len(reward.mask), -1), VOCAB)
    single.weight, single.pairs = reward.weight, reward.pairs
    return dto.run(
        logits[row : row + 1, :length],
        mask,
        lambda y, rows: policy(y, rows + row),
        lambda y, rows: single(y, rows + row),
        config,
    )


# The update


@pytest.mark.parametrize("relaxation", ["straight_through", "gumbel_softmax", "softmax"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_equals_torch_optim_through_autograd(relaxation: str, optimizer: str) -> None:
    """Twenty steps equal torch's optimiser and cosine schedule on the energy differentiated through the relaxation."""
    logits, mask, policy, reward = problem((4, 4))
    config = replace(FAST, num_steps=20, relaxation=relaxation, optimizer=optimizer, weight_decay=0.1, tau=0.7)
    state = dto.init(logits, mask, config, torch.Generator().manual_seed(0))
    noise, rows = state.noise, torch.arange(2)
    relax = {
        "straight_through": straight_through,
        "softmax": soft,
        "gumbel_softmax": lambda z, tau: gumbel_softmax(z, tau, noise),
    }[relaxation]
    z = logits.clone().requires_grad_()
    torch_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    reference = torch_class([z], lr=config.step_size, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, config.num_steps, eta_min=config.final_step_size)
    for _ in range(config.num_steps):
        y = relax(z, config.tau)
        energy = -expected_logps(y, policy(y, rows), mask) - reward(y, rows) / config.beta
        reference.zero_grad()
        energy.sum().backward()
        reference.step()
        schedule.step()
        state, info = dto.step(state, policy, reward, config)
        torch.testing.assert_close(info.energy, energy.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(state.logits, z.detach(), rtol=0, atol=1e-10)
    assert (z - logits).abs().max() > 0.5


def test_exponentiated_gradient_multiplies_the_probabilities() -> None:
    """A step is p ← p^(1 - ηw) exp(-η ∂L/∂y) / Z, whatever τ."""
    logits, mask, policy, reward = problem((4, 3))
    config = replace(FAST, optimizer="exponentiated", step_size=0.4, weight_decay=0.5, tau=0.3)
    state, _ = dto.step(dto.init(logits, mask, config), policy, reward, config)
    p = logits.softmax(-1).pow(1 - 0.4 * 0.5) * (-0.4 * state.gradient).exp()
    torch.testing.assert_close(state.logits.softmax(-1)[mask], (p / p.sum(-1, keepdim=True))[mask])


def test_one_exponentiated_step_is_the_first_order_gibbs_conditional() -> None:
    """A step of 1 with decay 1 gives softmax(-g) from any logits, as does one of 1 without decay and without the
    prefix piece from the policy's own; a step of 1 of plain gradient descent does not."""
    logits, mask, policy, reward = problem((4, 3))
    rule = {"optimizer": "exponentiated", "step_size": 1.0, "schedule": "constant", "beta": 0.7}
    whole = DTOConfig(**rule, weight_decay=1.0)
    state, _ = dto.step(dto.init(logits, mask, whole), policy, reward, whole)
    gibbs = (-state.gradient).softmax(-1)[mask]
    torch.testing.assert_close(state.logits.softmax(-1)[mask], gibbs)
    # the same completion, now from the policy's log-probabilities along it, offset so that it is the argmax
    y = one_hot_argmax(logits)
    own = policy(y, torch.arange(2))
    for config, same in (
        (DTOConfig(**rule, weight_decay=0.0, prefix=False), True),
        (DTOConfig(**rule, weight_decay=0.0), False),
        (DTOConfig(**{**rule, "optimizer": "sgd"}, weight_decay=0.0), False),
    ):
        start = dto.init(own, mask, config)._replace(noise=100 * y, tokens=y.argmax(-1))
        moved, _ = dto.step(start, policy, reward, config)
        found = moved.logits.softmax(-1)[mask]
        assert ((found - gibbs).abs().max() < 1e-9) == same


def test_the_prefix_piece_alone_sharpens_the_policy() -> None:
    """From the policy's logits, exponentiated gradient of the prefix piece gives π^(1 + η) / Z at each position."""
    _, mask, policy, reward = problem((4, 3))
    y = one_hot_argmax(problem((4, 3), seed=5)[0])
    own = policy(y, torch.arange(2))
    pieces = {"postfix": False, "reward": False, "optimizer": "exponentiated", "weight_decay": 0.0}
    for size in ({"step_size": 0.6}, {"trust_region": 0.05}):
        config = DTOConfig(**pieces, **size)  # type: ignore[arg-type]
        start = dto.init(own, mask, config)._replace(noise=100 * y, tokens=y.argmax(-1))
        moved, _ = dto.step(start, policy, reward, config)
        power = (moved.logits / own)[mask]
        torch.testing.assert_close(power, power[:, :1].expand_as(power))
        assert bool((power > 1).all()) and ("trust_region" in size or power.allclose(torch.full_like(power, 1.6)))


def test_the_gibbs_conditional_is_exact_where_the_energy_is_linear() -> None:
    """At the last token, with a reward linear in it, softmax(-g) is the tilted policy's own conditional."""
    policy, reward, beta = EnumerablePolicy(), EnumerableReward(), 0.5
    config = DTOConfig(optimizer="exponentiated", step_size=1.0, schedule="constant", weight_decay=1.0, beta=beta)
    tilted = (policy.logps() + reward.rewards() / beta).view(3, 3).log_softmax(-1)
    for first in range(3):
        logits = torch.zeros(1, 2, 3, dtype=torch.float64)
        logits[0, 0, first] = 1.0
        state, _ = dto.step(dto.init(logits, torch.ones(1, 2, dtype=torch.bool), config), policy, reward, config)
        torch.testing.assert_close(state.logits[0, 1].log_softmax(-1), tilted[first])


@pytest.mark.parametrize("optimizer", ["sgd", "exponentiated"])
@pytest.mark.parametrize("relaxation", ["straight_through", "gumbel_softmax", "softmax"])
def test_every_step_changes_every_position_by_the_trust_region(optimizer: str, relaxation: str) -> None:
    """Each update moves each position's law by the divergence asked for; padding stays; step sizes do not matter."""
    logits, mask, policy, reward = problem((5, 3))
    config = DTOConfig(5, optimizer=optimizer, relaxation=relaxation, weight_decay=0.0, trust_region=0.03, beta=0.3)
    state = dto.init(logits, mask, config, torch.Generator().manual_seed(0))
    for _ in range(config.num_steps):
        new, _ = dto.step(state, policy, reward, config)
        old = state.logits.log_softmax(-1)
        kl, best = reverse_kl(new.logits.log_softmax(-1), old), (new.logits - state.logits).argmax(-1)
        # less only where all that the direction can do is done: all of the probability is on its best token
        most = -0.999 * old.gather(-1, best[..., None]).squeeze(-1)
        torch.testing.assert_close(kl[mask], most.clamp(max=0.03)[mask], rtol=0, atol=1e-6)
        assert (most[mask] > 0.03).sum() >= 5 and bool((kl[~mask] == 0).all())
        state = new
    other = dto.run(logits, mask, policy, reward, replace(config, step_size=7.0, relaxation="straight_through"))
    if relaxation == "straight_through":
        assert torch.equal(other.logits, state.logits)
    still = dto.run(logits, mask, lambda y, rows: torch.zeros_like(y.probs), None, config)
    assert torch.equal(still.logits, logits)


def test_step_sizes() -> None:
    """The cosine goes from step_size to final_step_size and stays there; it never rises; the constant is constant."""
    config = DTOConfig()
    assert config.step_size_at(0) == pytest.approx(0.01)
    assert config.step_size_at(10) == pytest.approx(0.0055)
    assert config.step_size_at(20) == config.step_size_at(99) == pytest.approx(0.001)
    assert DTOConfig(schedule="constant").step_size_at(15) == 0.01
    assert {DTOConfig(step_size=1e-4).step_size_at(i) for i in range(20)} == {1e-4}


def test_state_is_float32_whatever_the_logits() -> None:
    """From bfloat16 logits at 17, where 0.01 rounds away, the float32 state moves by the sum of the steps."""
    config = DTOConfig(weight_decay=0.0, beta=math.inf)
    logits = torch.full((1, 1, 2), 17.0, dtype=torch.bfloat16)
    assert torch.equal(logits - 0.01, logits)

    def log_probs_fn(token_probs: Tensor, rows: Tensor) -> Tensor:
        return torch.tensor([[[0.2, 0.8]]]).log()

    output = dto.run(logits, torch.ones(1, 1, dtype=torch.bool), log_probs_fn, None, config)
    assert output.logits.dtype == torch.float32
    distance = sum(config.step_size_at(i) for i in range(20))
    moved = (output.logits - 17.0)[0, 0]
    torch.testing.assert_close(moved, torch.tensor([-distance, distance]), rtol=0.05, atol=0)
    assert dto.init(logits.double(), torch.ones(1, 1, dtype=torch.bool), config).logits.dtype == torch.float64


def test_step_leaves_the_old_state_alone() -> None:
    """Without donation a step changes no tensor of the state it is given, and gives what a donating step gives."""
    logits, mask, policy, reward = problem((4, 3))
    state = dto.init(logits, mask, FAST)
    for _ in range(3):
        before = [None if t is None or isinstance(t, int) else t.clone() for t in state]
        new, _ = dto.step(state, policy, reward, FAST)
        for old, now in zip(before, state, strict=True):
            assert old is None or torch.equal(old.nan_to_num(7.0), now.nan_to_num(7.0))  # type: ignore[union-attr]
        state = new
    output = dto.run(logits, mask, policy, reward, replace(FAST, schedule="constant", num_steps=3))
    by_hand = dto.init(logits, mask, FAST)
    for _ in range(3):
        by_hand, _ = dto.step(by_hand, policy, reward, replace(FAST, schedule="constant", num_steps=3))
    assert torch.equal(output.logits, by_hand.logits)


def test_run_leaves_its_arguments_alone() -> None:
    """A run changes neither the logits nor the mask it was given."""
    logits, mask, policy, reward = problem((4, 3))
    before = logits.clone(), mask.clone()
    dto.run(logits, mask, policy, reward, FAST)
    assert torch.equal(before[0], logits) and torch.equal(before[1], mask)


# Caching


@pytest.mark.parametrize("relaxation", ["straight_through", "gumbel_softmax"])
def test_caching_is_exact_to_the_bit(relaxation: str) -> None:
    """One sequence at a time, cached and uncached runs are equal in every bit; the cache saves most evaluations."""
    flips = evaluations = steps = 0
    for seed in range(6):
        logits, mask, policy, reward = problem((5,), seed)
        config = replace(FAST, relaxation=relaxation, step_size=0.1, final_step_size=0.05)
        on, off = (
            dto.run(logits, mask, policy, reward, replace(config, caching=c), torch.Generator().manual_seed(seed))
            for c in (True, False)
        )
        assert on.infos is not None and off.infos is not None
        assert torch.equal(on.logits, off.logits) and torch.equal(on.best_tokens, off.best_tokens)
        for name in ("energy", "reward", "logps", "gradient_norm", "flips", "finite"):
            assert torch.equal(getattr(on.infos, name), getattr(off.infos, name)), name
        assert torch.equal(off.evaluations, torch.tensor([off.steps]))
        # Once at the start, and once after every step that flipped something, except the last.
        assert on.evaluations.item() == 1 + (on.infos.flips[:-1] > 0).sum().item()
        flips, evaluations = flips + on.infos.flips.sum().item(), evaluations + on.evaluations.item()
        steps += on.steps
    assert flips >= 10 and evaluations < 0.6 * steps


def test_caching_asks_only_for_rows_that_flipped() -> None:
    """In a batch the models see just the rows with a flip, and the result is that of evaluating all."""
    logits, mask, policy, reward = problem((5, 2, 4, 3))
    cached = dto.run(logits, mask, policy, reward, replace(FAST, caching=True))
    assert cached.infos is not None
    gradient_calls = [row for call in policy.calls[: cached.steps] for row in call]
    asked = [torch.nonzero(evaluated).squeeze(1).tolist() for evaluated in cached.infos.evaluated]
    wanted = [rows for rows in asked if rows] + (
        [cached.scored.nonzero().squeeze(1).tolist()] if cached.scored.any() else []
    )
    assert policy.calls == wanted == reward.calls
    assert any(0 < len(rows) < 4 for rows in wanted) and gradient_calls
    for before, after in zip(cached.infos.flips[:-1], cached.infos.evaluated[1:], strict=True):
        assert torch.equal(before > 0, after)
    uncached = dto.run(logits, mask, policy, reward, replace(FAST, caching=False))
    torch.testing.assert_close(cached.logits, uncached.logits, rtol=0, atol=1e-9)
    assert bool((uncached.evaluations == uncached.steps).all()) and bool((cached.evaluations < uncached.steps).any())


def test_caching_where_it_is_not_exact_is_refused() -> None:
    """Asked for with tokens that change at every step, caching raises; left open, every step evaluates every row."""
    for inexact in ({"relaxation": "softmax"},):
        with pytest.raises(ValueError, match="caching: expected None or False with relaxation='softmax'"):
            DTOConfig(caching=True, **inexact)
        logits, mask, policy, reward = problem((4, 2))
        output = dto.run(logits, mask, policy, reward, replace(FAST, **inexact), torch.Generator().manual_seed(0))
        assert output.evaluations.tolist() == [30, 30] and output.scored.tolist() == [True, True]


# Batches and padding


@pytest.mark.parametrize("relaxation", ["straight_through", "softmax"])
def test_batch_equals_alone(relaxation: str) -> None:
    """Each row of a batch of different lengths ends where it ends alone, garbage in its padding or not."""
    lengths, config = (5, 1, 3, 4), replace(FAST, relaxation=relaxation)
    logits, mask, policy, reward = problem(lengths)
    garbage = torch.where(mask[..., None], logits, 1e3 * torch.randn(logits.shape, dtype=torch.float64))
    together = dto.run(garbage, mask, policy, reward, config)
    for row, length in enumerate(lengths):
        alone = run_alone(row, length, logits, policy, reward, config)
        torch.testing.assert_close(together.logits[row, :length], alone.logits[0], rtol=0, atol=1e-8)
        torch.testing.assert_close(together.energy[row], alone.energy[0], rtol=0, atol=1e-8)
        assert torch.equal(together.best_tokens[row, :length], alone.best_tokens[0])
        assert together.outcomes[row] == alone.outcomes[0]
        assert together.evaluations[row] == alone.evaluations[0]


def test_padding_never_moves() -> None:
    """Padded positions keep their logits to the bit under weight decay, even NaN, and show no gradient."""
    logits, mask, policy, reward = problem((4, 2, 3))
    logits[1, 2:] = 50.0
    logits[2, 3] = math.nan
    output = dto.run(logits, mask, policy, reward, replace(FAST, weight_decay=0.5))
    assert output.infos is not None
    assert torch.equal(output.logits[~mask].nan_to_num(7.0), logits[~mask].nan_to_num(7.0))
    assert output.infos.gradient_norm[:, ~mask].abs().max() == 0
    assert bool(output.infos.finite.all()) and not bool((output.logits[mask] == logits[mask]).any())


def test_a_row_without_positions_is_left_out() -> None:
    """An empty row is never evaluated, never moves, counts as converged, and changes nothing for the others."""
    logits, mask, policy, reward = problem((4, 3))
    with_empty = mask.clone()
    with_empty[1] = False
    output = dto.run(logits, with_empty, policy, reward, FAST)
    alone = run_alone(0, 4, logits, policy, reward, FAST)
    torch.testing.assert_close(output.logits[0], alone.logits[0], rtol=0, atol=1e-9)
    assert torch.equal(output.logits[1], logits[1]) and output.evaluations[1] == 0
    assert output.outcomes[1] is Outcome.CONVERGED and math.isnan(output.energy[1].item())
    empty = dto.run(logits[:, :0], mask[:, :0], policy, reward, FAST)
    assert empty.steps == 0 and empty.outcomes == (Outcome.CONVERGED, Outcome.CONVERGED)


# Limits


def test_no_steps_return_the_logits() -> None:
    """With num_steps=0 the logits come back unchanged and no model is called."""
    logits, mask, policy, reward = problem((4, 2))
    output = dto.run(logits, mask, policy, reward, replace(FAST, num_steps=0))
    assert torch.equal(output.logits, logits) and output.steps == 0 and output.infos is None
    assert torch.equal(output.tokens, logits.argmax(-1)) and torch.equal(output.best_tokens, output.tokens)
    assert policy.calls == [] and output.outcomes == (Outcome.NO_IMPROVEMENT,) * 2
    assert bool(output.best_energy.isnan().all()) and output.evaluations.tolist() == [0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "exponentiated"])
def test_zero_step_size_is_a_fixed_point(optimizer: str) -> None:
    """At step size 0 nothing moves, weight decay included, and one evaluation serves all steps."""
    logits, mask, policy, reward = problem((4, 2))
    config = DTOConfig(step_size=0.0, optimizer=optimizer, weight_decay=0.5)  # type: ignore[arg-type]
    output = dto.run(logits, mask, policy, reward, config)
    assert torch.equal(output.logits, logits) and output.evaluations.tolist() == [1, 1]
    assert output.outcomes == (Outcome.NO_IMPROVEMENT,) * 2 and output.scored.tolist() == [False, False]


def test_zero_gradient_moves_nothing_but_the_decay() -> None:
    """Where the energy is flat the logits stay to the bit; weight decay shrinks them by the product of its factors."""
    logits, mask, _, _ = problem((4, 2))
    config = replace(FAST, weight_decay=0.0)
    flat = dto.run(logits, mask, lambda y, rows: torch.zeros_like(y.probs), None, config)
    assert torch.equal(flat.logits, logits)
    config = replace(config, weight_decay=0.1)
    shrunk = dto.run(logits, mask, lambda y, rows: torch.zeros_like(y.probs), None, config)
    factor = math.prod(1 - 0.1 * config.step_size_at(i) for i in range(config.num_steps))
    torch.testing.assert_close(shrunk.logits[mask], factor * logits[mask], rtol=1e-12, atol=0)


def test_infinite_beta_is_pure_likelihood() -> None:
    """At beta = inf the run is that without a reward to the bit, the energy is -log pi, and the reward is told."""
    logits, mask, policy, reward = problem((4, 3))
    with_reward = dto.run(logits, mask, policy, reward, replace(FAST, beta=math.inf))
    without = dto.run(logits, mask, policy, None, FAST)
    assert with_reward.infos is not None and without.infos is not None
    assert torch.equal(with_reward.logits, without.logits)
    assert torch.equal(with_reward.infos.energy, -with_reward.infos.logps)
    assert bool((without.infos.reward == 0).all()) and bool((with_reward.infos.reward != 0).all())


def test_long_runs_climb_to_the_modes() -> None:
    """On nine completions no start ends worse; most find the likeliest (beta = inf), many the best rewarded one.

    Over four policies and nine starts chance would hit the mode 4 times of 36; local minima hold the rest.
    """
    starts = 3.0 * torch.nn.functional.one_hot(EnumerablePolicy().sequences, 3).double()
    mask = torch.ones(9, 2, dtype=torch.bool)
    hits = {math.inf: 0, 1e-3: 0}
    for seed in range(4):
        policy, reward = EnumerablePolicy(seed=seed), EnumerableReward(seed=seed + 1)
        for beta, values in ((math.inf, policy.logps()), (1e-3, reward.rewards())):
            config = DTOConfig(num_steps=200, step_size=0.1, final_step_size=0.05, beta=beta)
            output = dto.run(starts, mask, policy, reward, config)
            index = 3 * output.best_tokens[:, 0] + output.best_tokens[:, 1]
            # At the small beta, beta * log pi is still worth a little.
            assert bool((values[index] >= values - (1e-12 if beta == math.inf else 0.02)).all())
            hits[beta] += int((index == values.argmax()).sum())
    assert hits[math.inf] >= 24 and hits[1e-3] >= 12


# Outcomes


def test_a_non_finite_row_freezes_alone() -> None:
    """A row whose reward turns NaN keeps its last good logits and is not evaluated again; the others do not notice."""
    logits, mask, policy, reward = problem((4, 4, 3))
    config = replace(FAST, caching=False, num_steps=8)

    def failing(token_probs: Tensor, rows: Tensor) -> Tensor:
        failing.calls += 1  # type: ignore[attr-defined]
        broken = (rows == 1) & (failing.calls > 3)  # type: ignore[attr-defined]
        return reward(token_probs, rows) * torch.where(broken, math.nan, 1.0)

    failing.calls = 0  # type: ignore[attr-defined]
    output = dto.run(logits, mask, policy, failing, config)
    healthy = dto.run(logits, mask, policy, reward, config)
    assert output.infos is not None and healthy.infos is not None
    torch.testing.assert_close(output.logits[[0, 2]], healthy.logits[[0, 2]], rtol=0, atol=1e-9)
    state = dto.init(logits, mask, config)
    for _ in range(3):
        state, _ = dto.step(state, policy, reward, config)
    torch.testing.assert_close(output.logits[1], state.logits[1], rtol=0, atol=1e-12)
    assert output.outcomes[1] is Outcome.NON_FINITE_GRADIENT and Outcome.NON_FINITE_GRADIENT not in healthy.outcomes
    assert output.infos.finite[:, 1].tolist() == [True] * 3 + [False] * 5
    assert output.evaluations.tolist() == [8, 4, 8]
    torch.testing.assert_close(output.best_energy[1], healthy.infos.energy[:3, 1].min())


def test_an_impossible_start_is_frozen() -> None:
    """A completion with a token that the policy excludes has energy inf and is frozen; its peer is not."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    logits = torch.tensor([[[0.0, 1.0, -math.inf]], [[1.0, 0.0, -math.inf]]])

    def log_probs_fn(token_probs: Tensor, rows: Tensor) -> Tensor:
        return torch.tensor([0.0, -math.inf, -math.inf]).expand(len(rows), 1, 3)

    output = dto.run(logits, mask, log_probs_fn, None, replace(FAST, weight_decay=0.0))
    assert output.outcomes[0] is Outcome.NON_FINITE_GRADIENT and torch.equal(output.logits[0], logits[0])
    assert output.outcomes[1] is not Outcome.NON_FINITE_GRADIENT
    assert output.logits[1, 0, 0] > 1.0 and output.logits[1, 0, 1] < 0.0 and output.logits[1, 0, 2] == -math.inf


def test_convergence_stops_a_row_and_its_costs() -> None:
    """A row whose logits moved less than the tolerance stops: no more evaluations, and the run ends when all have."""
    logits, mask, policy, reward = problem((4, 2))
    config = replace(FAST, optimizer="sgd", num_steps=100, step_size=0.5, weight_decay=0.0, relaxation="softmax")
    config = replace(config, schedule="constant")
    far = dto.run(logits, mask, policy, reward, config)
    assert far.infos is not None and Outcome.CONVERGED not in far.outcomes
    output = dto.run(logits, mask, policy, reward, replace(config, tolerance=0.02))
    assert output.infos is not None
    assert output.outcomes == (Outcome.CONVERGED, Outcome.CONVERGED)
    assert output.steps == output.evaluations.max() < 100 and output.evaluations[0] != output.evaluations[1]
    first = int(output.evaluations.min())
    assert torch.equal(output.infos.evaluated.sum(0), output.evaluations)
    assert output.infos.evaluated[:first].all() and not output.infos.evaluated[first:].all(dim=1).any()
    y, rows = soft(output.logits), torch.arange(2)
    energy = -expected_logps(y, policy(y, rows), mask) - reward(y, rows) / config.beta
    torch.testing.assert_close(output.energy, energy, rtol=0, atol=1e-9)  # of the last logits, for both rows
    everything = dto.run(logits, mask, policy, reward, replace(config, tolerance=1e9))
    assert everything.steps == 1


def test_best_and_last_tokens() -> None:
    """The energies are those of the tokens returned, recomputed from scratch; the best is the lowest of all seen."""
    outcomes = set()
    for seed in range(8):
        logits, mask, policy, reward = problem((5, 3), seed)
        output = dto.run(logits, mask, policy, reward, replace(FAST, num_steps=12))
        assert output.infos is not None
        rows = torch.arange(2)

        def energy(tokens: Tensor, policy=policy, reward=reward, mask=mask, rows=rows) -> Tensor:
            y = torch.nn.functional.one_hot(tokens, VOCAB).double()
            return -expected_logps(y, policy(y, rows), mask) - reward(y, rows) / FAST.beta

        torch.testing.assert_close(energy(output.tokens), output.energy, rtol=0, atol=1e-9)
        torch.testing.assert_close(energy(output.best_tokens), output.best_energy, rtol=0, atol=1e-9)
        torch.testing.assert_close(energy(logits.argmax(-1)), output.infos.energy[0], rtol=0, atol=1e-9)
        seen = torch.cat([output.infos.energy, output.energy[None]]).amin(dim=0)
        assert torch.equal(output.best_energy, seen)
        assert torch.equal(output.tokens, output.logits.argmax(-1))
        for best, start, outcome in zip(output.best_energy, output.infos.energy[0], output.outcomes, strict=True):
            assert outcome is (Outcome.MAX_STEPS if best < start else Outcome.NO_IMPROVEMENT)
        outcomes |= set(output.outcomes)
    assert Outcome.MAX_STEPS in outcomes


def test_equal_energies_keep_the_start() -> None:
    """Where all tokens are equally good, the best tokens are those of the start, however often they change."""
    logits, mask, _, _ = problem((4, 3))
    config = replace(FAST, relaxation="gumbel_softmax", weight_decay=5.0)  # logits fade, the noise stays
    output = dto.run(
        logits, mask, lambda y, rows: torch.zeros_like(y.probs), None, config, torch.Generator().manual_seed(1)
    )
    start = dto.init(logits, mask, config, torch.Generator().manual_seed(1))
    assert torch.equal(output.best_tokens, start.tokens) and not torch.equal(output.tokens, start.tokens)
    assert output.infos is not None and bool((output.infos.flips.sum(0) > 0).all())
    assert output.outcomes == (Outcome.NO_IMPROVEMENT,) * 2


def test_info_tells_what_happened() -> None:
    """Norms are of the gradient in the state, flips are the tokens that changed, values are before the update."""
    logits, mask, policy, reward = problem((4, 3))
    state = dto.init(logits, mask, FAST)
    flips = 0
    for _ in range(15):
        new, info = dto.step(state, policy, reward, FAST)
        torch.testing.assert_close(info.gradient_norm, new.gradient.square().sum(-1).sqrt())
        assert torch.equal(info.flips, ((new.tokens != state.tokens) & mask).sum(1))
        assert torch.equal(info.energy, -info.logps - info.reward / FAST.beta)
        y = one_hot_argmax(state.logits)
        torch.testing.assert_close(info.reward, reward(y, torch.arange(2)), rtol=0, atol=1e-12)
        assert new.step == state.step + 1
        flips, state = flips + int(info.flips.sum()), new
    assert flips > 0


def test_pieces_are_switched_by_the_config() -> None:
    """Each piece left out changes the gradient of the first step; without the reward piece the energy still has it."""
    logits, mask, policy, reward = problem((4, 3))
    gradients, energies = [], []
    for flags in ({}, {"prefix": False}, {"postfix": False}, {"reward": False}):
        config = replace(FAST, **flags)
        state, info = dto.step(dto.init(logits, mask, config), policy, reward, config)
        gradients.append(state.gradient)
        energies.append(info.energy)
    whole, *others = gradients
    assert all((whole - other).abs().max() > 1e-3 for other in others)
    torch.testing.assert_close(sum(whole - other for other in others), whole, rtol=0, atol=1e-12)
    assert all(torch.equal(energy, energies[0]) for energy in energies)


def test_inference_mode_and_no_grad_do_not_matter() -> None:
    """A run inside torch.inference_mode or no_grad, with logits made there, equals one outside."""
    logits, mask, policy, reward = problem((4, 3))
    outside = dto.run(logits, mask, policy, reward, FAST)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            inside = dto.run(logits.clone(), mask.clone(), policy, reward, FAST)
        assert torch.equal(inside.logits, outside.logits)
    assert not outside.logits.requires_grad
    with torch.inference_mode():
        state = dto.init(logits.clone(), mask.clone(), FAST)
        state, _ = dto.step(state, policy, reward, FAST)
    state, _ = dto.step(state, policy, reward, FAST)
    assert state.step == 2 and not state.logits.is_inference()


# The configuration


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", -1),
        ("step_size", -0.1),
        ("step_size", math.nan),
        ("final_step_size", math.inf),
        ("weight_decay", -1.0),
        ("tolerance", -1.0),
        ("tau", 0.0),
        ("eps", 0.0),
        ("betas", (0.9, 1.0)),
        ("beta", 0.0),
        ("beta", math.nan),
        ("trust_region", 0.1),
    ],
)
def test_config_errors_name_the_field(name: str, value: Any) -> None:
    """A value out of range raises one line with the field, what is expected and what was found."""
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, found .+\.$"):
        DTOConfig(**{name: value})


@pytest.mark.parametrize("name", ["schedule", "optimizer", "relaxation"])
def test_unknown_choices_name_the_field(name: str) -> None:
    """A choice that does not exist is refused with the name of the field (under runtime type checks, by those)."""
    with pytest.raises((ValueError, TypeError), match=name) as error:
        DTOConfig(**{name: "sparsemax"})  # type: ignore[arg-type]
    assert "sparsemax" in str(error.value)


def test_shape_errors_name_the_argument() -> None:
    """Logits that are not (batch, length, support) floats, and masks that do not fit them, are refused."""
    logits, mask, _, _ = problem((4, 2))
    for bad in ((logits[0], mask), (logits.long(), mask), (logits, mask[:, :2]), (logits, mask.long())):
        with pytest.raises((ValueError, TypeError), match="logits|mask"):
            dto.init(*bad, FAST)
    # The two models' results are checked as well.
    policy, state = ToyPolicy(VOCAB, rows=2), dto.init(logits, mask, FAST)
    with pytest.raises(ValueError, match="`log_probs_fn` must return shape"):
        dto.step(state, lambda y, rows: policy(y, rows)[..., :2], None, FAST)


def test_imports_need_torch_alone() -> None:
    """Importing the algorithm brings in neither transformers nor lightning nor trl."""
    code = (
        "import sys, nabla_rl.dto, nabla_rl.functional; print({'transformers', 'lightning', 'trl'} & set(sys.modules))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "set()"
