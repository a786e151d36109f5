"""Log-probabilities of categorical laws: picked, summed, truncated, sampled. Float32 or better throughout."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def upcast(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor in float32, or as it is if it has float32 or float64 already.

    Example:
        >>> upcast(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def selective_log_softmax(
    logits: Float[Tensor, "*batch vocab"], index: Int[Tensor, "*batch"] | Int[Tensor, "*batch support"]
) -> Float[Tensor, "*shape"]:
    r"""Log-probabilities of some tokens without the log-probabilities of all: :math:`z_v - \log \sum_w e^{z_w}`.

    :math:`z` is ``logits`` and :math:`v` runs over ``index``.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, vocab)``.
        index: Token ids, one per row, shape ``(*batch,)``, or several, shape ``(*batch, support)``.

    Returns:
        Float32 (float64 for float64 logits), in the shape of ``index``.

    Example:
        >>> selective_log_softmax(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp()
        tensor([0.5000])
        >>> selective_log_softmax(torch.tensor([[0.0, 0.0]]), torch.tensor([[1, 0]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    logits = upcast(logits)
    single = index.dim() == logits.dim() - 1
    picked = logits.gather(-1, index.unsqueeze(-1) if single else index) - logits.logsumexp(dim=-1, keepdim=True)
    return picked.squeeze(-1) if single else picked


class _LogSoftmax(torch.autograd.Function):
    """log_softmax over the last axis, whose backward takes a sparse gradient (of `pick`) as well as a dense one."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probs)
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        (grad,), (log_probs,) = grads, ctx.saved_tensors
        if not grad.is_sparse:
            return grad - log_probs.exp().mul_(grad.sum(dim=-1, keepdim=True))
        index, values = grad._indices(), grad._values()
        weight = log_probs.new_zeros(log_probs.shape[:-1]).index_put_(tuple(index[:-1]), values, accumulate=True)
        change = log_probs.exp().mul_(weight.neg_().unsqueeze(-1))
        return change.index_put_(tuple(index), values, accumulate=True)


def log_softmax(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities of all tokens, in float32 or better; once differentiable.

    Args:
        logits: Unnormalised log-probabilities.

    Returns:
        The same shape. What :func:`pick` takes of it is differentiated without a dense gradient.

    Example:
        >>> log_softmax(torch.tensor([0.0, 0.0])).exp()
        tensor([0.5000, 0.5000])
    """
    return _LogSoftmax.apply(upcast(logits))  # pyright: ignore


def pick(log_probs: Float[Tensor, "*batch vocab"], index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The log-probability of one token of each row: a gather.

    Args:
        log_probs: Of all tokens, shape ``(*batch, vocab)``.
        index: Token ids.

    Returns:
        Shape ``(*batch,)``.

    Example:
        >>> pick(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
        tensor([-2.])
    """
    sparse = type(log_probs.grad_fn) is _LogSoftmax._backward_cls  # pyright: ignore
    return log_probs.gather(-1, index.unsqueeze(-1), sparse_grad=sparse).squeeze(-1)


def sequence_logps(
    per_token_logps: Float[Tensor, "*batch length"], mask: Bool[Tensor, "*batch length"]
) -> Float[Tensor, "*batch"]:
    r"""Log-probability of each sequence: :math:`\sum_i m_i \log \pi(y_i \mid x, y_{<i})`.

    The summands are ``per_token_logps`` and :math:`m` is ``mask``; what stands where the mask is False, NaN included,
    has no effect.

    Args:
        per_token_logps: Shape ``(*batch, length)``.
        mask: True at the tokens that count, same shape.

    Returns:
        Shape ``(*batch,)``, float32 or float64.

    Example:
        >>> sequence_logps(torch.tensor([[-1.0, -2.0, float("nan")]]), torch.tensor([[True, True, False]]))
        tensor([-3.])
    """
    return upcast(per_token_logps).masked_fill(~mask, 0.0).sum(dim=-1)


def compute_entropy(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    r"""Entropy in nats of :math:`p = \mathrm{softmax}(z)`: :math:`-\sum_v p_v \log p_v`, with :math:`0 \log 0 = 0`.

    :math:`z` is ``logits``; its entries may be :math:`-\infty`.

    Args:
        logits: Shape ``(*batch, vocab)``.

    Returns:
        Shape ``(*batch,)``, float32 or float64.

    Example:
        >>> compute_entropy(torch.tensor([0.0, 0.0, float("-inf")]))  # log 2
        tensor(0.6931)
    """
    log_probs = torch.log_softmax(upcast(logits), dim=-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0.0)).sum(dim=-1)


def top_p_filter(logits: Float[Tensor, "*batch vocab"], top_p: float) -> Float[Tensor, "*batch vocab"]:
    r"""Keep the nucleus: the smallest set of likeliest tokens whose mass is at least ``top_p``.

    The rest get :math:`-\infty`. The likeliest token is always kept. Among equally likely tokens the lower id comes
    first.

    Args:
        logits: Shape ``(*batch, vocab)``.
        top_p: Mass to keep, in (0, 1]. At 1 the logits are returned as they are.

    Returns:
        Logits of the same shape and dtype.

    Raises:
        ValueError: If ``top_p`` is outside (0, 1].

    Example:
        >>> top_p_filter(torch.tensor([0.5, 0.3, 0.2]).log(), 0.7).exp()
        tensor([0.5000, 0.3000, 0.0000])

    References:
        Holtzman et al., 2020, https://arxiv.org/abs/1904.09751, Eq. 2.
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}. Use 1.0 to keep every token.")
    if top_p == 1.0:
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probs = torch.softmax(logits.gather(-1, order).double(), dim=-1)
    drop_sorted = (probs.cumsum(dim=-1) - probs) >= top_p  # mass before the token: exactly 0 for the best
    drop = torch.zeros_like(drop_sorted).scatter_(-1, order, drop_sorted)
    return logits.masked_fill(drop, float("-inf"))


def categorical_from_uniform(
    logits: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]
) -> Int[Tensor, "*batch"]:
    r"""Sample tokens by inverting the distribution function: the first :math:`v` with :math:`\sum_{w \le v} p_w > u`.

    :math:`p = \mathrm{softmax}` of ``logits`` and :math:`u` is ``uniform``. Given its uniform, a row's token does not
    depend on the rest of the batch. The sums are in float64 (float32 sums of a vocabulary of 150 000 lose the tail),
    and a token of probability 0 is never returned, whatever the rounding.

    Args:
        logits: Shape ``(*batch, vocab)``, entries may be :math:`-\infty`.
        uniform: One number in [0, 1) per row, shape ``(*batch,)``.

    Returns:
        Token ids, int64, shape ``(*batch,)``.

    Raises:
        ValueError: If a row has a NaN, a :math:`+\infty` or nothing but :math:`-\infty`.

    Example:
        >>> logits = torch.tensor([[0.25, 0.0, 0.75]]).log().expand(3, 3)
        >>> categorical_from_uniform(logits, torch.tensor([0.0, 0.24, 0.26]))
        tensor([0, 0, 2])
    """
    probs = torch.softmax(logits.double(), dim=-1)
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[..., -1:]
    if not bool(torch.isfinite(total).all()):
        raise ValueError("`logits` must give every row a distribution, got a row with NaN, +inf or only -inf.")
    index = torch.searchsorted(cumulative, uniform.double().unsqueeze(-1) * total, right=True)
    # Rounding may point just past the last possible token, or, with parallel sums, at an impossible one: step back.
    possible = probs > 0
    positions = torch.arange(probs.shape[-1], device=probs.device).expand_as(probs)
    first = possible.to(torch.uint8).argmax(dim=-1, keepdim=True)
    nearest = torch.where(possible, positions, first).cummax(dim=-1).values
    return nearest.gather(-1, index.clamp_(max=probs.shape[-1] - 1)).squeeze(-1)
