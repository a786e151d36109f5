"""The duality on trial: samplers, RL and decoders against the exact tilted policy, one landscape, one β at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.data.tiny import SORTING, generate
from nabla_rl.dto import DTOConfig
from nabla_rl.duality.exact import (
    Law,
    empirical_law,
    entropy,
    expected_iid_tv,
    expected_reward,
    gibbs_policy,
    iid_tv_spread,
    kl_divergence,
    log_partition,
    objective,
    place,
    total_variation,
)
from nabla_rl.duality.gaussian import simulate, stationary_variance
from nabla_rl.duality.kernels import (
    Kernel,
    alternate,
    converge,
    discrete_langevin_kernel,
    gibbs_with_gradients_kernel,
    independence_kernel,
)
from nabla_rl.duality.landscape import Landscape, random_landscape
from nabla_rl.duality.laws import Loop, best_of_n_law, dto_laws, nabla_law
from nabla_rl.duality.networks import completion_landscape, likely_tokens
from nabla_rl.duality.rl import Training, natural_gradient_law, train_exact, train_sampled
from nabla_rl.models.loading import PolicyOptions, RewardOptions, load_classifier, load_policy
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.samplers import discrete_langevin, gibbs_with_gradients, langevin
from nabla_rl.samplers.diagnostics import acceptance_rate, effective_sample_size, r_hat
from nabla_rl.types import UserError

TV_BOUND, KL_BOUND, IDENTITY_BOUND = 0.02, 0.01, 1e-9
VOCAB, LENGTH = 5, 4
SHORT_RUN = 60
"""Steps of a running sampler that is not expected to arrive."""
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


@dataclass(frozen=True)
class ExactSettings:
    """How much work a point is."""

    max_steps: int = 3000
    """Steps after which a chain's exact law is given up on."""
    chains: int = 2048
    """Chains of the running samplers."""
    run_steps: int = 500
    """Steps of the running samplers at most."""
    exact_steps: int = 400
    """Updates of RL with the exact gradient."""
    sampled_steps: int = 1500
    """Updates of RL with a sampled gradient."""
    batch_size: int = 256
    """Samples of each of those."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value in vars(self).items():
            if value < (2 if name in ("chains", "batch_size") else 1):
                raise UserError(f"settings.{name}: expected a larger number, found {value}.")


@cache
def build_landscape(name: str, seed: int = 0) -> Landscape:
    """One of `LANDSCAPES`; the seed is that of the table, networks are as they are."""
    if name == "table":
        return random_landscape(VOCAB, LENGTH, seed=seed, reward_scale=0.5)
    if name not in NETWORK_PROBLEMS:
        raise UserError(f"--grid.landscape: expected one of {', '.join(LANDSCAPES)}, found {name!r}.")
    cpu, wanted = torch.device("cpu"), NETWORK_PROBLEMS[name]
    policy = load_policy(PolicyOptions(dtype="float64"), family="sorting", device=cpu)
    reward = SequenceClassifierReward(
        *load_classifier(RewardOptions(dtype="float64"), family="sorting", device=cpu)  # pyright: ignore
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
    samplers = _samplers(landscape, beta, seed, settings, curves)
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


def _samplers(
    landscape: Landscape, beta: float, seed: int, settings: ExactSettings, curves: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The exact law of every discrete sampler along its steps, and the samplers themselves run."""
    target, start, length = landscape.tilted(beta), landscape.logps, landscape.space.length
    local, global_ = gibbs_with_gradients_kernel(landscape, beta), independence_kernel(landscape, beta)
    dmala = discrete_langevin_kernel(landscape, beta, 2.0)
    dula = discrete_langevin_kernel(landscape, beta, 2.0, corrected=False)
    kernels: dict[str, tuple[Kernel, float]] = {
        "Gibbs-with-gradients": (local, 4.0 * length),
        "discrete Langevin": (dmala, 4.0 * length),
        "discrete Langevin, uncorrected": (dula, 4.0 * length),
        "independence Metropolis": (global_, 2.0 * length),
        "Gibbs-with-gradients + independence": (alternate(local, global_), 3.0 * length),
    }
    rows: list[dict[str, Any]] = []
    for name, (kernel, tokens) in kernels.items():
        limit = settings.max_steps if name != "discrete Langevin, uncorrected" else 300
        path = converge(kernel, start, target, max_steps=limit, kl=1e-7)
        steps, spent = path.steps_to_tv(TV_BOUND), path.evaluations_to_tv(TV_BOUND)
        rows.append(
            {
                "name": name,
                "steps_to_tv": steps,
                "evaluations_to_tv": spent,
                "token_forwards_to_tv": None if spent is None else spent * tokens,
                "tv": path.tv[-1],
                "kl": path.kl[-1],
                "law": "exact",
            }
        )
        curves[name] = _curve("particles", path.evaluations, path.kl)
    runs: tuple[tuple[str, Any, Any, Kernel | None], ...] = (
        (
            "Gibbs-with-gradients", gibbs_with_gradients,
            gibbs_with_gradients.GibbsWithGradientsConfig(beta=beta), local,
        ),
        (
            "discrete Langevin", discrete_langevin,
            discrete_langevin.DiscreteLangevinConfig(beta=beta, step_size=2.0), dmala,
        ),
        ("Langevin on logits", langevin, langevin.LangevinConfig(beta=beta, step_size=0.3), None),
        (
            "Langevin on logits, uncorrected", langevin,
            langevin.LangevinConfig(beta=beta, step_size=0.3, corrected=False), None,
        ),
    )  # fmt: skip
    for name, module, config, kernel in runs:
        exact = next((row for row in rows if row["name"] == name), None)
        # long enough to arrive, where that is known and can be; else long enough to be compared with the exact law
        known = None if exact is None else exact["steps_to_tv"]
        arrives = config.corrected and (exact is None or known is not None)
        steps = max(8, min(settings.run_steps, known or settings.run_steps)) if arrives else SHORT_RUN
        measured = _run(landscape, beta, seed, settings, name, module, config, steps, curves, kernel)
        if exact is None:
            rows.append({"name": name, "law": "measured", "tv": measured["tv"], **_none_known(measured, length)})
            exact = rows[-1]
        exact["measured"] = measured
    return rows


