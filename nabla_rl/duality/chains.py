"""Samplers on a listed space: the exact law of every discrete one along its steps, and all of them run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.duality.exact import Law, empirical_law, expected_iid_tv, iid_tv_spread, kl_divergence, total_variation
from nabla_rl.duality.kernels import (
    Kernel,
    alternate,
    converge,
    discrete_langevin_kernel,
    gibbs_with_gradients_kernel,
    independence_kernel,
    law_after,
)
from nabla_rl.duality.landscape import Landscape
from nabla_rl.duality.settings import ExactSettings
from nabla_rl.duality.verdicts import TV_BOUND, pick
from nabla_rl.samplers import discrete_langevin, gibbs_with_gradients, langevin
from nabla_rl.samplers.chain import ChainInfo, ChainState
from nabla_rl.samplers.diagnostics import acceptance_rate, effective_sample_size, r_hat
from nabla_rl.samplers.langevin import LangevinState

SHORT_RUN = 60
"""Steps of a running sampler that is only compared with its own exact law."""
MIXED_RUN = 400
"""Steps of a running sampler that is alternated with rollouts."""
UNCORRECTED_STEPS = 300
"""Steps after which the exact law of a chain that ends elsewhere is left."""
CLOSE = 1e-5
"""KL to ρ* at which a chain has arrived."""
DLP_STEP, LOGIT_STEP = 2.0, 0.3


State = ChainState | LangevinState
Move = Callable[[State, torch.Generator], tuple[State, ChainInfo]]


@dataclass(frozen=True)
class Sampler:
    """A sampler that runs: where it starts, and the moves that it makes in turn."""

    name: str
    init: Callable[[Tensor, torch.Generator], State]
    moves: Sequence[Move]
    kernel: Kernel | None
    """Its exact law, where there is one."""
    steps: int


def place_samplers(
    landscape: Landscape, beta: float, seed: int, settings: ExactSettings, curves: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every sampler against the tilted policy at one β; its curve of KL against gradients is put into `curves`."""
    kernels = build_kernels(landscape, beta)
    rows = [_exact_row(landscape, beta, settings, name, curves, *entry) for name, entry in kernels.items()]
    for sampler in _running(landscape, beta, settings, {name: kernel for name, (kernel, _) in kernels.items()}, rows):
        measured = _run(landscape, beta, seed, settings.chains, sampler, curves)
        if sampler.kernel is None:
            rows.append(_measured_row(sampler.name, measured, landscape.space.length))
        else:
            pick(rows, sampler.name)["measured"] = measured
    return rows


def build_kernels(landscape: Landscape, beta: float) -> dict[str, tuple[Kernel, float]]:
    """The transition matrices, each with the token-forwards of one evaluation (a backward counts as one more)."""
    length = landscape.space.length
    local, wide = gibbs_with_gradients_kernel(landscape, beta), independence_kernel(landscape, beta)
    corrected = discrete_langevin_kernel(landscape, beta, DLP_STEP)
    return {
        "Gibbs-with-gradients": (local, 4.0 * length),
        "discrete Langevin": (corrected, 4.0 * length),
        "discrete Langevin, uncorrected": (
            discrete_langevin_kernel(landscape, beta, DLP_STEP, corrected=False),
            4.0 * length,
        ),
        "independence Metropolis": (wide, 2.0 * length),
        "Gibbs-with-gradients + independence": (alternate(local, wide), 3.0 * length),
        "discrete Langevin + independence": (alternate(corrected, wide), 3.0 * length),
    }


def _exact_row(
    landscape: Landscape,
    beta: float,
    settings: ExactSettings,
    name: str,
    curves: dict[str, dict[str, Any]],
    kernel: Kernel,
    tokens: float,
) -> dict[str, Any]:
    limit = min(settings.max_steps, UNCORRECTED_STEPS) if "uncorrected" in name else settings.max_steps
    path = converge(kernel, landscape.logps, landscape.tilted(beta), max_steps=limit, kl=CLOSE)
    spent = path.evaluations_to_tv(TV_BOUND)
    curves[name] = curve("particles", path.evaluations, path.kl)
    return {
        "name": name,
        "steps_to_tv": path.steps_to_tv(TV_BOUND),
        "evaluations_to_tv": spent,
        "token_forwards_to_tv": None if spent is None else spent * tokens,
        "tv": path.tv[-1],
        "kl": path.kl[-1],
        "law": "exact",
    }


