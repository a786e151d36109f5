"""The energy and the three pieces of its gradient, against finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nabla_rl.functional import IMPOSSIBLE_LOGP, compute_energy, energy_gradient, expected_logps, one_hot_argmax
from tests.toys import EnumerablePolicy, EnumerableReward, ToyPolicy, ToyReward, gibbs_logps

BATCH, LENGTH, VOCAB, BETA = 2, 4, 5, 0.3
ROWS = torch.arange(BATCH)
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def token_points() -> dict[str, Tensor]:
    logits = torch.randn(BATCH, LENGTH, VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {"soft": torch.softmax(logits, dim=-1), "hard": one_hot_argmax(logits)}


def central_differences(function: Callable[[Tensor], Tensor], point: Tensor, h: float = 1e-5) -> Tensor:
    """Gradient of a scalar function, coordinate by coordinate."""
    gradient = torch.zeros_like(point)
    for index in itertools.product(*map(range, point.shape)):
        step = torch.zeros_like(point)
        step[index] = h
        gradient[index] = (function(point + step) - function(point - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize("point", ["soft", "hard"])
@pytest.mark.parametrize("piece", ["prefix", "postfix", "reward", "all"])
def test_each_piece_is_the_derivative_of_its_own_part(point: str, piece: str) -> None:
    """Each piece, and their sum, equals central differences of the energy with the other dependences frozen."""
    policy, reward = ToyPolicy(VOCAB, rows=BATCH), ToyReward(MASK, VOCAB)
    y0 = token_points()[point]

    def likelihood(factor: Tensor, conditioning: Tensor) -> Tensor:
        return ((factor * policy(conditioning, ROWS)).sum(-1) * MASK).sum()

    parts = {
        "prefix": lambda y: -likelihood(y, y0),
        "postfix": lambda y: -likelihood(y0, y),
        "reward": lambda y: -reward(y, ROWS).sum() / BETA,
        "all": lambda y: -likelihood(y, y) - reward(y, ROWS).sum() / BETA,
    }
    flags = {name: piece in (name, "all") for name in ("prefix", "postfix", "reward")}
    result = energy_gradient(y0, MASK, ROWS, policy, reward, beta=BETA, **flags)
    assert result.gradient is not None
    expected = central_differences(parts[piece], y0).masked_fill(~MASK[..., None], 0.0)
    assert expected.abs().max() > 0.1  # there is something to compare
    torch.testing.assert_close(result.gradient, expected, rtol=1e-7, atol=1e-8)


def test_pieces_add_up_and_leave_the_energy_alone() -> None:
    """The three pieces sum to the whole gradient, and no switch changes energy, reward or log-probability."""
    policy, reward, y = ToyPolicy(VOCAB, rows=BATCH), ToyReward(MASK, VOCAB), token_points()["hard"]
    results = {}
    for flags in itertools.product([True, False], repeat=3):
        switches = dict(zip(("prefix", "postfix", "reward"), flags, strict=True))
        results[flags] = energy_gradient(y, MASK, ROWS, policy, reward, beta=BETA, **switches)
    whole = results[True, True, True]
    single = [results[f].gradient for f in ((True, False, False), (False, True, False), (False, False, True))]
    torch.testing.assert_close(sum(g for g in single if g is not None), whole.gradient, rtol=0, atol=1e-12)
    assert torch.equal(results[False, False, False].gradient, torch.zeros_like(y))
    for result in results.values():
        assert torch.equal(result.energy, whole.energy)


def test_prefix_piece_is_minus_log_policy() -> None:
    """delta_prefix at a valid position is -log pi(. | x, y_<l), the log-probabilities themselves; 0 at padding."""
    policy, y = ToyPolicy(VOCAB, rows=BATCH), token_points()["hard"]
    result = energy_gradient(y, MASK, ROWS, policy, None, beta=1.0, postfix=False)
    assert torch.equal(result.gradient, -policy(y, ROWS) * MASK[..., None])


def test_postfix_piece_of_the_last_token_is_zero() -> None:
    """The last valid token has no later token to act on: its postfix piece is exactly 0, the first one's is not."""
    policy, y = ToyPolicy(VOCAB, rows=BATCH), token_points()["hard"]
    gradient = energy_gradient(y, MASK, ROWS, policy, None, beta=1.0, prefix=False).gradient
    assert gradient is not None
    assert gradient[0, 3].abs().max() == 0 and gradient[1, 1].abs().max() == 0
    assert gradient[:, 0].abs().amax(-1).min() > 0.01


def test_expected_logps_gradcheck() -> None:
    """Autograd through the policy and through the dot product agrees with finite differences in float64."""
    policy = ToyPolicy(VOCAB, rows=BATCH)
    point = token_points()["soft"].requires_grad_()
    assert torch.autograd.gradcheck(lambda y: expected_logps(y, policy(y, ROWS), MASK), (point,))