def _none_known(measured: dict[str, Any], length: int) -> dict[str, Any]:
    spent = measured["evaluations"] if measured["tv"] <= TV_BOUND + measured["iid_tv"] else None
    tokens = None if spent is None else 4.0 * length * spent
    return {"steps_to_tv": None, "evaluations_to_tv": spent, "token_forwards_to_tv": tokens, "kl": measured["kl"]}


def _run(
    landscape: Landscape,
    beta: float,
    seed: int,
    settings: ExactSettings,
    name: str,
    module: Any,
    config: Any,
    steps: int,
    curves: dict[str, dict[str, Any]],
    kernel: Kernel | None,
) -> dict[str, Any]:
    """A sampler itself, many chains from samples of the policy; its last states are independent draws of its law."""
    space, chains, target = landscape.space, settings.chains, landscape.tilted(beta)
    generator = F.seeded_generator("run", name, seed, repr(beta))
    index = torch.multinomial(landscape.logps.exp(), chains, replacement=True, generator=generator)
    tokens, mask = space.tokens(index), torch.ones(chains, space.length, dtype=torch.bool)
    models = (landscape.log_probs_fn, landscape.reward_fn)
    if module is langevin:
        state = langevin.init(_logits_at(tokens, space.vocab, config.scale, generator), mask, *models, config)
    else:
        state = module.init(tokens, mask, space.vocab, *models, config)
    accepted, energies, spent = [], [], [1.0]
    bias, noise = _plug_in_bias(target, chains, generator)
    divergences = [_plug_in_kl(index, target) - bias]
    for _ in range(steps):
        state, info = module.step(state, *models, config, generator)
        accepted.append(info.accepted)
        energies.append(info.energy[:256])
        spent.append(spent[-1] + float(info.evaluated.double().mean()))
        if kernel is None:
            divergences.append(_plug_in_kl(space.index(state.tokens), target) - bias)
    last = space.index(state.tokens)
    along = torch.stack(energies[len(energies) // 2 :], 1)
    drawn = empirical_law(last, space.size)
    result = {
        "chains": chains,
        "steps": steps,
        "evaluations": spent[-1],
        "tv": total_variation(drawn, target),
        "kl": _plug_in_kl(last, target) - bias,
        "iid_tv": expected_iid_tv(target, chains),
        "iid_tv_spread": iid_tv_spread(target, chains, generator),
        "acceptance": acceptance_rate(torch.stack(accepted)),
        "effective_samples_per_step": effective_sample_size(along) / along.numel(),
        "r_hat": r_hat(along) if along.shape[1] >= 4 else None,
    }
    if kernel is None:
        # an estimate is worth drawing until it is lost in its own noise
        lost = next((k for k, value in enumerate(divergences) if value < 3 * noise), len(divergences))
        curves[name] = _curve("particles", spent[: max(lost, 1)], divergences[: max(lost, 1)])
        return result
    # against the chain's own exact law after as many steps, which is what the code must reproduce
    own = converge(kernel, landscape.logps, target, max_steps=steps, kl=-1.0).law
    result["own_law_tv"] = total_variation(drawn, own)
    result["own_law_iid_tv"] = expected_iid_tv(own, chains)
    result["own_law_iid_tv_spread"] = iid_tv_spread(own, chains, generator)
    return result


def _logits_at(tokens: Tensor, vocab: int, scale: float, generator: torch.Generator) -> Tensor:
    """Gaussian logits whose argmax is `tokens`: the largest of each position is exchanged with the token's."""
    logits = scale * torch.randn(*tokens.shape, vocab, generator=generator)
    best, wanted = logits.argmax(-1, keepdim=True), tokens[..., None]
    high, low = logits.gather(-1, best), logits.gather(-1, wanted)
    return logits.scatter(-1, best, low).scatter(-1, wanted, high)


def _plug_in_kl(index: Tensor, target: Law) -> float:
    """KL(law‖target) from independent draws: the plug-in estimate, too large by about `_plug_in_bias`."""
    return float(kl_divergence(empirical_law(index, len(target)), target))


def _plug_in_bias(target: Law, count: int, generator: torch.Generator, repeats: int = 32) -> tuple[float, float]:
    """What that estimate gives for draws of the target itself, where it should give 0: mean and spread."""
    drawn = torch.multinomial(target.exp(), count * repeats, replacement=True, generator=generator).view(repeats, -1)
    found = torch.tensor([_plug_in_kl(one, target) for one in drawn])
    return float(found.mean()), float(found.std())


def _curve(side: str, spent: Sequence[float], kl: Sequence[float], most: int = 160) -> dict[str, Any]:
    """A curve with at most so many points, spaced evenly on a logarithmic axis."""
    count = len(spent)
    chosen = sorted({round(count ** (k / most)) - 1 for k in range(most + 1)} | {0, count - 1})
    return {
        "side": side,
        "evaluations": [spent[k] for k in chosen if k < count],
        "kl": [kl[k] for k in chosen if k < count],
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
        curves[name] = _curve("weights", run.evaluations, run.kl)
    target, step = landscape.tilted(beta), 0.5
    natural = [natural_gradient_law(landscape, beta, -k * math.log1p(-step)) for k in range(24)]
    divergences = [float(kl_divergence(law, target)) for law in natural]
    curves["RL, natural gradient"] = _curve("weights", [float(k * size) for k in range(24)], divergences)
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
        curves[name] = _curve(
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
    target, most = landscape.tilted(beta), settings.max_steps
    trained = train_exact(landscape, 2 * beta, num_steps=settings.exact_steps).law
    second = landscape.with_policy(trained)
    ideal = second.tilted(2 * beta)
    chain = converge(
        alternate(gibbs_with_gradients_kernel(second, 2 * beta), independence_kernel(second, 2 * beta)),
        trained, target, max_steps=most, kl=1e-7,
    )  # fmt: skip
    alone = converge(
        alternate(gibbs_with_gradients_kernel(landscape, beta), independence_kernel(landscape, beta)),
        landscape.logps, target, max_steps=most, kl=1e-7,
    )  # fmt: skip
    return {
        "trained_kl_to_half": float(kl_divergence(trained, landscape.tilted(2 * beta))),
        "tv": total_variation(ideal, target),
        "chain_tv": chain.tv[-1],
        "steps_to_tv_from_trained": chain.steps_to_tv(TV_BOUND),
        "steps_to_tv_from_policy": alone.steps_to_tv(TV_BOUND),
        "full_strength_weights_tv": total_variation(laws["RL, exact gradient"], target),
    }


class Verdict(NamedTuple):
    """What became of one claim on one landscape, over all β and seeds."""

    claim: str
    landscape: str
    holds: bool
    measured: float  # the worst
    bound: float
    worst_lambda: float | None
    note: str

    @property
    def text(self) -> str:
        """`holds`, or `fails` and by how much."""
        return "holds" if self.holds else f"fails by {self.measured - self.bound:.2g}"


def verdicts(points: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Every claim on every landscape, the worst point deciding."""
    found: list[Verdict] = []
    names = list(dict.fromkeys(point["landscape"] for point in points))

    def judge(claim: str, bound: float, value: Callable[[dict], float], note: Callable[[list[dict]], str]) -> None:
        for name in names:
            mine = [point for point in points if point["landscape"] == name]
            worst = max(mine, key=lambda point: _worse(value(point)))
            measured = value(worst)
            found.append(Verdict(claim, name, measured <= bound, measured, bound, worst["lambda"], note(mine)))

    judge("identities hold in float64", IDENTITY_BOUND, lambda p: max(p["identities"].values()), lambda ps: "")
    judge(
        "continuous case has its closed-form law (standard errors)", 4.0,
        lambda p: max(p["gaussian"]["variance_sigmas"], p["gaussian"]["mean_sigmas"]), lambda ps: "",
    )  # fmt: skip
    for name in (
        "Gibbs-with-gradients",
        "discrete Langevin",
        "Gibbs-with-gradients + independence",
        "independence Metropolis",
    ):
        judge(
            f"{name} reaches the tilted policy (TV, exact law)", TV_BOUND,
            lambda p, n=name: pick(p["samplers"], n)["tv"],
            lambda ps, n=name: "gradients needed: " + _list(pick(p["samplers"], n)["evaluations_to_tv"] for p in ps),
        )  # fmt: skip
    judge(
        "corrected Langevin on logits reaches it (TV beyond that of independent draws)", TV_BOUND,
        lambda p: _excess(pick(p["samplers"], "Langevin on logits")["measured"], ""),
        lambda ps: "measured on chains that run; spread of the estimate at most "
        f"{max(pick(p['samplers'], 'Langevin on logits')['measured']['iid_tv_spread'] for p in ps):.3f}",
    )  # fmt: skip
    for name in ("Gibbs-with-gradients", "discrete Langevin"):
        judge(
            f"running {name} follows its exact law (TV beyond independent draws', in standard deviations)", 4.0,
            lambda p, n=name: _excess(pick(p["samplers"], n)["measured"], "own_law_")
            / pick(p["samplers"], n)["measured"]["own_law_iid_tv_spread"],
            lambda ps: "",
        )  # fmt: skip
    for name in ("RL, exact gradient", "RL, sampled gradient"):
        judge(
            f"{name} reaches the tilted policy (KL)", KL_BOUND,
            lambda p, n=name: pick(p["training"], n)["kl"],
            lambda ps, n=name: "gradients needed: " + _list(pick(p["training"], n)["evaluations_to_kl"] for p in ps),
        )  # fmt: skip
    judge(
        "λ/2 in weights and λ/2 at test time is λ (TV)", TV_BOUND, lambda p: p["composition"]["chain_tv"],
        lambda ps: "steps from trained weights: "
        + _list(p["composition"]["steps_to_tv_from_trained"] for p in ps)
        + "; from the policy: "
        + _list(p["composition"]["steps_to_tv_from_policy"] for p in ps),
    )  # fmt: skip
    decoders = [row["name"] for row in points[0]["placements"] if row["name"] != "policy"]
    for name in decoders:
        judge(
            f"{name} samples the tilted policy (TV)", TV_BOUND,
            lambda p, n=name: pick(p["placements"], n)["tv"],
            lambda ps, n=name: describe([pick(p["placements"], n) for p in ps]),
        )  # fmt: skip
    return found


def pick(rows: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of that name."""
    return next(row for row in rows if row["name"] == name)


def describe(places: Sequence[dict[str, Any]]) -> str:
    """In which direction a decoder misses, over the points, and the strength at which it fits best."""
    count = len(places)
    seeking = sum(place["entropy_excess"] < -0.05 for place in places)
    over = sum(place["reward_excess"] > 0.01 for place in places)
    under = sum(place["reward_excess"] < -0.01 for place in places)
    strengths = _list(place["lambda_eff"] for place in places)
    return (
        f"mode-seeking at {seeking}, over-optimised at {over}, short of the reward at {under} of {count}; "
        f"λ_eff: {strengths}"
    )


def _excess(measured: dict[str, Any], which: str) -> float:
    return max(0.0, measured[f"{which}tv"] - measured[f"{which}iid_tv"])


def _worse(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _list(values: Iterable[float | None]) -> str:
    texts = ["–" if v is None else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in values]
    return ", ".join(texts)
