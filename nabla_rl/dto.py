r"""Differentiable Textual Optimization: gradient descent on the logits of a completion.

It solves :math:`\min_z L(y(z))`, where :math:`y(z)` relaxes the argmax of the logits :math:`z` and
:math:`L(y) = -r(x, y) / \beta - \log \pi(y \mid x)` for a frozen policy :math:`\pi` and a reward :math:`r`. A step is

.. math:: g = \partial L / \partial y, \quad d = p \odot (g - p^\top g) / \tau, \quad z \leftarrow \mathrm{AdamW}(z, d)

with :math:`p = \mathrm{softmax}(z / \tau)`. Hard relaxations keep :math:`y`, hence :math:`g`, until an argmax flips:
then and only then the models are called (gradient caching, exact). Padded positions and frozen rows (converged, or
with a non-finite gradient) never move. ``step(state, ...)`` returns ``(state, info)``; :func:`run` loops over it.

References: https://arxiv.org/abs/2603.04948, Eq. 2 and 25, Algorithms 2 and 4, Table 4 (defaults).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nabla_rl import functional as F
from nabla_rl.types import LogProbsFn, Outcome, RewardFn, UserError

CHUNK_CPU, CHUNK = 2**18, 2**25
"""Logits that are updated at once, on a CPU (so that they stay in its cache) and elsewhere (few enough to be little
beside the rest, enough to keep a GPU busy)."""


@dataclass(frozen=True)
class DTOConfig:
    """Settings of the optimisation. Defaults are the published ones unless said otherwise."""

    num_steps: int = 20
    """Updates of the logits (T)."""
    step_size: float = 0.01
    """Step size of the first update (η)."""
    final_step_size: float = 0.001
    """Step size of the last update, where the cosine ends."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule of the step size; the cosine is torch's CosineAnnealingLR."""
    optimizer: Literal["adamw", "sgd", "exponentiated"] = "adamw"
    """Update rule: AdamW, plain gradient descent, or exponentiated gradient (descent by ∂L/∂y)."""
    trust_region: float | None = None
    """KL in nats by which an update changes each position, in place of a step size; null is off."""
    weight_decay: float = 0.01
    """Decoupled decay of the logits; the weight of the entropy for exponentiated gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """Term added to AdamW's denominator."""
    tau: float = 1.0
    """Temperature of the relaxation (τ)."""
    relaxation: Literal["straight_through", "gumbel_softmax", "softmax"] = "straight_through"
    """Relaxation of the tokens: the argmax, the argmax of noisy logits, or the mean."""
    beta: float = 1.0
    """KL coefficient β = 1/λ; infinity leaves the reward out."""
    prefix: bool = True
    """Use of δ_prefix in the gradient, the likelihood of a token after its prefix."""
    postfix: bool = True
    """Use of δ_postfix in the gradient, the effect of a token on later ones."""
    reward: bool = True
    """Use of λ δ_reward in the gradient; the energy has the reward in any case."""
    caching: bool | None = None
    """Reuse of gradients until an argmax flips; null is wherever that is exact."""
    tolerance: float = 0.0
    """Largest change of a logit at which a row has converged; 0 switches the test off."""

    def __post_init__(self) -> None:
        """Check every value by itself, then together."""
        _require(self.num_steps >= 0, "num_steps", "at least 0", self.num_steps)
        for name in ("step_size", "final_step_size", "weight_decay", "tolerance"):
            _require(0 <= self.__dict__[name] < math.inf, name, "at least 0 and finite", self.__dict__[name])
        for name in ("eps", "tau"):
            _require(0 < self.__dict__[name] < math.inf, name, "positive and finite", self.__dict__[name])
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two in [0, 1)", self.betas)
        _require(self.beta > 0, "beta", "positive (inf leaves the reward out)", self.beta)
        for name, known in (("schedule", F.SCHEDULES), ("optimizer", F.UPDATE_RULES), ("relaxation", F.RELAXATIONS)):
            _require(self.__dict__[name] in known, name, f"one of {', '.join(known)}", self.__dict__[name])
        region, moments = self.trust_region, F.UPDATE_RULES[self.optimizer].moments
        _require(region is None or 0 <= region < math.inf, "trust_region", "at least 0 and finite, or None", region)
        _require(region is None or not moments, "trust_region", "None with optimizer='adamw'. Use 'sgd'", region)
        exact = "None or False with relaxation='softmax', where tokens change at every step"
        _require(self.cacheable or not self.caching, "caching", exact, self.caching)

    @property
    def cacheable(self) -> bool:
        """Whether the relaxed tokens are constant between flips, so that a cached gradient is exact."""
        return F.RELAXATIONS[self.relaxation].hard

    def step_size_at(self, step: int) -> float:
        """Step size of update number `step`, from 0."""
        end = min(self.step_size, self.final_step_size)
        return F.SCHEDULES[self.schedule](self.step_size, end, step / max(self.num_steps, 1))


