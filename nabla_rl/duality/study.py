"""The duality on trial: samplers, RL and decoders against the exact tilted policy, one landscape, one β at a time."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import torch

from nabla_rl import functional as F
from nabla_rl.data.tiny import SORTING, generate
from nabla_rl.dto import DTOConfig
from nabla_rl.duality.chains import CLOSE, curve, place_samplers
from nabla_rl.duality.exact import (
    Law,
    entropy,
    expected_reward,
    gibbs_policy,
    kl_divergence,
    log_partition,
    objective,
    place,
    total_variation,
)
from nabla_rl.duality.gaussian import simulate, stationary_variance
from nabla_rl.duality.kernels import Convergence, alternate, converge, gibbs_with_gradients_kernel, independence_kernel
from nabla_rl.duality.landscape import Landscape, random_landscape
from nabla_rl.duality.laws import Loop, best_of_n_law, dto_laws, nabla_law
from nabla_rl.duality.networks import completion_landscape, likely_tokens
from nabla_rl.duality.rl import Training, natural_gradient_law, train_exact, train_sampled
from nabla_rl.duality.settings import ExactSettings
from nabla_rl.duality.verdicts import KL_BOUND, TV_BOUND
from nabla_rl.models.loading import RewardOptions, load_classifier, load_policy
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError

VOCAB, LENGTH = 5, 4
REWARD_SCALE = 1 / 8
"""The judge's logits span about ±8; scaled so, λ = 10 tilts by about as much as for the table."""
PUBLISHED = DTOConfig(weight_decay=0.0)
"""The published steps (Table 4): T = 20, AdamW, 0.01 to 0.001."""
LONG = DTOConfig(num_steps=100, step_size=0.1, schedule="constant", weight_decay=0.0)
"""Ten times the step, five times as often: far enough for tokens to flip."""
ONE_STEP = DTOConfig(
    num_steps=1, step_size=0.3, final_step_size=0.03, schedule="constant", optimizer="sgd", weight_decay=0.0
)
"""The step of the published loop in configs/decode/default.yaml."""
LOOPS = {
    "∇-Reasoner, published": Loop(
        PUBLISHED, "reward", min_entropy=0.25, resample_temperature=0.5, resample_top_p=0.95
    ),
    "∇-Reasoner, accept by energy": Loop(ONE_STEP, "energy", min_entropy=0.05),
    "∇-Reasoner, Metropolis, 8 sweeps": Loop(ONE_STEP, "metropolis", sweeps=8),
    "loop without gradient, by energy": Loop(replace(ONE_STEP, num_steps=0), "energy", min_entropy=0.05),
    "loop without gradient, Metropolis, 8 sweeps": Loop(replace(ONE_STEP, num_steps=0), "metropolis", sweeps=8),
}
NETWORK_PROBLEMS = {"letters": "sorting-hard-0-6", "letters_barrier": "sorting-hard-0-3"}
"""Which problem's last letters are free. Both were picked by looking: the policy is unsure of each, and its likely
answers are near one another in the first and two or more letters apart in the second."""
LANDSCAPES = ("table", *NETWORK_PROBLEMS)


@cache
def build_landscape(name: str, seed: int = 0) -> Landscape:
    """One of `LANDSCAPES`; the seed is that of the table, networks are as they are."""
    if name == "table":
        return random_landscape(VOCAB, LENGTH, seed=seed, reward_scale=0.5)
    if name not in NETWORK_PROBLEMS:
        raise UserError("grid.landscape", f"one of {', '.join(LANDSCAPES)}", repr(name))
    cpu, wanted = torch.device("cpu"), NETWORK_PROBLEMS[name]
    policy = load_policy("sorting/tiny-policy", dtype="float64", device=cpu)
    reward = SequenceClassifierReward(
        *load_classifier("sorting/tiny-reward", RewardOptions(dtype="float64"), device=cpu)  # pyright: ignore
    )
    problem = next(p for p in islice(generate(SORTING, "hard", 0), 100) if p.id == wanted)
    assert problem.solution is not None
    head = problem.solution[:-LENGTH]
    alphabet = likely_tokens(policy, problem, head, LENGTH, VOCAB)
    found = completion_landscape(policy, reward, problem, head, alphabet, LENGTH)
    assert found.rewards_gradient is not None
    scaled = {"rewards": found.rewards * REWARD_SCALE, "rewards_gradient": found.rewards_gradient * REWARD_SCALE}
    return replace(found, **scaled)


def run_point(name: str, beta: float, seed: int, settings: ExactSettings) -> dict[str, Any]:
    """Everything about one landscape at one β, as plain values."""
    began, landscape = time.perf_counter(), build_landscape(name, seed)
    target = landscape.tilted(beta)
    curves: dict[str, dict[str, Any]] = {}
    samplers = place_samplers(landscape, beta, seed, settings, curves)
    training, laws = _training(landscape, beta, seed, settings, curves)
    placements = _placements(landscape, beta, curves)
    return {
        "landscape": name,
        "beta": beta,
        "lambda": 1 / beta,
        "seed": seed,
        "size": landscape.space.size,
        "policy": _facts(landscape.logps, landscape),
        "target": _facts(target, landscape),
        "log_partition": log_partition(landscape.logps, landscape.rewards, beta),
        "identities": _identities(landscape, beta, seed),
        "samplers": samplers,
        "training": training,
        "placements": placements,
        "composition": _composition(landscape, beta, settings, laws),
        "gaussian": _gaussian(beta, seed),
        "curves": curves,
        "seconds": time.perf_counter() - began,
    }


