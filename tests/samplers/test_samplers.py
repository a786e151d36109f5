"""The samplers: their law is the exact kernels', step by step, and in the end the tilted policy's."""

from __future__ import annotations

import math

import pytest
import torch

from nabla_rl import functional as F
from nabla_rl.duality.exact import empirical_law, expected_iid_tv, iid_tv_spread, total_variation
from nabla_rl.duality.kernels import (
    discrete_langevin_kernel,
    gibbs_with_gradients_kernel,
    independence_kernel,
    law_after,
)
from nabla_rl.duality.landscape import random_landscape
from nabla_rl.samplers import discrete_langevin, gibbs_with_gradients, independence, langevin
from nabla_rl.samplers.chain import init as init_chain
from nabla_rl.samplers.discrete_langevin import DiscreteLangevinConfig
from nabla_rl.samplers.gibbs_with_gradients import GibbsWithGradientsConfig
from nabla_rl.samplers.independence import IndependenceConfig
from nabla_rl.samplers.langevin import LangevinConfig
from nabla_rl.types import UserError

LANDSCAPE = random_landscape(3, 3, seed=1, reward_scale=0.5)
MODELS = (LANDSCAPE.log_probs_fn, LANDSCAPE.reward_fn)
BETA, CHAINS = 0.4, 10_000
DISCRETE = [
    (gibbs_with_gradients, GibbsWithGradientsConfig(beta=BETA)),
    (gibbs_with_gradients, GibbsWithGradientsConfig(beta=BETA, temperature=3.0)),
    (discrete_langevin, DiscreteLangevinConfig(beta=BETA, step_size=2.0)),
    (discrete_langevin, DiscreteLangevinConfig(beta=BETA, step_size=2.0, corrected=False)),
]


def starts(chains: int, generator: torch.Generator) -> torch.Tensor:
    """Samples of the policy."""
    index = torch.multinomial(LANDSCAPE.logps.exp(), chains, replacement=True, generator=generator)
    return LANDSCAPE.space.tokens(index)


def run(module, config, tokens: torch.Tensor, steps: int, generator) -> torch.Tensor:
    state = module.init(tokens, torch.ones_like(tokens).bool(), 3, *MODELS, config)
    for _ in range(steps):
        state, _ = module.step(state, *MODELS, config, generator)
    return LANDSCAPE.space.index(state.tokens)


def follows(drawn: torch.Tensor, law: torch.Tensor, generator: torch.Generator) -> bool:
    found = total_variation(empirical_law(drawn, len(law)), law)
    return abs(found - expected_iid_tv(law, len(drawn))) < 4.5 * iid_tv_spread(law, len(drawn), generator)


@pytest.mark.parametrize(("module", "config"), DISCRETE)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_running_sampler_has_the_law_of_its_exact_kernel(module, config, steps, generator):
    """Many chains from the policy: their last states are independent draws of the policy times the kernel's power."""
    if module is gibbs_with_gradients:
        kernel = gibbs_with_gradients_kernel(LANDSCAPE, BETA, config.temperature)
    else:
        kernel = discrete_langevin_kernel(LANDSCAPE, BETA, config.step_size, corrected=config.corrected)
    law = law_after(kernel, LANDSCAPE.logps, steps)
    drawn = run(module, config, starts(CHAINS, generator), steps, generator)
    assert follows(drawn, law, generator)


@pytest.mark.parametrize("beta", [2.0, 0.2])
def test_corrected_langevin_on_logits_has_the_tilted_law(beta, generator):
    """However biased the straight-through gradient is; and without the correction it has not."""
    space, chains, mask = LANDSCAPE.space, 2000, torch.ones(2000, 3, dtype=torch.bool)
    found = {}
    for corrected in (True, False):
        config = LangevinConfig(beta=beta, step_size=0.3, corrected=corrected)
        logits = torch.randn(chains, 3, 3, generator=generator)
        state = langevin.init(logits, mask, *MODELS, config)
        for _ in range(120 if corrected else 40):
            state, info = langevin.step(state, *MODELS, config, generator)
        found[corrected] = total_variation(
            empirical_law(space.index(state.tokens), space.size), LANDSCAPE.tilted(beta)
        )
        assert torch.equal(state.tokens, state.logits.argmax(-1))
        assert bool(info.accepted.all()) is (not corrected)
    law = LANDSCAPE.tilted(beta)
    assert found[True] < expected_iid_tv(law, chains) + 5 * iid_tv_spread(law, chains, generator) + 0.005
    assert found[False] > found[True] + 0.05


