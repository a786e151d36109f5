"""Sequences, their numbers, and tables over their prefixes."""

from __future__ import annotations

import itertools

import pytest
import torch

from nabla_rl.duality.space import Space, TabularPolicy, conditionals
from nabla_rl.types import UserError


def random_law(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator).log_softmax(0)


def test_numbers_are_those_of_the_lexicographic_order():
    space = Space(3, 4)
    assert space.tokens().tolist() == [list(tokens) for tokens in itertools.product(range(3), repeat=4)]
    assert torch.equal(space.index(space.tokens()), torch.arange(81))


def test_substitutions_change_exactly_one_token():
    space = Space(3, 4)
    index = torch.tensor([0, 17, 80])
    found = space.tokens(space.substitutions(index))
    for row, tokens in enumerate(space.tokens(index)):
        for position, token in itertools.product(range(4), range(3)):
            expected = tokens.clone()
            expected[position] = token
            assert torch.equal(found[row, position, token], expected)


def test_a_million_sequences_are_allowed_and_more_are_not():
    assert Space(10, 6).size == 1_000_000
    with pytest.raises(UserError, match="at most 1,000,000 sequences, found 2 .. 20"):
        Space(2, 20)
    with pytest.raises(UserError, match="at least 2 and 1"):
        Space(1, 3)


def test_conditionals_multiply_to_the_law_and_are_normalised():
    space, law = Space(3, 4), random_law(81)
    tables = conditionals(law, space)
    assert [tuple(table.shape) for table in tables] == [(1, 3), (3, 3), (9, 3), (27, 3)]
    for table in tables:
        torch.testing.assert_close(table.logsumexp(-1), torch.zeros(len(table), dtype=torch.float64))
    torch.testing.assert_close(TabularPolicy(tables)(), law)


def test_conditionals_of_a_law_with_zeros_stay_finite_after_impossible_prefixes():
    law = torch.full((9,), -torch.inf, dtype=torch.float64)
    law[4] = 0.0
    first, second = conditionals(law, Space(3, 2))
    assert first.exp().tolist() == [[0.0, 1.0, 0.0]]
    torch.testing.assert_close(second[0].exp(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_policy_scores_single_sequences_as_it_scores_all():
    space, law = Space(3, 4), random_law(81)
    policy = TabularPolicy.from_logps(law, space)
    tokens = space.tokens(torch.tensor([3, 50, 80]))
    torch.testing.assert_close(policy.per_token_logps(tokens).sum(-1), law[[3, 50, 80]])


def test_policy_samples_its_law(generator):
    policy = TabularPolicy.from_logps(random_law(9), Space(3, 2))
    index = policy.space.index(policy.sample(50_000, generator))
    found = torch.bincount(index, minlength=9).double() / 50_000
    torch.testing.assert_close(found, policy().detach().exp(), atol=0.01, rtol=0)


def test_what_cannot_be_a_policy_is_refused():
    with pytest.raises(UserError, match="expected finite"):
        TabularPolicy.from_logps(torch.tensor([0.0, -torch.inf]), Space(2, 1))
    with pytest.raises(UserError, match=r"expected \(2, 2\) at position 1"):
        TabularPolicy([torch.zeros(1, 2), torch.zeros(4, 2)])
