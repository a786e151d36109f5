from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from nabla_rl.metrics import (
    MajorityAtK,
    MeanWithError,
    PassAtK,
    Proportion,
    majority_at_k,
    majority_index,
    pass_at_k,
    wilson_interval,
)

Z = 1.959963984540054


# Wilson interval


@pytest.mark.parametrize(("successes", "total"), [(1, 3), (8, 10), (37, 200), (999, 1000)])
def test_wilson_ends_lie_exactly_z_standard_errors_from_the_observed_proportion(successes, total):
    for end in wilson_interval(successes, total):
        distance = abs(successes / total - end) / math.sqrt(end * (1 - end) / total)
        assert distance == pytest.approx(Z, rel=1e-9)


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_interval_holds_the_observed_proportion_and_mirrors(successes, extra):
    total = successes + extra
    low, high = wilson_interval(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    mirrored = wilson_interval(total - successes, total)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


def test_wilson_at_the_edges():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    # At zero successes the upper root is z² / (n + z²).
    assert wilson_interval(0, 10) == (0.0, pytest.approx(Z**2 / (10 + Z**2)))
    assert wilson_interval(10, 10)[1] == 1.0


def test_wilson_covers_as_promised():
    """Exact coverage, by summing the binomial law: 95% on average over p, though only roughly so at each p."""
    total = 30
    coverages = []
    for p in [i / 50 for i in range(5, 46)]:
        covered = [
            math.comb(total, c) * p**c * (1 - p) ** (total - c)
            for c in range(total + 1)
            if wilson_interval(c, total)[0] <= p <= wilson_interval(c, total)[1]
        ]
        coverages.append(sum(covered))
    assert statistics.mean(coverages) == pytest.approx(0.95, abs=0.01)
    assert min(coverages) > 0.92


@pytest.mark.parametrize(("successes", "total"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes, total):
    with pytest.raises(ValueError, match="`successes`"):
        wilson_interval(successes, total)


def test_proportion_metric_is_the_function():
    metric = Proportion()
    metric.update(torch.tensor([True, False, True]))
    metric.update(torch.tensor([[1, 1], [0, 1]]))
    value, low, high = metric.compute()
    assert value.item() == pytest.approx(5 / 7)
    assert (low.item(), high.item()) == pytest.approx(wilson_interval(5, 7))
    with pytest.raises(ValueError, match="zeros and ones"):
        metric.update(torch.tensor([0.5]))


# pass@k


def naive_pass_at_k(num_correct: int, num_generations: int, k: int) -> float:
    """Over all subsets of k answers: the share that holds a right one."""
    answers = [True] * num_correct + [False] * (num_generations - num_correct)
    subsets = list(itertools.combinations(answers, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("num_generations", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(num_generations):
    counts = torch.arange(num_generations + 1)
    for k in range(1, num_generations + 1):
        got = pass_at_k(counts, torch.full_like(counts, num_generations), k=k)
        want = [naive_pass_at_k(int(c), num_generations, k) for c in counts]
        assert got.tolist() == pytest.approx(want, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """E over c ~ Binomial(n, p) equals 1 - (1 - p)^k, summed exactly."""
    n, p, k = 9, 0.3, 4
    counts = torch.arange(n + 1)
    law = torch.tensor([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)], dtype=torch.float64)
    estimate = (law * pass_at_k(counts, torch.full_like(counts, n), k=k)).sum().item()
    assert estimate == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_does_not_overflow():
    got = pass_at_k(torch.tensor([1]), torch.tensor([100_000]), k=10_000)
    assert got.item() == pytest.approx(0.1, rel=1e-9)


def test_pass_at_k_metric_averages_over_problems_of_different_sizes():
    metric = PassAtK(k=2)
    metric.update(torch.tensor([1, 0]), torch.tensor([4, 2]))
    metric.update(torch.tensor([3]), torch.tensor([6]))
    want = statistics.mean([naive_pass_at_k(1, 4, 2), 0.0, naive_pass_at_k(3, 6, 2)])
    assert metric.compute().item() == pytest.approx(want)


def test_pass_at_k_refuses_too_few_answers_and_impossible_counts():
    with pytest.raises(ValueError, match="`num_generations` must be at least k=3, got 2"):
        pass_at_k(torch.tensor([1]), torch.tensor([2]), k=3)
    with pytest.raises(ValueError, match="`num_correct`"):
        pass_at_k(torch.tensor([3]), torch.tensor([2]), k=1)
    with pytest.raises(ValueError, match="`k`"):
        PassAtK(k=0)


# maj@k


def naive_majority(answers: list[str | None]) -> str | None:
    best = None
    for answer in answers:
        if answer is not None and (best is None or answers.count(answer) > answers.count(best)):
            best = answer
    return best


@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=9))
def test_majority_index_is_the_first_place_of_the_naive_winner(answers):
    index = majority_index(answers)
    winner = naive_majority(answers)
    assert index == (None if winner is None else answers.index(winner))


@pytest.mark.parametrize(
    ("answers", "correct", "k", "want"),
    [
        (["7", "12", "12"], [True, False, False], None, False),
        (["7", "12", "12"], [True, False, False], 2, True),  # a tie: the first occurrence wins
        (["12", "7", "7", "12"], [False, True, True, False], None, False),
        ([None, None, "7"], [False, False, True], None, True),  # completions without an answer have no vote
        ([None, None], [False, False], None, False),
        (["7"], [True], 1, True),
    ],
)
def test_majority_at_k(answers, correct, k, want):
    assert majority_at_k(answers, correct, k=k) is want


def test_majority_at_k_refuses_wrong_lengths():
    with pytest.raises(ValueError, match="`k` must lie between 1 and the number of answers"):
        majority_at_k(["7"], [True], k=2)
    with pytest.raises(ValueError, match="`correct`"):
        majority_at_k(["7"], [True, False])
    with pytest.raises(ValueError):
        MajorityAtK(k=1).update([["7"]], [])


def test_majority_metric_is_the_share_of_problems():
    metric = MajorityAtK(k=3)
    metric.update([["1", "1", "2"], ["1", "2", "2"]], [[True, True, False], [True, False, False]])
    metric.update([[None, "3", None]], [[False, True, False]])
    assert metric.compute().item() == pytest.approx(2 / 3)


# mean with error


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.long])
def test_mean_with_error_matches_the_statistics_module(dtype):
    values = torch.tensor([1, 2, 4, 8, 16]).to(dtype)
    metric = MeanWithError()
    metric.update(values[:2])
    metric.update(values[2:].view(3, 1))
    mean, error, count = metric.compute()
    numbers = values.double().tolist()
    assert mean.dtype == torch.float64
    assert mean.item() == pytest.approx(statistics.mean(numbers))
    assert error.item() == pytest.approx(statistics.stdev(numbers) / math.sqrt(5))
    assert count.item() == 5


def test_equal_values_have_no_error_and_a_single_value_an_unknown_one():
    metric = MeanWithError()
    metric.update(torch.full((7,), 0.1))
    assert metric.compute().error.item() == pytest.approx(0.0, abs=1e-8)
    metric.reset()
    metric.update(torch.tensor(3.0))
    assert metric.compute().value.item() == 3.0
    assert math.isnan(metric.compute().error.item())


# every metric

UPDATES = {
    Proportion: [(torch.tensor([1, 0, 1]),), (torch.tensor([0]),), (torch.tensor([1, 1]),)],
    PassAtK: [(torch.tensor([c]), torch.tensor([n])) for c, n in [(0, 3), (1, 2), (2, 9)]],
    MajorityAtK: [([["1", "2", "1"]], [[True, False, True]]), ([["2"]], [[False]]), ([[None]], [[False]])],
    MeanWithError: [(torch.tensor([1.0, 2.0]),), (torch.tensor([3.5]),), (torch.tensor([-1.0, 0.25, 9.0]),)],
}


def build(kind: type[Metric]) -> Metric:
    return PassAtK(k=2) if kind is PassAtK else kind()


@pytest.mark.parametrize("kind", UPDATES, ids=lambda kind: kind.__name__)
def test_merged_states_equal_one_pass(kind):
    """Two metrics that saw a part each, merged, are the metric that saw everything: what several processes come to."""
    whole, left, right = build(kind), build(kind), build(kind)
    for update in UPDATES[kind]:
        whole.update(*update)
    left.update(*UPDATES[kind][0])
    for update in UPDATES[kind][1:]:
        right.update(*update)
    left.merge_state(right)
    torch.testing.assert_close(left.compute(), whole.compute(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", UPDATES, ids=lambda kind: kind.__name__)
def test_counts_are_integers_and_sums_float64(kind):
    metric = build(kind)
    for update in UPDATES[kind]:
        metric.update(*update)
    assert {state.dtype for state in metric.metric_state.values()} <= {torch.int64, torch.float64}


@pytest.mark.parametrize("kind", UPDATES, ids=lambda kind: kind.__name__)
def test_forward_returns_the_batch_value_and_accumulates(kind):
    metric, alone = build(kind), build(kind)
    metric(*UPDATES[kind][0])
    alone.update(*UPDATES[kind][1])
    batch_value = metric(*UPDATES[kind][1])
    torch.testing.assert_close(batch_value, alone.compute(), rtol=1e-12, atol=0, equal_nan=True)
    alone.update(*UPDATES[kind][0])
    torch.testing.assert_close(metric.compute(), alone.compute(), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("kind", UPDATES, ids=lambda kind: kind.__name__)
def test_nothing_seen_is_nan(kind):
    result = build(kind).compute()
    value = result if isinstance(result, torch.Tensor) else result.value
    assert math.isnan(value.item())
