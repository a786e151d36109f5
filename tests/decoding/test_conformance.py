"""What every decoder owes its caller, whichever it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nabla_rl.budget import Budget
from nabla_rl.decoding import DECODERS, AbstractDecoder, BeamSearch, Sampling
from tests import toys_hf as toys

SAMPLING = Sampling(max_new_tokens=8)
every = pytest.mark.parametrize("name", sorted(DECODERS))


def run(name: str, asked, **given):
    return toys.decode(DECODERS[name](), asked, **{"sampling": SAMPLING, "seed": 3, **given})


def told(answer) -> tuple:
    return answer.text, tuple(answer.ids), len(answer.rollouts), answer.proposals, answer.accepted


@every
def test_a_decoder_is_a_frozen_dataclass_whose_fields_are_options_with_defaults(name):
    kind = DECODERS[name]
    assert issubclass(kind, AbstractDecoder) and kind.name == name and kind.__doc__
    assert kind.__dataclass_params__.frozen
    assert kind() == kind()
    shared = {"policy", "reward", "beta", "sampling", "seed", "budget", "ledger"}
    assert not shared & {field.name for field in dataclasses.fields(kind)}


@every
def test_there_is_one_answer_for_each_problem_in_order(name):
    asked = toys.problems(4)
    answers, _ = run(name, asked)
    assert [one.problem_id for one in answers] == [problem.id for problem in asked]
    for one in answers:
        assert len(one.ids) <= SAMPLING.max_new_tokens
        assert one.rollouts and all(len(rollout.ids) <= SAMPLING.max_new_tokens for rollout in one.rollouts)


@every
def test_the_seed_decides_whatever_the_batch_and_the_order(name):
    asked = toys.problems(4)
    together = {one.problem_id: told(one) for one in run(name, asked)[0]}
    backwards = {one.problem_id: told(one) for one in run(name, asked[::-1])[0]}
    alone = {problem.id: told(run(name, [problem])[0][0]) for problem in asked}
    assert together == backwards == alone


@every
def test_the_likelihood_of_an_answer_is_what_the_policy_gives_it(name):
    policy, _ = toys.models()
    asked = toys.problems(3)
    for one, problem in zip(run(name, asked)[0], asked, strict=True):
        if not one.ids:
            continue
        prompt = policy.encode_prompt(problem.problem)
        expected = toys.reference_logps(policy.backbone.model, prompt, list(one.ids)).sum()
        assert one.logps == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


@every
def test_every_problem_pays_for_itself(name):
    asked = toys.problems(3)
    _, together = run(name, asked)
    for index, problem in enumerate(asked):
        _, alone = run(name, [problem])
        ours, theirs = together.cost(index), alone.cost(0)
        assert ours.calls == theirs.calls > 0 and ours.tokens == theirs.tokens
        assert ours.flops == pytest.approx(theirs.flops)


@every
def test_a_budget_of_one_rollout_ends_the_work_after_one_step(name):
    answers, _ = run(name, toys.problems(3), budget=Budget(rollouts=1))
    step = BeamSearch().width if name == "beam" else 1  # its beams end together
    assert all(len(one.rollouts) <= step for one in answers)


@every
def test_no_global_random_number_is_drawn(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(name, toys.problems(2))
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_the_models_are_left_as_they_were(name):
    policy, reward = toys.models()
    models = policy.backbone.model, reward.backbone.model
    before = [parameter.clone() for model in models for parameter in model.parameters()]
    run(name, toys.problems(2))
    after = [parameter for model in models for parameter in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
