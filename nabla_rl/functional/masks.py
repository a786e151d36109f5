"""Which positions of a padded batch count, and where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def build_completion_mask(
    completion_ids: Int[Tensor, "*batch length"], eos_token_ids: int | Sequence[int]
) -> Bool[Tensor, "*batch length"]:
    """True up to and including the first end-of-sequence token, False after it; all True in a row without one.

    Args:
        completion_ids: Token ids, shape ``(*batch, length)``.
        eos_token_ids: The id, or ids, that end a completion.

    Returns:
        The mask, same shape.

    Example:
        >>> build_completion_mask(torch.tensor([[5, 2, 7, 2]]), 2)
        tensor([[ True,  True, False, False]])
    """
    ends = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
    is_eos = torch.isin(completion_ids, torch.tensor(ends, dtype=completion_ids.dtype, device=completion_ids.device))
    return (is_eos.long().cumsum(dim=-1) - is_eos.long()) == 0  # no end before this position


def last_valid_index(mask: Bool[Tensor, "*batch length"]) -> Int[Tensor, "*batch"]:
    """Index of the last True of each row, wherever the padding stands.

    Args:
        mask: Shape ``(*batch, length)``.

    Returns:
        Indices, int64, shape ``(*batch,)``.

    Raises:
        ValueError: If a row has no True: an index of -1 would silently read the last position.

    Example:
        >>> last_valid_index(torch.tensor([[True, True, False], [False, True, True]]))
        tensor([1, 2])
    """
    if not bool(mask.any(dim=-1).all()):
        raise ValueError("`mask` must have a True in every row, got a row without: it has no last token.")
    return mask.shape[-1] - 1 - mask.flip(-1).to(torch.uint8).argmax(dim=-1)


def left_align_index(mask: Bool[Tensor, "*batch length"]) -> Int[Tensor, "*batch length"]:
    """The permutation of each row that moves its invalid slots to the front and keeps the order otherwise.

    ``x.gather(-1, index)`` is then left-padded. Key-value caches are realigned with it after completions of different
    lengths have been appended to right-padded slots.

    Args:
        mask: True at the valid slots, shape ``(*batch, length)``.

    Returns:
        Indices, int64, same shape.

    Example:
        >>> left_align_index(torch.tensor([[True, False, True, False]]))
        tensor([[1, 3, 0, 2]])
    """
    return mask.to(torch.uint8).argsort(dim=-1, stable=True)


def build_position_ids(mask: Bool[Tensor, "*batch length"]) -> Int[Tensor, "*batch length"]:
    """Position of each valid token among the valid tokens of its row, from 0; padding before the first gets 0.

    Args:
        mask: True at the valid tokens, shape ``(*batch, length)``.

    Returns:
        Positions, int64, same shape.

    Example:
        >>> build_position_ids(torch.tensor([[False, True, True, True]]))
        tensor([[0, 0, 1, 2]])
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp_(min=0)
