"""The steps of a completion: where a search judges it, and where it branches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=8)
def line_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens whose text has a line break in it."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return frozenset(index for index, text in enumerate(texts) if "\n" in text)


def cut_steps(ids: Sequence[int], ends: Collection[int], most: int) -> list[tuple[int, ...]]:
    """Cut a completion after each token of `ends`, and wherever a step has `most` tokens.

    Example:
        >>> cut_steps([5, 6, 9, 5, 5, 5, 9], {9}, 3)
        [(5, 6, 9), (5, 5, 5), (9,)]
    """
    steps, start = [], 0
    for index, token in enumerate(ids, start=1):
        if token in ends or index - start == most or index == len(ids):
            steps.append(tuple(ids[start:index]))
            start = index
    return steps
