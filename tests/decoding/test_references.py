"""Answers, counts and costs of every decoder are those of the code before its decoders were rebuilt.

`tests/invariant/references.json` was made at commit 206865d by the decoders as they were then, with the embedded
models on one CPU thread in float32: the first four validation problems of each family (problem seed 5), decoded with
seed 3 by every case below, each with the options that it had then. For each problem it holds the tokens of the answer,
the number of rollouts, proposals and accepted edits, log π, the reward, FLOPs and model calls.

Tokens, counts, FLOPs and calls are compared exactly, log π and rewards to 1e-5: another build of the same kernels may
round them otherwise.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nabla_rl.data.tiny import FAMILIES, generate
from nabla_rl.decoding import (
    MCTS,
    AbstractDecoder,
    BeamSearch,
    BestOfN,
    Budget,
    EditSearch,
    Greedy,
    Nabla,
    Sample,
    Sampling,
    SelfConsistency,
)
from nabla_rl.dto import DTOConfig
from nabla_rl.models.loading import load_policy
from nabla_rl.models.policy import Policy
from nabla_rl.rewards.base import AbstractReward
from nabla_rl.rewards.loading import load_reward
from tests import toys_hf as toys

pytestmark = pytest.mark.invariant

REFERENCES = json.loads((Path(__file__).parents[1] / "invariant" / "references.json").read_text())["results"]
TEMPERATURES = {"words": 0.8, "sorting": 1.0}
PUBLISHED = Nabla(
    DTOConfig(num_steps=20, step_size=0.01, final_step_size=0.001, caching=True), acceptance="reward", max_rollouts=8,
    sweeps=1, min_entropy=0.25, min_gradient_norm=8.0, resample_temperature=0.5, resample_top_p=0.95,
)  # fmt: skip
CASES: dict[str, tuple[AbstractDecoder, dict[str, Any]]] = {
    "greedy": (Greedy(), {}),
    "sample": (Sample(), {}),
    "best_of_n energy": (BestOfN(6, "energy"), {}),
    "best_of_n reward": (BestOfN(6, "reward"), {}),
    "best_of_n weighted_vote": (BestOfN(6, "weighted_vote"), {}),
    "self_consistency": (SelfConsistency(6), {}),
    "beam line": (BeamSearch(width=2, expand=3, step="line"), {}),
    "beam token": (BeamSearch(width=2, expand=3, step="token"), {}),
    "mcts": (MCTS(iterations=6, branching=2), {}),
    "edit_search value": (EditSearch(), {}),
    "edit_search gradient": (EditSearch(proposals="gradient"), {}),
    "edit_search policy": (EditSearch("policy", acceptance="energy", max_rollouts=6, min_drop=0.0), {}),
    "edit_search warm": (EditSearch(), {"beta": 0.5, "budget": Budget(rollouts=5)}),  # at the family's temperature
    "nabla": (Nabla(), {}),
    "nabla support": (Nabla(acceptance="metropolis", max_rollouts=4, sweeps=2, support=4), {}),
    "nabla published": (PUBLISHED, {"beta": 0.001, "sampling": Sampling(0.6, 0.95)}),
}


@cache
def models(family: str) -> tuple[Policy, AbstractReward]:
    policy = load_policy(f"{family}/tiny-policy", device="cpu")
    reward = load_reward(f"{family}/tiny-reward", taught=f"{family}/tiny-taught", device="cpu")
    assert reward is not None
    return policy, reward


def test_every_reference_has_its_case():
    assert set(REFERENCES) == {f"{family} {name}" for family in TEMPERATURES for name in CASES}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", TEMPERATURES)
def test_a_decoder_does_what_it_did(family: str, name: str):
    """The same tokens at the same cost, for each of four problems."""
    temperature, (decoder, given) = TEMPERATURES[family], CASES[name]
    if name == "edit_search warm":
        decoder = replace(decoder, temperature=temperature)
    problems = list(islice(generate(FAMILIES[family], "validation", 5), 4))
    setting = {"sampling": Sampling(temperature), "seed": 3, "extract": FAMILIES[family].extract, **given}
    results, ledger = toys.decode(decoder, problems, *models(family), **setting)
    for account, (found, expected) in enumerate(zip(results, REFERENCES[f"{family} {name}"], strict=True)):
        cost = ledger.cost(account)
        assert list(found.ids) == expected["ids"]
        assert (len(found.rollouts), found.proposals, found.accepted) == (
            expected["rollouts"], expected["proposals"], expected["accepted"],
        )  # fmt: skip
        assert (cost.flops, cost.calls) == (expected["flops"], expected["calls"])
        assert found.logps == pytest.approx(expected["logps"], rel=1e-5)
        assert found.reward == (None if expected["reward"] is None else pytest.approx(expected["reward"], rel=1e-5))
