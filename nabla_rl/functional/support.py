"""Which tokens of a large vocabulary are worth optimising over at each position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def build_support(
    logits: Float[Tensor, "batch length vocab"], k: int, extra: Int[Tensor, "batch length extra"] | None = None
) -> Int[Tensor, "batch length {k}"]:
    """Choose ``k`` different tokens per position, so that what follows costs O(length * k) and not O(length * vocab).

    In order: the argmax of the logits, then the tokens of ``extra`` (those that a gradient likes best, say), then the
    tokens of the largest logits, each once, until there are ``k``. The argmax is always there, so the completion it
    stands for can be expressed. With more than ``k - 1`` new tokens in ``extra``, its first ones are kept.

    Args:
        logits: Shape ``(batch, length, vocab)``.
        k: Size of the support, from 1 to the size of the vocabulary.
        extra: Token ids that should be in, repeats allowed, shape ``(batch, length, extra)``.

    Returns:
        Token ids, int64, shape ``(batch, length, k)``, without repeats in a position; the argmax stands first.

    Raises:
        ValueError: If ``k`` is outside its range or ``extra`` holds an id outside the vocabulary.

    Example:
        >>> logits = torch.tensor([[[0.1, 0.4, 0.3, 0.2]]])
        >>> build_support(logits, 3)
        tensor([[[1, 2, 3]]])
        >>> build_support(logits, 3, extra=torch.tensor([[[0, 1]]]))
        tensor([[[1, 0, 2]]])
    """
    vocab = logits.shape[-1]
    if not 1 <= k <= vocab:
        raise ValueError(f"`k` must be from 1 to the size of the vocabulary ({vocab}), got {k}.")
    top = logits.topk(k, dim=-1).indices
    if extra is None or extra.shape[-1] == 0:
        return top
    if extra.numel() and not bool(((extra >= 0) & (extra < vocab)).all()):
        raise ValueError(f"`extra` must hold token ids below {vocab}, got {int(extra.min())} to {int(extra.max())}.")
    candidates = torch.cat([top[..., :1], extra.to(top), top[..., 1:]], dim=-1)
    # A stable sort puts equal ids side by side, earliest first: all but the first of each run are repeats.
    ids, order = candidates.sort(dim=-1, stable=True)
    repeat_sorted = torch.zeros_like(ids, dtype=torch.bool)
    repeat_sorted[..., 1:] = ids[..., 1:] == ids[..., :-1]
    repeat = torch.zeros_like(repeat_sorted).scatter_(-1, order, repeat_sorted)
    kept = repeat.to(torch.uint8).argsort(dim=-1, stable=True)[..., :k]  # at least k differ, since `top` does
    return candidates.gather(-1, kept)