def _running(
    landscape: Landscape, beta: float, settings: ExactSettings, kernels: dict[str, Kernel], rows: list[dict[str, Any]]
) -> list[Sampler]:
    """The samplers that are run. Those with an exact law take as many steps as it needs, if that is affordable."""
    space, models = landscape.space, (landscape.log_probs_fn, landscape.reward_fn)

    def discrete(name: str, module: Any, config: Any) -> Sampler:
        known = pick(rows, name)["steps_to_tv"]
        steps = SHORT_RUN if known is None or known > settings.run_steps else max(8, known)
        return Sampler(
            name,
            lambda tokens, generator: module.init(tokens, _mask(tokens), space.vocab, *models, config),
            [lambda state, generator: module.step(state, *models, config, generator)],
            kernels[name],
            min(steps, settings.run_steps),
        )

    def on_logits(name: str, config: langevin.LangevinConfig, steps: int, *, rollouts: bool = False) -> Sampler:
        def init(tokens: Tensor, generator: torch.Generator) -> State:
            like = torch.zeros(*tokens.shape, space.vocab)
            return langevin.init(
                langevin.logits_at(tokens, like, config.scale, generator), _mask(tokens), *models, config
            )

        def jump(state: Any, generator: torch.Generator) -> tuple[State, ChainInfo]:
            drawn = space.tokens(_policy_samples(landscape, len(state.tokens), generator))
            return langevin.jump(state, drawn, *models, config, generator)

        def local(state: Any, generator: torch.Generator) -> tuple[State, ChainInfo]:
            return langevin.step(state, *models, config, generator)

        return Sampler(name, init, [local, jump] if rollouts else [local], None, min(steps, settings.run_steps))

    corrected = langevin.LangevinConfig(beta=beta, step_size=LOGIT_STEP)
    plain = langevin.LangevinConfig(beta=beta, step_size=LOGIT_STEP, corrected=False)
    return [
        discrete("Gibbs-with-gradients", gibbs_with_gradients, gibbs_with_gradients.GibbsWithGradientsConfig(beta)),
        discrete("discrete Langevin", discrete_langevin, discrete_langevin.DiscreteLangevinConfig(beta, DLP_STEP)),
        on_logits("Langevin on logits", corrected, settings.run_steps),
        on_logits("Langevin on logits + independence", corrected, MIXED_RUN, rollouts=True),
        on_logits("Langevin on logits, uncorrected", plain, SHORT_RUN),
    ]


def _mask(tokens: Tensor) -> Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


def _policy_samples(landscape: Landscape, count: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(landscape.logps.exp(), count, replacement=True, generator=generator)


def _run(
    landscape: Landscape, beta: float, seed: int, chains: int, sampler: Sampler, curves: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """A sampler itself, many chains from samples of the policy; its last states are independent draws of its law."""
    space, target, name = landscape.space, landscape.tilted(beta), sampler.name
    generator = F.seeded_generator("run", name, seed, repr(beta))
    index = _policy_samples(landscape, chains, generator)
    state = sampler.init(space.tokens(index), generator)
    accepted, energies, spent = [], [], [1.0]
    bias, noise = _plug_in_bias(target, chains, generator)
    divergences = [_plug_in_kl(index, target) - bias]
    for step in range(sampler.steps):
        state, info = sampler.moves[step % len(sampler.moves)](state, generator)
        accepted.append(info.accepted)
        energies.append(info.energy[:256])
        spent.append(spent[-1] + float(info.evaluated.double().mean()))
        if sampler.kernel is None:
            divergences.append(_plug_in_kl(space.index(state.tokens), target) - bias)
    last = space.index(state.tokens)
    along = torch.stack(energies[len(energies) // 2 :], 1)
    drawn = empirical_law(last, space.size)
    result = {
        "chains": chains,
        "steps": sampler.steps,
        "evaluations": spent[-1],
        "tv": total_variation(drawn, target),
        "kl": _plug_in_kl(last, target) - bias,
        "iid_tv": expected_iid_tv(target, chains),
        "iid_tv_spread": iid_tv_spread(target, chains, generator),
        "acceptance": acceptance_rate(torch.stack(accepted)),
        "effective_samples_per_step": effective_sample_size(along) / along.numel(),
        "r_hat": r_hat(along) if along.shape[1] >= 4 else None,
    }
    if sampler.kernel is None:
        # an estimate is worth drawing until it is lost in its own noise
        lost = next((k for k, value in enumerate(divergences) if value < 3 * noise), len(divergences))
        curves[name] = curve("particles", spent[: max(lost, 1)], divergences[: max(lost, 1)])
        return result
    # against the chain's own exact law after as many steps, which is what the code must reproduce
    own = law_after(sampler.kernel, landscape.logps, sampler.steps)
    result["own_law_tv"] = total_variation(drawn, own)
    result["own_law_iid_tv"] = expected_iid_tv(own, chains)
    result["own_law_iid_tv_spread"] = iid_tv_spread(own, chains, generator)
    return result


def _measured_row(name: str, measured: dict[str, Any], length: int) -> dict[str, Any]:
    """The row of a sampler whose law is known from its runs alone."""
    spent = measured["evaluations"] if measured["tv"] <= TV_BOUND + measured["iid_tv"] else None
    return {
        "name": name,
        "law": "measured",
        "tv": measured["tv"],
        "steps_to_tv": None,
        "evaluations_to_tv": spent,
        "token_forwards_to_tv": None if spent is None else 4.0 * length * spent,
        "kl": measured["kl"],
        "measured": measured,
    }


def _plug_in_kl(index: Tensor, target: Law) -> float:
    """KL(law‖target) from independent draws: the plug-in estimate, too large by about `_plug_in_bias`."""
    return float(kl_divergence(empirical_law(index, len(target)), target))


def _plug_in_bias(target: Law, count: int, generator: torch.Generator, repeats: int = 32) -> tuple[float, float]:
    """What that estimate gives for draws of the target itself, where it should give 0: mean and spread."""
    drawn = torch.multinomial(target.exp(), count * repeats, replacement=True, generator=generator).view(repeats, -1)
    found = torch.tensor([_plug_in_kl(one, target) for one in drawn])
    return float(found.mean()), float(found.std())


def curve(side: str, spent: Sequence[float], kl: Sequence[float], most: int = 160) -> dict[str, Any]:
    """A curve with at most so many points, spaced evenly on a logarithmic axis."""
    count = len(spent)
    chosen = sorted({round(count ** (k / most)) - 1 for k in range(most + 1)} | {0, count - 1})
    return {
        "side": side,
        "evaluations": [spent[k] for k in chosen if k < count],
        "kl": [kl[k] for k in chosen if k < count],
    }