class DTOState(NamedTuple):
    """What the next step needs. Energy, reward, logps and gradient are those of the last evaluation of each row."""

    logits: Float[Tensor, "batch length support"]
    mask: Bool[Tensor, "batch length"]
    noise: Float[Tensor, "batch length support"] | None
    first_moment: Float[Tensor, "batch length support"] | None
    second_moment: Float[Tensor, "batch length support"] | None
    gradient: Float[Tensor, "batch length support"]  # ∂L/∂y where last evaluated, 0 at padding
    tokens: Int[Tensor, "batch length"]  # argmax of logits plus noise: indices into the support
    stale: Bool[Tensor, " batch"]  # the relaxed tokens have changed since the last evaluation
    energy: Float[Tensor, " batch"]
    reward: Float[Tensor, " batch"]
    logps: Float[Tensor, " batch"]
    finite: Bool[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]
    step: int = 0


class DTOInfo(NamedTuple):
    """What happened in a step; values are at the tokens before the update. `run` stacks them on a new first axis."""

    energy: Tensor  # (batch,) of the relaxed tokens; hard relaxations: of the tokens. NaN if the row has no position
    reward: Tensor  # (batch,) 0 without a reward
    logps: Tensor  # (batch,) log π(y|x)
    gradient_norm: Tensor  # (batch, length) ‖∂L/∂y_i‖ over the support, before the relaxation; 0 at padding
    flips: Tensor  # (batch,) positions whose argmax this update changed
    evaluated: Tensor  # (batch,) whether the models were called for the row; if not, the cache served
    finite: Tensor  # (batch,) False once the gradient or energy was not finite: the row is frozen from then on


class DTOOutput(NamedTuple):
    """Result of `run`. Tokens are indices into the support; energies of rows never evaluated are NaN.

    Outcomes: NON_FINITE_GRADIENT; CONVERGED (within `tolerance`, or no position to move); NO_IMPROVEMENT (nothing seen
    had a lower energy than the start); else MAX_STEPS.
    """

    logits: Float[Tensor, "batch length support"]
    tokens: Int[Tensor, "batch length"]  # of the last logits
    energy: Float[Tensor, " batch"]  # of `tokens`
    best_tokens: Int[Tensor, "batch length"]  # of lowest energy among all seen: the start if nothing was better
    best_energy: Float[Tensor, " batch"]
    infos: DTOInfo | None  # one entry per step, stacked: (steps, batch) and (steps, batch, length)
    evaluations: Int[Tensor, " batch"]  # gradient evaluations (forward and backward) of each row
    scored: Bool[Tensor, " batch"]  # rows with one more forward at the end, as the last update changed their tokens
    steps: int
    outcomes: tuple[Outcome, ...]


@torch.inference_mode(False)
@torch.no_grad()
def init(
    logits: Float[Tensor, "batch length support"],
    mask: Bool[Tensor, "batch length"],
    config: DTOConfig,
    generator: torch.Generator | None = None,
) -> DTOState:
    """The state before the first step: float32 copies (float64 stays), since steps of 0.01 vanish in bfloat16.

    Gumbel noise is drawn from `generator` for the whole batch. To make rows independent of their batch, replace
    `state.noise`, and `state.tokens` by the argmax of logits plus noise.
    """
    described = f"{tuple(logits.shape)} of {logits.dtype}, mask {tuple(mask.shape)} of {mask.dtype}"
    shaped = logits.dim() == 3 and logits.shape[2] > 0 and logits.is_floating_point()
    _require(shaped, "logits", "floating, of shape (batch, length, support)", described)
    _require(mask.shape == logits.shape[:2] and mask.dtype == torch.bool, "mask", "bool, (batch, length)", described)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    mask, unknown = mask.clone(), logits.new_full((len(logits),), math.nan)
    noise = _draw_noise(logits, generator) if F.RELAXATIONS[config.relaxation].noisy else None
    has_moments = F.UPDATE_RULES[config.optimizer].moments
    moments = [torch.zeros_like(logits) if has_moments else None for _ in range(2)]
    gradient, tokens, movable = torch.zeros_like(logits), F.argmax(_perturb(logits, noise)), mask.any(dim=1)
    optimised = (logits, mask, noise, moments[0], moments[1])
    return DTOState(
        *optimised, gradient, tokens, movable, unknown, unknown, unknown, torch.ones_like(movable), ~movable
    )


