"""The decoders' names and their options, as the command line has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nabla_rl.decoding.acceptance import Acceptance
from nabla_rl.decoding.beam import BeamStep, Score
from nabla_rl.decoding.best_of_n import Choice
from nabla_rl.decoding.edit_search import EditAcceptance, Proposals
from nabla_rl.decoding.mcts import Selection, TreeStep
from nabla_rl.dto import DTOConfig

DecoderName = Literal["greedy", "sample", "best_of_n", "self_consistency", "beam", "mcts", "edit_search", "nabla"]
NEED_REWARD = ("best_of_n", "beam", "mcts", "edit_search", "nabla")


@dataclass(frozen=True)
class BestOfNOptions:
    """Best-of-n."""

    n: int = 8
    """Completions drawn."""
    choose_by: Choice = "energy"
    """energy (lowest -r/β - log π), reward (highest), or weighted_vote (the answer with most σ(r))."""


@dataclass(frozen=True)
class SelfConsistencyOptions:
    """Self-consistency."""

    n: int = 8
    """Completions drawn."""


@dataclass(frozen=True)
class BeamOptions:
    """Beam search guided by the process reward."""

    width: int = 4
    """Beams kept, and completions at the end."""
    expand: int = 4
    """Candidates that each beam proposes."""
    step: BeamStep = "line"
    """line: sampled continuations up to a line break; token: the likeliest next tokens, for answers of one line."""
    step_tokens: int = 24
    """A line that is longer is cut here, and judged."""
    score: Score = "energy"
    """energy (-log π - V/β of what is written so far), or reward (the judge's value alone)."""


@dataclass(frozen=True)
class MCTSOptions:
    """Monte Carlo tree search with the reward at the leaves."""

    iterations: int = 16
    """Rollouts at most for each problem."""
    branching: int = 4
    """Rollouts drawn from a node before the search goes below it."""
    exploration: float = 1.0
    """How much seldom visited children are preferred; values lie in (0, 1)."""
    selection: Selection = "puct"
    """puct (the policy's probability of a step weighs its exploration), or uct (it does not)."""
    step: TreeStep = "line"
    """Where nodes are: after each line, each token, or each `step_tokens` tokens (segment)."""
    step_tokens: int = 24
    """Tokens of a segment; a line that is longer is cut here."""


ONE_STEP = DTOConfig(
    num_steps=1,
    step_size=0.3,
    final_step_size=0.03,
    schedule="constant",
    optimizer="sgd",
    weight_decay=0.0,
)
"""What configs/decode/default.yaml says and why; the published settings are DTOConfig's own defaults."""


@dataclass(frozen=True)
class EditOptions:
    """Edit search: change one token, roll the rest out afresh, keep what is better."""

    proposals: Proposals = "policy"
    """policy (the policy's own alternatives: the twin without a gradient), value (exact values of prefixes), gradient
    (first-order values), random, or random_gradient."""
    weight: float = 1.0
    """How far changes of the value are trusted: 1 for exact ones, less for a gradient that is not exact."""
    alternatives: int = 8
    """The policy's likeliest tokens that are considered at each position."""
    width: int = 1
    """Edits tried in one round, side by side."""
    max_rollouts: int = 16
    """Rollouts at most for each problem, the first one included."""
    min_entropy: float = 0.0
    """Positions with less entropy (nats) keep their token."""
    min_drop: float = 0.0
    """Positions that hold the first error with a smaller probability, as the judge sees it, keep their token."""
    min_score: float | None = None
    """Edits that promise less are not tried; null: every edit is."""
    acceptance: EditAcceptance = "energy"
    """The energy must fall: of the whole completion (energy), or of the tokens up to and including the edit
    (prefix)."""
    temperature: float = 0.0
    """Of edit search's rollouts, in place of sampling.temperature: each prefix is rolled out once."""
    starts: int = 1
    """Completions drawn before the first edit; the search begins from the one of lowest energy."""
    restarts: int = 0
    """How often at most a search that has converged begins anew, from fresh completions (`starts` of them)."""
    start_temperature: float = 1.0
    """Of the completions drawn for starts and restarts, but for the very first one."""
    stop_at: float | None = None
    """No further step once the judge gives the answer this probability of being right; null: no such stop."""
    edit_temperature: float = 0.0
    """Edits are drawn with probability ∝ exp(score / this); 0 takes the best ones."""


PREFIX_VALUES = EditOptions(proposals="value", min_drop=0.05, min_score=0.0, acceptance="prefix")
"""What configs/decode/default.yaml says and why."""


@dataclass(frozen=True)
class NablaOptions:
    """∇-Reasoner."""

    loop: Literal["edits", "published"] = "edits"
    """edits: of the whole completion, by the worth of prefixes (options edits.*); published: one token after the
    other, by DTO (the options below)."""
    edits: EditOptions = field(default_factory=lambda: PREFIX_VALUES)
    """Edits of the whole completion; see edit_search."""
    dto: DTOConfig = field(default_factory=lambda: ONE_STEP)
    """The optimisation of logits. Its beta is model.beta."""
    acceptance: Acceptance = "energy"
    """A proposal must lower the energy, raise the reward (as published), or pass a Metropolis test."""
    max_rollouts: int = 8
    """Rollouts at most for each problem, the first one included (N_max)."""
    sweeps: int = 8
    """Passes over the completion at most (published: 1), while rollouts are left."""
    min_entropy: float = 0.05
    """Positions with less entropy (nats) keep their token."""
    min_gradient_norm: float = 0.0
    """Positions with a smaller ‖∂L/∂y_i‖ keep their token; 0 switches the test off."""
    resample_temperature: float = 1.0
    """Divides the optimised logits when the new token is drawn; 0 takes the largest."""
    resample_top_p: float = 1.0
    """Nucleus of that draw."""
    support: int | None = None
    """Tokens of each position that are optimised; null: the whole vocabulary."""