@pytest.mark.parametrize("steps", [1, 3])
def test_running_independence_metropolis_has_the_law_of_its_exact_kernel(steps, generator):
    config = IndependenceConfig(beta=BETA)
    tokens = starts(CHAINS, generator)
    state = independence.init(tokens, torch.ones_like(tokens).bool(), 3, *MODELS, config)
    for _ in range(steps):
        state, info = independence.step(state, starts(CHAINS, generator), *MODELS, config, generator)
        assert torch.equal(info.evaluated.logical_not() & info.accepted.logical_not(), torch.zeros(CHAINS).bool())
    law = law_after(independence_kernel(LANDSCAPE, BETA), LANDSCAPE.logps, steps)
    assert follows(LANDSCAPE.space.index(state.tokens), law, generator)
    with pytest.raises(UserError, match="beta: expected positive"):
        IndependenceConfig(beta=0.0)


def test_a_jump_of_logits_has_the_law_of_independence_metropolis(generator):
    """From logits of the policy's samples: the tokens' law after a jump is that of the exact kernel."""
    config, tokens = LangevinConfig(beta=BETA), starts(CHAINS, generator)
    logits = langevin.logits_at(tokens, torch.zeros(CHAINS, 3, 3), config.scale, generator)
    assert torch.equal(logits.argmax(-1), tokens)
    state = langevin.init(logits, torch.ones_like(tokens).bool(), *MODELS, config)
    state, _ = langevin.jump(state, starts(CHAINS, generator), *MODELS, config, generator)
    assert torch.equal(state.logits.argmax(-1), state.tokens)
    law = law_after(independence_kernel(LANDSCAPE, BETA), LANDSCAPE.logps, 1)
    assert follows(LANDSCAPE.space.index(state.tokens), law, generator)


def test_jumps_and_steps_in_turn_keep_the_tilted_law_of_logits(generator):
    """Started at ρ* (tokens from it, logits given them), neither kind of move leads away; all of them accept some."""
    config, law = LangevinConfig(beta=BETA, step_size=0.3), LANDSCAPE.tilted(BETA)
    index = torch.multinomial(law.exp(), CHAINS, replacement=True, generator=generator)
    tokens = LANDSCAPE.space.tokens(index)
    logits = langevin.logits_at(tokens, torch.zeros(CHAINS, 3, 3), config.scale, generator)
    state = langevin.init(logits, torch.ones_like(tokens).bool(), *MODELS, config)
    before = state.logits.square().mean()
    for step in range(6):
        if step % 2:
            state, info = langevin.jump(state, starts(CHAINS, generator), *MODELS, config, generator)
        else:
            state, info = langevin.step(state, *MODELS, config, generator)
        assert 0.05 < float(info.accepted.double().mean()) < 1.0
    assert follows(LANDSCAPE.space.index(state.tokens), law, generator)
    assert float(state.logits.square().mean()) == pytest.approx(float(before), rel=0.02)


def test_langevin_asks_the_models_only_where_a_token_flipped():
    calls: list[int] = []

    def log_probs_fn(tokens, rows):
        calls.append(len(rows))
        return LANDSCAPE.log_probs_fn(tokens, rows)

    config = LangevinConfig(beta=BETA, step_size=0.01)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, 3, generator=generator)
    state = langevin.init(logits, torch.ones(50, 3, dtype=torch.bool), log_probs_fn, LANDSCAPE.reward_fn, config)
    assert calls == [50]
    for _ in range(10):
        calls.clear()
        state, info = langevin.step(state, log_probs_fn, LANDSCAPE.reward_fn, config, generator)
        assert sum(calls) == int(info.evaluated.sum()) < 50


@pytest.mark.parametrize(("module", "config"), DISCRETE[:3])
def test_a_chain_does_not_depend_on_those_beside_it(module, config):
    """With a generator of its own, alone or in a batch."""
    tokens = LANDSCAPE.space.tokens(torch.tensor([1, 13, 26]))
    together = run(module, config, tokens, 12, [F.seeded_generator("chain", k) for k in range(3)])
    for k in range(3):
        alone = run(module, config, tokens[k : k + 1], 12, [F.seeded_generator("chain", k)])
        assert alone[0] == together[k]


