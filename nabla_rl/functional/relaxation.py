"""Relaxations of the argmax: points of the simplex that stand for tokens and still carry a gradient to the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def one_hot_argmax(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    r"""The vertex of the simplex that maximises a linear score: :math:`\arg\max_{y \in \Delta} y^\top z`.

    No gradient flows through it. Ties go to one of the maximal tokens, never to several.

    Args:
        logits: The scores :math:`z`, shape ``(*batch, vocab)``.

    Returns:
        One-hot vectors in the dtype of ``logits``.

    Example:
        >>> one_hot_argmax(torch.tensor([0.1, 2.0, -1.0]))
        tensor([0., 1., 0.])
    """
    return one_hot(argmax(logits), logits)


def argmax(logits: Float[Tensor, "*batch vocab"]) -> Int[Tensor, "*batch"]:
    """The index of the largest entry of each row, the first one of equals.

    It is torch's argmax, but by `max`, which on a CPU takes a fifth of the time.

    Args:
        logits: Shape ``(*batch, vocab)``.

    Returns:
        Indices, int64, shape ``(*batch,)``.

    Example:
        >>> argmax(torch.tensor([0.1, 2.0, 2.0]))
        tensor(1)
    """
    return logits.detach().max(dim=-1).indices


def follow_argmax(logits: Float[Tensor, "*batch vocab"], tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The argmax of each row, given what it was: the same token as long as no entry is larger.

    Only rows in which one is are searched, as comparing with the maximum takes a third of the time of finding it.

    Args:
        logits: Shape ``(*batch, vocab)``.
        tokens: The former argmax.

    Returns:
        Indices, int64, shape ``(*batch,)``.

    Example:
        >>> follow_argmax(torch.tensor([[0.1, 2.0, 2.0], [0.1, 2.0, 3.0]]), torch.tensor([2, 1]))
        tensor([2, 2])
    """
    stays = logits.amax(dim=-1) <= logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return tokens if bool(stays.all()) else torch.where(stays, tokens, argmax(logits))


def one_hot(index: Int[Tensor, "*batch"], like: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Vertices of the simplex, with the shape, dtype and device of ``like``.

    Args:
        index: Which vertices, shape ``(*batch,)``.
        like: Any tensor of the wanted shape.

    Returns:
        One-hot vectors.

    Example:
        >>> one_hot(torch.tensor(1), torch.empty(3))
        tensor([0., 1., 0.])
    """
    return torch.zeros_like(like, requires_grad=False).scatter_(-1, index.unsqueeze(-1), 1.0)


class SoftTokens(NamedTuple):
    """Relaxed tokens, as the policy and the reward are handed them.

    Example:
        >>> SoftTokens(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).hard()
        tensor([1, 0])
    """

    probs: Float[Tensor, "*batch vocab"]
    """Points of the simplex; gradients flow to them."""
    ids: Int[Tensor, "*batch"] | None = None
    """Indices into the last axis where ``probs`` is exactly one-hot: look-ups then take the place of products."""
    gradient_sum: Float[Tensor, "*batch vocab"] | None = None
    """A tensor that a backward pass may add the gradient of ``probs`` to, in place of returning it.

    A model that forms its gradient as a matrix product saves a pass over (length, vocabulary) by adding the product
    there; one that does not know of it returns its gradient as usual.
    """

    def hard(self) -> Int[Tensor, "*batch"]:
        """The indices of the largest entries, without a search where they are known."""
        return argmax(self.probs) if self.ids is None else self.ids


def soft(logits: Float[Tensor, "*batch vocab"], tau: float = 1.0) -> Float[Tensor, "*batch vocab"]:
    r"""The entropy-smoothed argmax: :math:`\arg\max_{y \in \Delta} y^\top z + \tau H(y) = \mathrm{softmax}(z / \tau)`.

    Args:
        logits: The scores :math:`z`, shape ``(*batch, vocab)``.
        tau: Relaxation temperature :math:`\tau`, positive. Towards 0 the result tends to the one-hot argmax.

    Returns:
        Points of the simplex, same shape and dtype.

    Example:
        >>> soft(torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.5000])
    """
    _check_tau(tau)
    return torch.softmax(logits if tau == 1.0 else logits / tau, dim=-1)


def straight_through(logits: Float[Tensor, "*batch vocab"], tau: float = 1.0) -> Float[Tensor, "*batch vocab"]:
    r"""A hard token forward, a soft one backward.

    .. math:: y = \mathrm{onehot}(\arg\max z) + p - \mathrm{sg}(p), \qquad p = \mathrm{softmax}(z / \tau)

    where :math:`z` is ``logits``, :math:`\tau` is ``tau`` and sg stops the gradient. The forward value is *exactly*
    one-hot, because :math:`p - \mathrm{sg}(p)` is formed first; the gradient is that of :func:`soft`, hence biased.

    Args:
        logits: Shape ``(*batch, vocab)``.
        tau: Temperature of the gradient, positive.

    Returns:
        One-hot vectors, differentiable in ``logits``.

    Example:
        >>> logits = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> y = straight_through(logits)
        >>> y.tolist()
        [0.0, 1.0]
        >>> y[1].backward()
        >>> logits.grad  # p_1 (e_1 - p)
        tensor([-0.1050,  0.1050])

    References:
        Bengio et al., 2013, https://arxiv.org/abs/1308.3432. For text: https://arxiv.org/abs/2603.04948, Sec. 3.
    """
    probs = soft(logits, tau)
    return one_hot_argmax(logits) + (probs - probs.detach())


def gumbel_softmax(
    logits: Float[Tensor, "*batch vocab"], tau: float, noise: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch vocab"]:
    r"""Straight-through Gumbel-softmax: an exact sample of :math:`\mathrm{softmax}(z)` forward, a soft one backward.

    :math:`y` is :func:`straight_through` of :math:`z + \xi`, where :math:`z` is ``logits`` and :math:`\xi` is
    ``noise``. With :math:`\xi` i.i.d. standard Gumbel (see :func:`sample_gumbel`) the forward value has expectation
    :math:`\mathrm{softmax}(z)`. The noise is an argument, so this function is pure.

    Args:
        logits: Shape ``(*batch, vocab)``.
        tau: Temperature of the gradient, positive.
        noise: Standard Gumbel sample, same shape.

    Returns:
        One-hot vectors, differentiable in ``logits``.

    Example:
        >>> gumbel_softmax(torch.tensor([0.0, 1.0]), 1.0, torch.tensor([3.0, 0.0]))
        tensor([1., 0.])

    References:
        Jang et al., 2017, https://arxiv.org/abs/1611.01144, Sec. 2.2; Maddison et al., 2017,
        https://arxiv.org/abs/1611.00712.
    """
    return straight_through(logits + noise, tau)


def sample_gumbel(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Standard Gumbel noise :math:`\xi = -\log E`, :math:`E \sim \mathrm{Exp}(1)`, always finite.

    It is drawn on the generator's own device and then moved, so a CPU generator gives the same noise whatever
    ``device`` is.

    Args:
        shape: Shape of the sample.
        generator: Source of randomness; torch's global one if None.
        device: Where the sample goes; the generator's device if None.
        dtype: A floating dtype.

    Returns:
        The sample.

    Example:
        >>> noise = sample_gumbel((1000, 100), torch.Generator().manual_seed(0))
        >>> round(noise.mean().item(), 2)  # Euler's constant is 0.577
        0.58
    """
    source = generator.device if generator is not None else device
    exponential = torch.empty(tuple(shape), dtype=dtype, device=source).exponential_(generator=generator)
    return exponential.clamp_(min=torch.finfo(dtype).tiny).log_().neg_().to(device if device is not None else source)


