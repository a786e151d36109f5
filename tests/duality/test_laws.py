"""Output laws of decoders: exact, against enumeration and against the decoders run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from nabla_rl import dto
from nabla_rl import functional as F
from nabla_rl.dto import DTOConfig
from nabla_rl.duality.exact import empirical_law, expected_iid_tv, iid_tv_spread, total_variation
from nabla_rl.duality.landscape import Landscape, random_landscape
from nabla_rl.duality.laws import Loop, best_of_n_law, dto_laws, nabla_law, start_logits
from nabla_rl.types import UserError

LANDSCAPE = random_landscape(3, 3, seed=2, reward_scale=0.7)
FAR = DTOConfig(num_steps=30, step_size=0.1, schedule="constant", weight_decay=0.0, beta=0.3)


def agree(drawn: torch.Tensor, law: torch.Tensor, generator: torch.Generator) -> bool:
    """Are these draws ones of that law, as far as their distance tells?"""
    found = total_variation(empirical_law(drawn, len(law)), law)
    return abs(found - expected_iid_tv(law, len(drawn))) < 5 * iid_tv_spread(law, len(drawn), generator)


def test_best_of_n_is_the_sum_over_all_draws():
    """Four sequences, ties among the scores, n = 3: all 64 draws by hand, the first of equals taken."""
    logps = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    scores = torch.tensor([1.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    for draw in itertools.product(range(4), repeat=3):
        best = max(draw, key=lambda index: scores[index])
        expected[best] += math.prod(float(logps[index].exp()) for index in draw)
    torch.testing.assert_close(best_of_n_law(logps, scores, 3).exp(), expected)


def test_best_of_one_is_the_policy_and_of_very_many_the_best():
    logps, rewards = LANDSCAPE.logps, LANDSCAPE.rewards
    torch.testing.assert_close(best_of_n_law(logps, rewards, 1), logps)
    assert float(best_of_n_law(logps, rewards, 10**6).exp()[rewards.argmax()]) > 0.999
    with pytest.raises(UserError, match="n: expected at least 1"):
        best_of_n_law(logps, rewards, 0)


def test_dto_starts_at_every_sequence():
    every = torch.arange(27)
    assert torch.equal(start_logits(LANDSCAPE, every).argmax(-1), LANDSCAPE.space.tokens())


def test_the_law_of_dto_is_the_policy_carried_along_its_runs():
    *_, (spent, law) = dto_laws(LANDSCAPE, FAR)
    every = torch.arange(27)
    mask = torch.ones(27, 3, dtype=torch.bool)
    out = dto.run(start_logits(LANDSCAPE, every), mask, LANDSCAPE.log_probs_fn, LANDSCAPE.reward_fn, FAR)
    expected = torch.zeros(27, dtype=torch.float64)
    for end, logp in zip(LANDSCAPE.space.index(out.tokens).tolist(), LANDSCAPE.logps.tolist(), strict=True):
        expected[end] += math.exp(logp)
    torch.testing.assert_close(law.exp(), expected)
    assert 1.0 <= spent <= 30.0
    assert int(law.isfinite().sum()) < 27  # without noise, starts run together


@cache
def optimised_logits(loop: Loop, beta: float, current: int, position: int) -> torch.Tensor:
    """The new token's logits at a position of one completion, by DTO on what follows it."""
    index, config = torch.tensor([current]), replace(loop.dto, beta=beta)
    tokens, logits = LANDSCAPE.space.tokens(index), LANDSCAPE.next_log_probs(index)
    state = dto.init(logits, torch.arange(LANDSCAPE.space.length)[None] >= position, config)
    lift = logits.amax(-1, keepdim=True) - logits.gather(-1, tokens[..., None]) + 1e-5
    state = state._replace(noise=torch.zeros_like(logits).scatter(-1, tokens[..., None], lift), tokens=tokens)
    for _ in range(config.num_steps):
        state, _ = dto.step(state, LANDSCAPE.log_probs_fn, LANDSCAPE.reward_fn, config)
    return state.logits[0, position]


def simulate_loop(landscape: Landscape, loop: Loop, beta: float, seed: int) -> int:
    """The loop as it is written down: one completion, one random number at a time."""
    space, generator = landscape.space, F.seeded_generator("loop", seed)
    draw = lambda law: int(torch.multinomial(law, 1, generator=generator))  # noqa: E731
    current = draw(landscape.logps.exp())
    energy = landscape.energy(beta)
    for position in list(range(space.length)) * loop.sweeps:
        index = torch.tensor([current])
        tokens, logits = space.tokens(index), landscape.next_log_probs(index)
        law = (optimised_logits(loop, beta, current, position) / loop.resample_temperature).softmax(-1)
        token = draw(law)
        old = int(tokens[0, position])
        if token == old:
            continue
        proposal = tokens[0].clone()
        proposal[position] = token
        proposed_suffix = current_suffix = 0.0
        for later in range(position + 1, space.length):
            log_probs = landscape.next_log_probs(space.index(proposal)[None])[0, later]
            proposal[later] = draw(log_probs.exp())
            proposed_suffix += float(log_probs[proposal[later]])
            current_suffix += float(logits[0, later, tokens[0, later]])
        new = int(space.index(proposal))
        ratio = float(energy[current] - energy[new] + law[old].log() - law[token].log())
        ratio += current_suffix - proposed_suffix
        accepted = {
            "energy": energy[new] < energy[current],
            "reward": landscape.rewards[new] > landscape.rewards[current],
            "metropolis": float(torch.rand(1, generator=generator)) < math.exp(min(ratio, 0.0)),
        }[loop.acceptance]
        current = new if accepted else current
    return current


@pytest.mark.parametrize("acceptance", ["energy", "reward", "metropolis"])
def test_the_law_of_the_loop_is_that_of_the_loop_run(acceptance, generator):
    loop = Loop(replace(FAR, num_steps=4), acceptance, resample_temperature=0.7)
    drawn = torch.tensor([simulate_loop(LANDSCAPE, loop, 0.3, seed) for seed in range(300)])
    assert agree(drawn, nabla_law(LANDSCAPE, loop, 0.3), generator)


def test_the_loop_with_metropolis_and_no_gradient_is_exact_in_the_limit():
    """Proposals from the policy with the right test leave the tilted policy as it is: many sweeps end there."""
    beta, target = 0.5, LANDSCAPE.tilted(0.5)
    loop = Loop(replace(FAR, num_steps=0), "metropolis", sweeps=60)
    assert total_variation(nabla_law(LANDSCAPE, loop, beta), target) < 1e-4
    greedy = nabla_law(LANDSCAPE, replace(loop, acceptance="energy"), beta)
    assert total_variation(greedy, target) > 0.3  # accepting by energy ends in modes


def test_the_loop_that_picks_no_position_gives_the_policy_back():
    law = nabla_law(LANDSCAPE, Loop(FAR, min_entropy=10.0), 0.3)
    torch.testing.assert_close(law, LANDSCAPE.logps)