def test_info_and_state_describe_the_same_step(generator):
    config, tokens = GibbsWithGradientsConfig(beta=BETA), starts(200, generator)
    state = gibbs_with_gradients.init(tokens, torch.ones_like(tokens).bool(), 3, *MODELS, config)
    after, info = gibbs_with_gradients.step(state, *MODELS, config, generator)
    index = LANDSCAPE.space.index(after.tokens)
    torch.testing.assert_close(after.energy.double(), LANDSCAPE.energy(BETA)[index], atol=1e-5, rtol=0)
    torch.testing.assert_close(after.reward.double(), LANDSCAPE.rewards[index], atol=1e-5, rtol=0)
    changed = (after.tokens != state.tokens).sum(1)
    assert torch.equal(changed == 1, info.accepted) and int(changed.max()) == 1
    assert bool(info.evaluated.all()) and after.step == 1
    assert torch.equal(after.energy, info.energy)


@pytest.mark.parametrize("module", [gibbs_with_gradients, discrete_langevin, langevin])
def test_padding_never_moves(module, generator):
    tokens = torch.tensor([[0, 1, 2]]).repeat(20, 1)
    mask = torch.tensor([[True, True, False]]).repeat(20, 1)
    if module is langevin:
        config = LangevinConfig(beta=BETA)
        state = langevin.init(5.0 * F.one_hot(tokens, torch.zeros(20, 3, 3)), mask, *MODELS, config)
    else:
        config = (
            GibbsWithGradientsConfig(beta=BETA) if module is gibbs_with_gradients else DiscreteLangevinConfig(BETA)
        )
        state = module.init(tokens, mask, 3, *MODELS, config)
    for _ in range(15):
        state, _ = module.step(state, *MODELS, config, generator)
    assert bool((state.tokens[:, 2] == 2).all())
    assert not torch.equal(state.tokens, tokens)


def test_bad_settings_are_refused():
    tokens, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    for build, complaint in (
        (lambda: GibbsWithGradientsConfig(beta=0.0), "beta: expected positive"),
        (lambda: GibbsWithGradientsConfig(temperature=-1.0), "temperature: expected positive"),
        (lambda: DiscreteLangevinConfig(step_size=0.0), "step_size: expected positive"),
        (lambda: LangevinConfig(scale=0.0), "scale: expected positive"),
        (lambda: init_chain(tokens, mask[:, :2], 3, *MODELS, beta=1.0), "tokens: expected"),
        (lambda: init_chain(tokens, mask, 3, *MODELS, beta=-1.0), "beta: expected positive"),
        (
            lambda: gibbs_with_gradients.init(tokens, ~mask, 3, *MODELS, GibbsWithGradientsConfig()),
            "Nothing could change",
        ),
        (lambda: langevin.init(torch.zeros(2, 3), mask, *MODELS, LangevinConfig()), "logits: expected"),
    ):
        with pytest.raises(UserError, match=complaint):
            build()
    state = init_chain(tokens, mask, 3, *MODELS, beta=1.0)
    with pytest.raises(UserError, match="one or as many as there are chains, found 1"):
        gibbs_with_gradients.step(state, *MODELS, GibbsWithGradientsConfig(), [torch.Generator()])


def test_proposals_are_normalised_and_never_stay():
    gradient = torch.randn(5, 3, 3)
    tokens, mask = torch.randint(3, (5, 3)), torch.ones(5, 3, dtype=torch.bool)
    mask[:, 2] = False
    log_q = gibbs_with_gradients.proposal_log_probs(gradient, tokens, mask)
    torch.testing.assert_close(log_q.flatten(1).logsumexp(1), torch.zeros(5, dtype=torch.float64))
    assert bool((log_q.gather(-1, tokens[..., None]) == -math.inf).all()) and bool((log_q[:, 2] == -math.inf).all())
    factors = discrete_langevin.proposal_log_probs(gradient, tokens, 0.5)
    torch.testing.assert_close(factors.logsumexp(-1), torch.zeros(5, 3, dtype=torch.float64))
