"""The controls of edit search answer as they did when they were options of it: recorded answers, bit for bit."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from nabla_rl.data.tiny import SORTING, generate
from nabla_rl.decoding import EditSearch, Sampling, Setting
from nabla_rl.ledger import Ledger
from nabla_rl.models.loading import load_policy
from nabla_rl.rewards.loading import load_reward
from nabla_rl.studies.controls import RandomEdits, ShuffledGradient

RECORDED = json.loads((Path(__file__).parent / "controls.json").read_text(encoding="utf-8"))
PROBLEMS = list(islice(generate(SORTING, "test", 0), 4))


@pytest.fixture(scope="module")
def models():
    policy = load_policy("sorting/tiny-student", device="cpu")
    return policy, load_reward("sorting/tiny-reward", taught="sorting/tiny-taught", device="cpu")


def setting(models) -> Setting:
    return Setting(*models, Ledger(len(PROBLEMS)), sampling=Sampling(0.8, 1.0, 20))


@pytest.mark.parametrize("control", [RandomEdits, ShuffledGradient])
def test_answers_are_the_recorded_ones(models, control):
    given = setting(models)
    answers = control(max_rollouts=8, min_drop=0.05, acceptance="prefix").decode(PROBLEMS, given)
    for account, (answer, before) in enumerate(zip(answers, RECORDED[control.name], strict=True)):
        assert (answer.problem_id, answer.text) == (before["id"], before["text"])
        assert (answer.logps, answer.reward) == (before["logps"], before["reward"])
        assert [candidate.text for candidate in answer.rollouts] == before["rollouts"]
        edits = [[e.position, e.old_token, e.new_token, e.score, e.accepted] for e in answer.trace]
        assert edits == before["edits"]
        assert {name: answer.counts[name] for name in before["counts"]} == before["counts"]
        assert given.ledger.cost(account).flops == before["flops"]


def test_random_edits_ask_for_no_values(models):
    given = setting(models)
    RandomEdits(max_rollouts=4).decode(PROBLEMS, given)
    assert "probe" not in {row["phase"] for k in range(len(PROBLEMS)) for row in given.ledger.table(k)}


def test_shuffling_keeps_the_sizes_of_the_changes():
    changes = torch.arange(12.0).view(3, 4)

    class One:
        class problem:
            id = "p"

        tried = ()

    found = ShuffledGradient()._found(changes, One, type("S", (), {"seed": 0}))  # pyright: ignore
    assert not torch.equal(found, changes)
    torch.testing.assert_close(found.sort(-1).values, changes)


@pytest.mark.parametrize("control", [RandomEdits, ShuffledGradient])
def test_a_control_depends_on_the_seed_whatever_the_temperature(control):
    assert EditSearch().is_deterministic(Sampling()) and not control().is_deterministic(Sampling(temperature=0.0))
