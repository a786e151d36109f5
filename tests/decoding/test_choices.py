"""What a decoder picks among candidates, on hand-made ones."""

from __future__ import annotations

import math

import pytest

from nabla_rl.data.problems import extract_boxed
from nabla_rl.decoding import Candidate, Sampling
from nabla_rl.decoding.acceptance import RULES, Standing
from nabla_rl.decoding.best_of_n import CHOICES
from nabla_rl.decoding.nabla import Nabla
from nabla_rl.decoding.self_consistency import choose_by_majority
from nabla_rl.types import UserError


def candidate(answer: str | None, reward: float, logps: float) -> Candidate:
    return Candidate("no answer" if answer is None else f"\\boxed{{{answer}}}", (5,), logps, reward)


TRIED = [candidate("1", 2.0, -9.0), candidate("2", 1.0, -3.0), candidate("2", 0.5, -4.0), candidate(None, -1.0, -1.0)]


@pytest.mark.parametrize(
    ("choice", "beta", "expected"),
    [
        ("reward", 1.0, 0),
        ("energy", 1.0, 1),  # 7, 2, 3.5, 2: the first of equals
        ("energy", 0.1, 0),  # -11, -7, -1, 11
        ("energy", math.inf, 3),
        ("weighted_vote", 1.0, 1),  # σ(1) + σ(0.5) beats σ(2)
    ],
)
def test_best_of_n_choices(choice: str, beta: float, expected: int):
    """Reward, energy at several β, and the vote weighted by σ(r) choose what a calculation by hand chooses."""
    assert CHOICES[choice](TRIED, beta, extract_boxed) == expected


def test_a_weighted_vote_prefers_the_best_voter_and_ignores_no_answer():
    """The chosen candidate is its answer's best; candidates without an answer have no vote unless nobody has one."""
    silent = [candidate(None, 9.0, -1.0), candidate("3", -2.0, -1.0), candidate("3", -1.0, -1.0)]
    assert CHOICES["weighted_vote"](silent, 1.0, extract_boxed) == 2
    assert CHOICES["weighted_vote"]([candidate(None, r, 0.0) for r in (1.0, 3.0, 2.0)], 1.0, extract_boxed) == 1


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["1", "2", "2"], 1),
        (["1", "2", "2", "1"], 0),  # a tie goes to the answer seen first
        ([None, None, "7"], 2),  # no answer never wins a vote
        ([None, None], 0),
        (["4"], 0),
    ],
)
def test_the_majority_and_its_ties(answers: list[str | None], expected: int):
    """Self-consistency chooses the first candidate with the most frequent answer."""
    assert choose_by_majority([candidate(a, 0.0, 0.0) for a in answers], extract_boxed) == expected


def test_acceptance_by_energy_and_by_reward():
    """Both are strict: the energy must fall, the reward must rise, and neither looks at the other."""
    low, high = Standing(1.0, -5.0, 0.0), Standing(2.0, -4.0, 0.0)
    for uniform in (0.0, 0.99):
        assert RULES["energy"](high, low, uniform) and not RULES["energy"](low, high, uniform)
        assert RULES["reward"](low, high, uniform) and not RULES["reward"](high, low, uniform)
        assert not RULES["energy"](low, low, uniform) and not RULES["reward"](low, low, uniform)


@pytest.mark.parametrize(("fall", "proposal"), [(-1.0, 0.0), (-0.3, -0.5), (0.7, -2.0), (2.0, 1.0), (-900.0, 0.0)])
def test_metropolis_accepts_with_its_probability(fall: float, proposal: float):
    """A proposal is accepted below min(1, exp(-(E' - E)) q(y)/q(y')) and not above."""
    current, proposed = Standing(0.0, 1.0, proposal - 1.0), Standing(0.0, 1.0 - fall, -1.0)
    probability = min(1.0, math.exp(fall + proposal))
    assert RULES["metropolis"](current, proposed, probability * 0.999) == (probability > 0)
    assert RULES["metropolis"](current, proposed, min(probability * 1.001, 0.9999)) == (probability == 1.0)


def test_metropolis_never_accepts_what_is_not_a_number():
    """Energies of inf - inf are no reason to move."""
    assert not RULES["metropolis"](Standing(0.0, math.inf, 0.0), Standing(0.0, math.inf, 0.0), 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=-1.0), "sampling.temperature: expected at least 0"),
        (lambda: Sampling(top_p=0.0), r"sampling.top_p: expected a number in \(0, 1\]"),
        (lambda: Sampling(max_new_tokens=0), "sampling.max_new_tokens: expected at least 1"),
        (lambda: Nabla(max_rollouts=0), "nabla.max_rollouts: expected at least 1, found 0"),
        (lambda: Nabla(support=1), "nabla.support: expected at least 2 tokens"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message: str):
    """A setting out of range names itself, dotted as the Python API has it."""
    with pytest.raises(UserError, match=message):
        make()