def _facts(law: Law, landscape: Landscape) -> dict[str, float]:
    return {
        "reward": float(expected_reward(law, landscape.rewards)),
        "entropy": entropy(law),
        "policy_kl": float(kl_divergence(law, landscape.logps)),
    }


def _identities(landscape: Landscape, beta: float, seed: int) -> dict[str, float]:
    """How far the exact identities are from holding, in float64."""
    logps, rewards, target = landscape.logps, landscape.rewards, landscape.tilted(beta)
    best = beta * log_partition(logps, rewards, beta)
    generator = F.seeded_generator("identities", seed)
    other = torch.randn(len(logps), dtype=torch.float64, generator=generator).log_softmax(0)
    gap = objective(other, logps, rewards, beta) - (best - beta * kl_divergence(other, target))
    half = gibbs_policy(gibbs_policy(logps, rewards, 2 * beta), rewards, 2 * beta)
    return {
        "objective is β log Z - β KL": abs(float(gap)),
        "J(ρ*) is β log Z": abs(float(objective(target, logps, rewards, beta)) - best),
        "λ/2 twice is λ": float((half - target).abs().max()),
    }


def _gaussian(beta: float, seed: int, step_size: float = 0.1, chains: int = 20000) -> dict[str, float]:
    """The continuous chain against its closed form, in standard errors."""
    direction = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    found = simulate(
        direction, beta, step_size=step_size, steps=200, chains=chains, generator=F.seeded_generator("gauss", seed)
    )
    variance, expected = float(found.var(0).mean()), stationary_variance(step_size)
    error = expected * math.sqrt(2 / (chains * len(direction)))
    shift = (found.mean(0) - direction / beta).abs().max() / math.sqrt(expected / chains)
    return {
        "variance": variance,
        "closed_form": expected,
        "variance_sigmas": abs(variance - expected) / error,
        "mean_sigmas": float(shift),
    }


def _training(
    landscape: Landscape, beta: float, seed: int, settings: ExactSettings, curves: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Law]]:
    """RL with the exact and with a sampled gradient."""
    size, generator = landscape.space.size, F.seeded_generator("rl", seed, repr(beta))
    runs: dict[str, Training] = {
        "RL, exact gradient": train_exact(landscape, beta, num_steps=settings.exact_steps),
        "RL, sampled gradient": train_sampled(
            landscape, beta, num_steps=settings.sampled_steps, batch_size=settings.batch_size, learning_rate=0.1,
            generator=generator,
        ),
    }  # fmt: skip
    for name, run in runs.items():
        curves[name] = curve("weights", run.evaluations, run.kl)
    target, step = landscape.tilted(beta), 0.5
    natural = [natural_gradient_law(landscape, beta, -k * math.log1p(-step)) for k in range(24)]
    divergences = [float(kl_divergence(law, target)) for law in natural]
    curves["RL, natural gradient"] = curve("weights", [float(k * size) for k in range(24)], divergences)
    rows = [
        {
            "name": name,
            "kl": run.kl[-1],
            "tv": total_variation(run.law, target),
            "evaluations_to_kl": run.evaluations_to(KL_BOUND),
            "evaluations": run.evaluations[-1],
        }
        for name, run in runs.items()
    ]
    return rows, {name: run.law for name, run in runs.items()}


def _placements(landscape: Landscape, beta: float, curves: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The exact output law of every decoder, placed against the tilted policy."""
    logps, rewards = landscape.logps, landscape.rewards
    target = landscape.tilted(beta)
    laws: dict[str, Law] = {"policy": logps}
    for n in (4, 16, 64):
        laws[f"best of {n} by reward"] = best_of_n_law(logps, rewards, n)
        laws[f"best of {n} by energy"] = best_of_n_law(logps, -landscape.energy(beta), n)
    for name, config in (("DTO, published", PUBLISHED), ("DTO, 100 steps of 0.1", LONG)):
        path = list(dto_laws(landscape, replace(config, beta=beta)))
        curves[name] = curve(
            "particles", [max(spent, 1.0) for spent, _ in path], [float(kl_divergence(law, target)) for _, law in path]
        )
        laws[name] = path[-1][1]
    for name, loop in LOOPS.items():
        laws[name] = nabla_law(landscape, loop, beta)
    return [{"name": name, **place(law, logps, rewards, beta)._asdict()} for name, law in laws.items()]


def _composition(
    landscape: Landscape, beta: float, settings: ExactSettings, laws: dict[str, Law]
) -> dict[str, float | int | None]:
    """Half the strength in trained weights, half at test time, against all of it in one place."""
    target = landscape.tilted(beta)
    trained = train_exact(landscape, 2 * beta, num_steps=settings.exact_steps).law
    second = landscape.with_policy(trained)
    ideal = second.tilted(2 * beta)

    def chain_of(start: Landscape, strength: float) -> Convergence:
        both = alternate(gibbs_with_gradients_kernel(start, strength), independence_kernel(start, strength))
        return converge(both, start.logps, target, max_steps=settings.max_steps, kl=CLOSE)

    chain, alone = chain_of(second, 2 * beta), chain_of(landscape, beta)
    return {
        "trained_kl_to_half": float(kl_divergence(trained, landscape.tilted(2 * beta))),
        "tv": total_variation(ideal, target),
        "chain_tv": chain.tv[-1],
        "steps_to_tv_from_trained": chain.steps_to_tv(TV_BOUND),
        "steps_to_tv_from_policy": alone.steps_to_tv(TV_BOUND),
        "full_strength_weights_tv": total_variation(laws["RL, exact gradient"], target),
    }