@torch.inference_mode(False)
@torch.no_grad()
def step(
    state: DTOState,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: DTOConfig,
    *,
    donate: bool = False,
) -> tuple[DTOState, DTOInfo]:
    """One update of the logits, at the price of a forward and backward of both models for the rows that need it.

    `donate=True` reuses the big tensors of `state`, which must not be used again.
    """
    evaluated = state.finite & ~state.converged
    if config.cacheable and config.caching is not False:
        evaluated = evaluated & state.stale
    if bool(evaluated.any()):
        state = _evaluate(state, evaluated, log_probs_fn, reward_fn, config)
    norm = state.gradient.norm(dim=-1)
    # A finite gradient leaves the relaxation finite if the softmax is, and that is where the largest logit is.
    index = state.tokens[..., None]
    highest = _perturb(state.logits.gather(-1, index), None if state.noise is None else state.noise.gather(-1, index))
    usable = norm.isfinite() & (highest / config.tau).isfinite().squeeze(-1)
    wrong = (~usable & state.mask).any(dim=1) | ~state.energy.isfinite()
    finite = state.finite & (state.converged | ~wrong)
    moving = finite & ~state.converged
    active = state.mask & moving[:, None]
    logits = _own(state.logits, donate)
    moments = [None if x is None else _own(x, donate) for x in (state.first_moment, state.second_moment)]
    tokens, moved = _descend(state, logits, moments, active, config)
    converged = state.converged
    if config.tolerance > 0:
        converged = converged | (moving & ~moved.any(dim=1))
    flips = ((tokens != state.tokens) & active).sum(dim=1)
    info = DTOInfo(state.energy, state.reward, state.logps, norm, flips, evaluated, finite)
    stale = (state.stale & ~evaluated) | (flips > 0 if config.cacheable else moving)
    kept = state._replace(logits=logits, first_moment=moments[0], second_moment=moments[1])
    return kept._replace(tokens=tokens, stale=stale, finite=finite, converged=converged, step=state.step + 1), info