def straight_through_vjp(
    logits: Float[Tensor, "*batch vocab"],
    grad: Float[Tensor, "*batch vocab"],
    tau: float = 1.0,
    *,
    likeliest: Int[Tensor, "*batch"] | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "*batch vocab"]:
    r"""What reaches the logits of a gradient at the relaxed token: the vector-Jacobian product of the softmax.

    .. math:: \partial L / \partial z = p \odot (g - p^\top g) / \tau, \qquad p = \mathrm{softmax}(z / \tau)

    where :math:`z` is ``logits``, :math:`g = \partial L / \partial y` is ``grad`` and :math:`\tau` is ``tau``. It
    holds for :func:`straight_through` and :func:`soft` at :math:`z`, and for :func:`gumbel_softmax` at :math:`z +
    \xi`. Cheaper in memory than autograd: two temporaries of the size of ``logits``.

    Args:
        logits: Shape ``(*batch, vocab)``.
        grad: Same shape.
        tau: Temperature, positive.
        likeliest: The largest entry of each row of ``logits``, where it is known. Its gradient is taken off first, so
            that the sum is over the other tokens alone and keeps its digits (and its sign, which is all that Adam's
            first step reads) where this one has nearly all the probability.
        out: Two tensors like ``logits`` to work in; the second is the result. Fresh ones if None. A loop that hands
            in the same pair saves the operating system's work on new memory.

    Returns:
        The gradient with respect to ``logits``; it sums to zero over the vocabulary.

    Example:
        >>> straight_through_vjp(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor([-0.1050,  0.1050])

    References:
        https://arxiv.org/abs/2603.04948, Eq. 25.
    """
    # What is subtracted goes before the product: gradients often share a large offset, which would cost digits.
    offset = 0.0 if likeliest is None else grad.gather(-1, likeliest.unsqueeze(-1))
    if out is None:
        probs = soft(logits, tau)
        centred = grad - offset
        centred = centred - (probs * centred).sum(dim=-1, keepdim=True)
        return probs * centred / tau
    _check_tau(tau)
    probs = torch.softmax(logits if tau == 1.0 else torch.div(logits, tau, out=out[1]), dim=-1, out=out[0])
    centred = torch.sub(grad, offset, out=out[1])
    centred.sub_((probs * centred).sum(dim=-1, keepdim=True)).mul_(probs)
    return centred if tau == 1.0 else centred.div_(tau)


def _check_tau(tau: float) -> None:
    if not 0.0 < tau < float("inf"):
        raise ValueError(f"`tau` must be positive and finite, got {tau}.")


class Relaxation(NamedTuple):
    """How logits stand for tokens. All have one gradient, `straight_through_vjp`, and differ in the forward value."""

    forward: Callable[[Tensor, float], Tensor]
    """Token probabilities from (logits plus noise, tau)."""
    noisy: bool
    """Whether Gumbel noise is added to the logits."""
    hard: bool
    """Whether the forward value is one-hot, so that it changes only when an argmax flips."""


RELAXATIONS = {
    "straight_through": Relaxation(lambda logits, tau: one_hot_argmax(logits), noisy=False, hard=True),
    "gumbel_softmax": Relaxation(lambda logits, tau: one_hot_argmax(logits), noisy=True, hard=True),
    "softmax": Relaxation(soft, noisy=False, hard=False),
}
