"""Masks and supports against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_rl.functional import (
    build_completion_mask,
    build_position_ids,
    build_support,
    last_valid_index,
    left_align_index,
)

MASKS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_completion_mask_keeps_the_first_end(ids: list[list[int]]) -> None:
    """A position counts if no end-of-sequence token comes before it; several ids may end a completion."""
    for ends in ([0], [0, 3]):
        expected = [[not any(token in ends for token in row[:i]) for i in range(5)] for row in ids]
        assert build_completion_mask(torch.tensor(ids), ends).tolist() == expected
    assert torch.equal(build_completion_mask(torch.tensor(ids), 0), build_completion_mask(torch.tensor(ids), [0]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(MASKS)
def test_left_alignment_is_a_stable_permutation(rows: list[list[bool]]) -> None:
    """Invalid slots come first, valid ones last, both in their old order; position ids then count the valid ones."""
    mask = torch.tensor(rows)
    expected = [[i for i in range(6) if not row[i]] + [i for i in range(6) if row[i]] for row in rows]
    index = left_align_index(mask)
    assert index.tolist() == expected
    positions = build_position_ids(mask)
    for row, position in zip(rows, positions.tolist(), strict=True):
        valid = [p for p, ok in zip(position, row, strict=True) if ok]
        assert valid == list(range(len(valid))) and min(position) >= 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(MASKS.filter(lambda rows: all(any(row) for row in rows)))
def test_last_valid_index(rows: list[list[bool]]) -> None:
    """The index found is that of the last True, whichever side the padding is on."""
    assert last_valid_index(torch.tensor(rows)).tolist() == [max(i for i in range(6) if row[i]) for row in rows]


def test_an_empty_row_has_no_last_index() -> None:
    """A row without a valid slot raises, since index -1 would read the last one."""
    with pytest.raises(ValueError, match="`mask` must have a True in every row"):
        last_valid_index(torch.tensor([[True, False], [False, False]]))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(0, 12))
def test_support_is_what_a_loop_would_choose(seed: int, k: int, extra_size: int) -> None:
    """Argmax, then extra tokens in order, then the likeliest, each once, until k: equal to a loop over positions."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 9, generator=generator)
    extra = torch.randint(9, (2, 3, extra_size), generator=generator)
    support = build_support(logits, k, extra)
    for b in range(2):
        for i in range(3):
            order = logits[b, i].argsort(descending=True).tolist()
            expected = list(dict.fromkeys([order[0], *extra[b, i].tolist(), *order]))[:k]
            assert support[b, i].tolist() == expected


def test_support_without_extra_is_topk() -> None:
    """Without extra tokens the support is the k likeliest, best first; k may be the whole vocabulary."""
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build_support(logits, 4), logits.topk(4).indices)
    assert torch.equal(build_support(logits, 9).sort(-1).values, torch.arange(9).expand(2, 3, 9))
    assert build_support(logits[:, :0], 4).shape == (2, 0, 4)


def test_support_errors() -> None:
    """A size outside 1..vocab and ids outside the vocabulary are refused with the figures."""
    logits = torch.zeros(1, 2, 4)
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"`k` must be from 1 to the size of the vocabulary \(4\), got {k}"):
            build_support(logits, k)
    with pytest.raises(ValueError, match="`extra` must hold token ids below 4, got -1 to 4"):
        build_support(logits, 2, extra=torch.tensor([[[0, 4], [-1, 0]]]))