def test_switched_off_models_are_called_without_gradients() -> None:
    """Without the postfix piece the policy runs without a graph, and without the reward piece the reward does."""
    policy, reward, y = ToyPolicy(VOCAB, rows=BATCH), ToyReward(MASK, VOCAB), token_points()["hard"]
    seen = {}

    def log_probs_fn(tokens, rows: Tensor) -> Tensor:
        token_probs = tokens.probs
        seen["policy"] = torch.is_grad_enabled()
        return policy(token_probs, rows)

    def reward_fn(tokens, rows: Tensor) -> Tensor:
        token_probs = tokens.probs
        seen["reward"] = torch.is_grad_enabled()
        return reward(token_probs, rows)

    energy_gradient(y, MASK, ROWS, log_probs_fn, reward_fn, beta=BETA)
    assert seen == {"policy": True, "reward": True}
    energy_gradient(y, MASK, ROWS, log_probs_fn, reward_fn, beta=BETA, postfix=False, reward=False)
    assert seen == {"policy": False, "reward": False}
    result = energy_gradient(y, MASK, ROWS, log_probs_fn, reward_fn, beta=BETA, record=False)
    assert seen == {"policy": False, "reward": False} and result.gradient is None
    energy_gradient(y, MASK, ROWS, log_probs_fn, reward_fn, beta=math.inf)
    assert seen == {"policy": True, "reward": False}


def test_padding_gets_no_gradient() -> None:
    """The gradient at padding is exactly 0, even under a reward that looks there."""
    policy, y = ToyPolicy(VOCAB, rows=BATCH), token_points()["soft"]
    result = energy_gradient(y, MASK, ROWS, policy, lambda t, rows: t.probs.square().sum((1, 2)), beta=BETA)
    assert result.gradient is not None
    assert result.gradient[~MASK].abs().max() == 0 and result.gradient[MASK].abs().min() > 0


def test_energy_is_minus_log_of_the_gibbs_law() -> None:
    """On nine listed completions, -L(y) - log Z is the log-law of the tilted policy, from one-hot tokens."""
    policy, reward = EnumerablePolicy(), EnumerableReward()
    y = torch.nn.functional.one_hot(policy.sequences, 3).double()
    rows, mask = torch.arange(9), torch.ones(9, 2, dtype=torch.bool)
    result = energy_gradient(y, mask, rows, policy, reward, beta=BETA)
    law, log_partition = gibbs_logps(policy.logps(), reward.rewards(), BETA)
    torch.testing.assert_close(result.logps, policy.logps(), rtol=0, atol=1e-12)
    torch.testing.assert_close(-result.energy - log_partition, law, rtol=0, atol=1e-12)


def test_infinite_beta_leaves_the_reward_out() -> None:
    """At beta = inf the energy is minus the log-probability, even if the reward is NaN or infinite."""
    logps = torch.tensor([-1.0, -2.0])
    assert torch.equal(compute_energy(logps, torch.tensor([math.nan, math.inf]), math.inf), -logps)
    assert torch.equal(compute_energy(logps, None, 0.1), -logps)
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`beta` must be positive"):
            compute_energy(logps, logps, beta)


def test_impossible_tokens_make_no_nan() -> None:
    """0 * -inf counts as 0 with a finite gradient against the token; a chosen impossible token gives -inf."""
    log_probs = torch.tensor([[[0.0, -math.inf], [math.nan, -math.inf]]], requires_grad=True)
    y, mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True), torch.tensor([[True, False]])
    value = expected_logps(y, log_probs, mask)
    gradients = torch.autograd.grad(value.sum(), (y, log_probs))
    assert value.item() == 0.0
    assert gradients[0].tolist() == [[[0.0, IMPOSSIBLE_LOGP], [0.0, 0.0]]]
    assert bool(gradients[1].isfinite().all())
    assert expected_logps(y.flip(-1), log_probs, mask).item() == -math.inf


def test_half_precision_is_summed_in_float32() -> None:
    """bfloat16 log-probabilities are added up in float32, where bfloat16 would stop growing."""
    log_probs = torch.full((1, 2000, 1), -1.0, dtype=torch.bfloat16)
    value = expected_logps(torch.ones_like(log_probs), log_probs, torch.ones(1, 2000, dtype=torch.bool))
    assert value.dtype == torch.float32 and value.item() == -2000.0


def test_wrong_callables_are_named() -> None:
    """A result of the wrong shape, or a reward without a gradient, is refused with the name of the callable."""
    policy, reward, y = ToyPolicy(VOCAB, rows=BATCH), ToyReward(MASK, VOCAB), token_points()["hard"]
    with pytest.raises(ValueError, match=r"`log_probs_fn` must return shape \(2, 4, 5\), got \(2, 3, 5\)"):
        energy_gradient(y, MASK, ROWS, lambda t, r: policy(t, r)[:, 1:], reward, beta=BETA)
    with pytest.raises(ValueError, match=r"`reward_fn` must return shape \(2,\), got \(2, 1\)"):
        energy_gradient(y, MASK, ROWS, policy, lambda t, r: reward(t, r)[:, None], beta=BETA)
    with pytest.raises(ValueError, match="`reward_fn` must be differentiable"):
        energy_gradient(y, MASK, ROWS, policy, lambda t, r: reward(t.probs.detach(), r), beta=BETA)