@torch.inference_mode(False)
@torch.no_grad()
def run(
    logits: Float[Tensor, "batch length support"],
    mask: Bool[Tensor, "batch length"],
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: DTOConfig,
    generator: torch.Generator | None = None,
) -> DTOOutput:
    """Optimise `config.num_steps` steps, or until every row is frozen, and keep the best tokens seen."""
    state = init(logits, mask, config, generator)
    best_tokens, best_energy = state.tokens, torch.full_like(state.energy, math.inf)
    infos: list[DTOInfo] = []

    def keep_best(tokens: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        better = energy < best_energy
        return torch.where(better[:, None], tokens, best_tokens), torch.where(better, energy, best_energy)

    while state.step < config.num_steps and bool((state.finite & ~state.converged).any()):
        tokens = state.tokens
        state, info = step(state, log_probs_fn, reward_fn, config, donate=True)
        infos.append(info)
        best_tokens, best_energy = keep_best(tokens, info.energy)
    scored = state.stale & state.finite if infos else torch.zeros_like(state.stale)
    if bool(scored.any()):
        state = _evaluate(state, scored, log_probs_fn, reward_fn, config, record=False)
        best_tokens, best_energy = keep_best(state.tokens, state.energy)
    improved = best_energy < infos[0].energy if infos else torch.zeros_like(scored)
    outcomes = tuple(map(_outcome, state.finite.tolist(), state.converged.tolist(), improved.tolist()))
    best_energy = best_energy.masked_fill(best_energy == math.inf, math.nan)
    stacked = DTOInfo(*map(torch.stack, zip(*infos, strict=True))) if infos else None
    evaluations = stacked.evaluated.sum(dim=0) if stacked else torch.zeros_like(state.stale, dtype=torch.long)
    last, best = (state.logits, state.tokens, state.energy), (best_tokens, best_energy)
    return DTOOutput(*last, *best, stacked, evaluations, scored, state.step, outcomes)


def _descend(
    state: DTOState,
    logits: Tensor,
    moments: list[Tensor | None],
    active: Tensor,
    config: DTOConfig,
) -> tuple[Tensor, Tensor]:
    """Update logits and moments in place, a few positions at a time so that they stay in the processor's cache.

    Returns the new argmax (under `noise`) and whether a logit of the position moved as much as the tolerance.
    """
    size, tokens, moved = config.step_size_at(state.step), state.tokens.clone(), torch.zeros_like(active)
    rule = F.UPDATE_RULES[config.optimizer]
    decay = 0.0 if config.trust_region is not None else size * config.weight_decay
    settings = {"step_size": size, "weight_decay": config.weight_decay, "betas": config.betas, "eps": config.eps}
    big = [None if x is None else x.flatten(0, 1) for x in (logits, *moments, state.gradient, state.noise)]
    tokens_flat, moved_flat, places = tokens.flatten(), moved.flatten(), active.flatten().nonzero().squeeze(1)
    every, width = len(places) == active.numel(), logits.shape[-1]
    count = max(1, (CHUNK_CPU if logits.device.type == "cpu" else CHUNK) // width)
    space = [logits.new_empty(min(count, len(places)), width) for _ in range(2)]
    for start in range(0, len(places), count):
        here = slice(start, start + count) if every else places[start : start + count]
        z, first, second, gradient, noise = (None if x is None else x[here] for x in big)
        assert z is not None and gradient is not None
        before = z.clone() if config.tolerance > 0 else z
        if not rule.natural:
            gradient = F.straight_through_vjp(
                _perturb(z, noise), gradient, config.tau, likeliest=state.tokens.flatten()[here],
                out=(space[0][: len(z)], space[1][: len(z)]),
            )  # fmt: skip
        if config.trust_region is None:
            rule.update(z, gradient, first, second, step=state.step, **settings)
        else:
            F.trust_region_(z, gradient, trust_region=config.trust_region, weight_decay=config.weight_decay)
        if not every:  # then these are copies
            for whole, part in zip(big[:3], (z, first, second), strict=True):
                if whole is not None and part is not None:
                    whole[here] = part
        tokens_flat[here] = F.follow_argmax(_perturb(z, noise), tokens_flat[here])
        if config.tolerance > 0:
            moved_flat[here] = ((z - before * (1.0 - decay)).abs() >= config.tolerance).any(-1)
    return tokens, moved


def _evaluate(
    state: DTOState,
    wanted: Tensor,
    log_probs_fn: LogProbsFn,
    reward_fn: RewardFn | None,
    config: DTOConfig,
    record: bool = True,
) -> DTOState:
    """The state with energies, and if `record` gradients, of the wanted rows."""
    rows, old = wanted.nonzero().squeeze(1), state._asdict()
    relaxation, logits, tokens = F.RELAXATIONS[config.relaxation], _take(state.logits, rows), None
    if relaxation.hard:
        tokens = _take(state.tokens, rows)
        probs = F.one_hot(tokens, logits)
    else:
        noise = None if state.noise is None else _take(state.noise, rows)
        probs = relaxation.forward(_perturb(logits, noise), config.tau)
    pieces = {
        "prefix": config.prefix,
        "postfix": config.postfix,
        "reward": config.reward,
        "record": record,
        "tokens": tokens,
    }
    new = F.energy_gradient(probs, _take(state.mask, rows), rows, log_probs_fn, reward_fn, beta=config.beta, **pieces)
    new = {name: value.to(state.logits.dtype) for name, value in new._asdict().items() if value is not None}
    every = len(rows) == len(wanted)
    return state._replace(**{name: v if every else old[name].index_copy(0, rows, v) for name, v in new.items()})


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _own(tensor: Tensor, donated: bool) -> Tensor:
    """A contiguous tensor that may be overwritten: a copy, unless the original is given away."""
    return tensor.contiguous() if donated else tensor.clone(memory_format=torch.contiguous_format)


def _perturb(logits: Tensor, noise: Tensor | None) -> Tensor:
    return logits if noise is None else logits + noise


def _draw_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    return F.sample_gumbel(logits.shape, generator, logits.device, logits.dtype)


def _outcome(finite: bool, converged: bool, improved: bool) -> Outcome:
    stopped = Outcome.CONVERGED if finite else Outcome.NON_FINITE_GRADIENT
    return stopped if converged or not finite else Outcome.MAX_STEPS if improved else Outcome.NO_IMPROVEMENT


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise UserError(name, expected, str(found))
