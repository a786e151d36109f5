"""Landscapes: gradients of tables are true changes, networks' values are the networks', and DTO runs on both."""

from __future__ import annotations

import math

import pytest
import torch

from nabla_rl import functional as F
from nabla_rl.data.problems import Problem
from nabla_rl.duality.landscape import Landscape, random_landscape
from nabla_rl.duality.networks import completion_landscape, likely_tokens
from nabla_rl.duality.space import Space
from nabla_rl.ledger import Ledger
from nabla_rl.models.loading import RewardOptions, load_classifier, load_policy
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.types import UserError


def gradient(landscape: Landscape, index: torch.Tensor, beta: float) -> F.EnergyGradient:
    """What the algorithms see: energy and gradient through the callables."""
    tokens = landscape.space.tokens(index)
    probs = torch.nn.functional.one_hot(tokens, landscape.space.vocab).double()
    mask, rows = torch.ones_like(tokens).bool(), torch.arange(len(index))
    return F.energy_gradient(
        probs, mask, rows, landscape.log_probs_fn, landscape.reward_fn, beta=beta, tokens=tokens
    )  # fmt: skip


def test_the_gradient_of_a_table_is_the_change_of_every_substitution():
    landscape, beta = random_landscape(3, 4), 0.4
    index = torch.arange(81)
    seen, energy = gradient(landscape, index, beta), landscape.energy(beta)
    torch.testing.assert_close(seen.energy, energy, atol=1e-12, rtol=0)
    assert seen.gradient is not None
    current = landscape.space.tokens(index)[..., None]
    change = seen.gradient - seen.gradient.gather(-1, current)
    true = energy[landscape.space.substitutions(index)] - energy[:, None, None]
    torch.testing.assert_close(change, true, atol=1e-12, rtol=0)


def test_pieces_of_the_gradient_add_up():
    landscape, index = random_landscape(3, 3), torch.tensor([5, 20])
    tokens = landscape.space.tokens(index)
    probs, mask = torch.nn.functional.one_hot(tokens, 3).double(), torch.ones(2, 3, dtype=torch.bool)
    rows = torch.arange(2)

    def piece(**on: bool) -> torch.Tensor:
        switches = {"prefix": False, "postfix": False, "reward": False} | on
        found = F.energy_gradient(
            probs, mask, rows, landscape.log_probs_fn, landscape.reward_fn, beta=0.5, tokens=tokens, **switches
        ).gradient
        assert found is not None
        return found

    total = piece(prefix=True) + piece(postfix=True) + piece(reward=True)
    torch.testing.assert_close(total, gradient(landscape, index, 0.5).gradient, atol=1e-12, rtol=0)
    torch.testing.assert_close(piece(prefix=True), -landscape.next_log_probs(index), atol=1e-12, rtol=0)
    last = piece(postfix=True)[:, -1]  # nothing follows: the same for every token
    torch.testing.assert_close(last, last[:, :1].expand(2, 3), atol=1e-12, rtol=0)


def test_a_landscape_checks_what_it_is_given():
    space, law = Space(2, 2), torch.zeros(4, dtype=torch.float64).log_softmax(0)
    with pytest.raises(UserError, match="expected normalised"):
        Landscape(space, law + 1, torch.zeros(4, dtype=torch.float64))
    with pytest.raises(UserError, match="rewards: expected float64"):
        Landscape(space, law, torch.zeros(4))
    with pytest.raises(UserError, match="rewards: expected finite"):
        Landscape(space, law, torch.full((4,), math.nan, dtype=torch.float64))


@pytest.fixture(scope="module")
def networks():
    cpu = torch.device("cpu")
    policy = load_policy("sorting/tiny-policy", dtype="float64", device=cpu)
    model, tokenizer = load_classifier("sorting/tiny-reward", RewardOptions(dtype="float64"), device=cpu)
    return policy, SequenceClassifierReward(model, tokenizer)


def test_networks_are_listed_as_they_score(networks):
    """Every value against the network called plainly on prompt and tokens; the gradient against autograd of the
    soft energy."""
    policy, reward = networks
    problem, head, length = Problem("p", "ecbdafhg", "abcdefgh", "abcdefgh"), "abcdef", 2
    alphabet = likely_tokens(policy, problem, head, length, 3)
    landscape = completion_landscape(policy, reward, problem, head, alphabet, length)
    assert landscape.space == Space(3, 2)
    encode = policy.tokenizer
    prompt = policy.encode_prompt(problem.problem) + encode(head, add_special_tokens=False).input_ids
    end = policy.get_buffer("eos_ids")[:1]
    for number in (0, 4, 7):
        tokens = torch.tensor(alphabet)[landscape.space.tokens(torch.tensor(number))]
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        logits = policy.backbone.model(input_ids=ids).logits[0, len(prompt) - 1 : -1, alphabet]
        expected = logits.log_softmax(-1).gather(-1, landscape.space.tokens(torch.tensor(number))[:, None]).sum()
        torch.testing.assert_close(landscape.logps[number], expected, atol=1e-9, rtol=0)
        whole = torch.cat([torch.tensor(encode(head, add_special_tokens=False).input_ids), tokens, end])[None]
        prefix = reward.prefill([problem.problem], torch.zeros(1, dtype=torch.int64), Ledger(1))
        scored = reward.score(prefix, whole, torch.ones_like(whole).bool()).reward[0]
        torch.testing.assert_close(landscape.rewards[number], scored, atol=1e-9, rtol=0)
    # the last token has no successor: its gradient is the conditional law itself
    of_logps, _ = landscape.gradients(torch.arange(9))
    last = landscape.next_log_probs(torch.arange(9))[:, -1]
    torch.testing.assert_close(of_logps[:, -1], last, atol=1e-9, rtol=0)


def test_an_alphabet_with_the_end_in_it_is_refused(networks):
    policy, reward = networks
    problem = Problem("p", "cab", "abc", "abc")
    with pytest.raises(UserError, match="other than the end"):
        completion_landscape(policy, reward, problem, "", [int(policy.get_buffer("eos_ids")[0]), 5], 2)
