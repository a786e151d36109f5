"""The output laws of decoders on a listed space: what each of them samples, exactly, to be held against the tilted
policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nabla_rl import dto
from nabla_rl import functional as F
from nabla_rl.dto import DTOConfig, DTOState
from nabla_rl.duality.exact import Law
from nabla_rl.duality.landscape import Landscape
from nabla_rl.types import UserError


def best_of_n_law(logps: Law, scores: Float[Tensor, " size"], n: int) -> Law:
    r"""The law of the best of n independent samples, by order statistics.

    With :math:`F(s) = \pi(\text{score} \le s)` the best has score :math:`s` with probability
    :math:`F(s)^n - F(s^-)^n`, shared among the sequences of that score in proportion
    to :math:`\pi` (the first of equals is taken).

    Args:
        logps: The law that is sampled from.
        scores: What is maximised: the reward, or minus the energy.
        n: Samples.

    Returns:
        Log-probabilities, :math:`-\infty` where they underflow.
    """
    if n < 1:
        raise UserError("n", "at least 1", str(n))
    levels, group = scores.unique(sorted=True, return_inverse=True)
    probs = logps.exp()
    mass = torch.zeros(len(levels), dtype=torch.float64).scatter_add_(0, group, probs)
    upto = mass.cumsum(0) / mass.sum()
    # F(s)^n - F(s-)^n without cancellation: F(s)^n (1 - (F(s-) / F(s))^n)
    below = torch.cat([upto.new_zeros(1), upto[:-1]])
    log_best = n * upto.log() + torch.log(-torch.expm1(n * (below / upto).log()))
    return torch.log_softmax(log_best[group] + logps - mass[group].log(), dim=0)


def start_logits(landscape: Landscape, index: Tensor) -> Float[Tensor, "batch length vocab"]:
    """The policy's logits along sampled sequences, with each sampled token lifted just above its position's best: DTO
    starts at the sample."""
    logits = landscape.next_log_probs(index)
    tokens = landscape.space.tokens(index)[..., None]
    lifted = logits.amax(-1, keepdim=True) + 1e-5
    return torch.where(
        logits.argmax(-1, keepdim=True) == tokens, logits, logits.scatter(-1, tokens, lifted.expand_as(tokens))
    )


def dto_laws(landscape: Landscape, config: DTOConfig, start: Law | None = None) -> Iterator[tuple[float, Law]]:
    """The law of DTO's tokens after each step when it starts at a sample, and the gradients one sample needed so far.

    DTO without noise maps every start to one end, so its law is the policy's carried along that map: exact, from one
    run from each sequence.

    Args:
        landscape: policy and reward.
        config: the optimisation.
        start: the law of the starts; default: the policy.

    Yields:
        Gradients for each sample (mean under `start`), and the law; first of all 0 and the start.
    """
    space, start = landscape.space, landscape.logps if start is None else start
    every, weights = torch.arange(space.size), start.exp()
    mask = torch.ones(space.size, space.length, dtype=torch.bool)
    state, spent = dto.init(start_logits(landscape, every), mask, config), 0.0
    yield spent, _carried(landscape, state, weights)
    for _ in range(config.num_steps):
        state, info = dto.step(state, landscape.log_probs_fn, landscape.reward_fn, config, donate=True)
        spent += float(weights @ info.evaluated.double())
        yield spent, _carried(landscape, state, weights)


def _carried(landscape: Landscape, state: DTOState, weights: Tensor) -> Law:
    ends = landscape.space.index(state.tokens)
    return torch.zeros_like(weights).scatter_add_(0, ends, weights).log()


@dataclass(frozen=True)
class Loop:
    """∇-Reasoner's loop on a listed space: the settings of `decoding.nabla` that decide its law.

    Rollouts are drawn from the policy itself and are never used up, and no gradient threshold is applied.
    """

    dto: DTOConfig = field(default_factory=DTOConfig)
    """The optimisation; its `num_steps` of 0 is the loop without a gradient."""
    acceptance: Literal["energy", "reward", "metropolis"] = "energy"
    """What a proposal must pass."""
    sweeps: int = 1
    """Passes over the completion."""
    min_entropy: float = 0.0
    """Positions with no more entropy (nats) keep their token."""
    resample_temperature: float = 1.0
    """Divides the optimised logits when the new token is drawn."""
    resample_top_p: float = 1.0
    """Nucleus of that draw."""


def nabla_law(landscape: Landscape, loop: Loop, beta: float) -> Law:
    r"""The exact law of the loop's answer.

    At position :math:`i` the loop is a Markov kernel: from :math:`y` draw :math:`v \sim q(\cdot \mid y)`, the softmax
    of the optimised logits; if :math:`v \ne y_i`, draw a suffix from the policy; accept or stay. :math:`q` and the
    test depend on :math:`y` alone, so the law after all positions is a product of matrices that act within the groups
    of equal prefix.
    """
    space, probs = landscape.space, landscape.logps.exp()
    firsts = [_first_logits(landscape, loop.dto, beta, position) for position in range(space.length)]
    for _ in range(loop.sweeps):
        for position in range(space.length):
            probs = _visit(landscape, loop, beta, position, firsts[position], probs)
    return probs.log()


def _first_logits(landscape: Landscape, config: DTOConfig, beta: float, position: int) -> Tensor:
    """The optimised logits at `position` for every current completion, (size, vocab)."""
    space, config = landscape.space, replace(config, beta=beta)
    every, tokens = torch.arange(space.size), space.tokens()
    logits = landscape.next_log_probs(every)
    mask = (torch.arange(space.length) >= position).expand(space.size, -1)
    state = dto.init(logits, mask, config)
    # as the decoder does: an offset makes the sampled token the largest, the logits stay the policy's
    offset = torch.zeros_like(logits).scatter(-1, tokens[..., None], 1.0)
    lift = logits.amax(-1, keepdim=True) + 1e-5 - logits.gather(-1, tokens[..., None])
    lift = lift.masked_fill(logits.argmax(-1, keepdim=True) == tokens[..., None], 0.0)
    noise = (offset * lift).to(state.logits.dtype)
    state = state._replace(noise=noise, tokens=(state.logits + noise).argmax(-1))
    for _ in range(config.num_steps):
        state, _ = dto.step(state, landscape.log_probs_fn, landscape.reward_fn, config, donate=True)
    return state.logits[:, position]


def _visit(landscape: Landscape, loop: Loop, beta: float, position: int, first: Tensor, probs: Tensor) -> Tensor:
    """The law after the loop has visited one position."""
    vocab, groups = landscape.space.vocab, landscape.space.vocab**position
    members = landscape.space.size // groups
    token = torch.arange(members) // (members // vocab)  # of a member, at this position
    joint = landscape.logps.view(groups, vocab, -1)
    suffix = (joint - joint.logsumexp(-1, keepdim=True)).view(groups, 1, members)
    filtered = F.top_p_filter(first.double() / loop.resample_temperature, loop.resample_top_p)
    # [g, a, b]: from member a to member b of group g
    propose = filtered.log_softmax(-1).view(groups, members, vocab)[:, :, token] + suffix
    energy, reward = (x.view(groups, members) for x in (landscape.energy(beta), landscape.rewards))
    if loop.acceptance == "metropolis":
        current = propose.diagonal(dim1=1, dim2=2)[:, :, None]
        ratio = energy[:, :, None] - energy[:, None] + current - propose
        accept = ratio.clamp(max=0.0).nan_to_num(nan=-torch.inf).exp()
    else:
        values = energy if loop.acceptance == "energy" else -reward
        accept = (values[:, None] < values[:, :, None]).double()
    entropies = F.compute_entropy(landscape.conditionals[position])
    moves = propose.exp() * accept * (token[:, None] != token[None])
    moves = moves * (entropies > loop.min_entropy)[:, None, None]
    here = probs.view(groups, members)
    stays = here * (1.0 - moves.sum(-1)).clamp(min=0.0)
    return (stays + torch.einsum("ga,gab->gb", here, moves)).flatten()
