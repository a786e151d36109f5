"""DTO by itself: from a sample, a step is the step of `nabla_rl.dto`, and problems do not touch one another."""

from __future__ import annotations

from dataclasses import replace

from nabla_rl.decoding import Sample, Sampling
from nabla_rl.decoding.descent import Descent, cut_at_end
from nabla_rl.dto import DTOConfig
from tests import toys_hf as toys

GIVEN = {"beta": 0.2, "sampling": Sampling(1.0, max_new_tokens=8), "seed": 3}
DESCENT = Descent(DTOConfig(num_steps=6, step_size=1.0, final_step_size=1.0))


def answers(decoder, problems) -> list[tuple[int, ...]]:
    return [tuple(one.ids) for one in toys.decode(decoder, problems, **GIVEN)[0]]


def test_without_steps_it_is_a_sample_and_with_steps_tokens_move():
    problems = toys.problems(10)
    sampled = answers(Sample(), problems)
    still = answers(replace(DESCENT, config=DTOConfig(num_steps=0)), problems)
    assert still == sampled
    moved = answers(DESCENT, problems)
    assert moved != sampled
    ends = set(toys.policy().get_buffer("eos_ids").tolist())
    for after, before in zip(moved, sampled, strict=True):
        assert 1 <= len(after) <= len(before)
        assert not ends & set(after[:-1])


def test_a_batch_is_each_problem_alone_and_costs_gradients():
    problems = toys.problems(6)
    together = answers(DESCENT, problems)
    assert together == [answers(DESCENT, [problem])[0] for problem in problems]
    (_, ledger), (_, bare) = (toys.decode(decoder, problems, **GIVEN) for decoder in (DESCENT, Sample()))
    assert all(ledger.cost(k).flops > 2 * bare.cost(k).flops for k in range(6))


def test_a_completion_ends_at_its_first_end():
    assert cut_at_end([5, 2, 7, 2], {2}) == [5, 2] and cut_at_end([5, 6], {2}) == [5, 6]
