"""What a set of decoded problems is worth, and how surely. Metrics accumulate; the formulas are pure functions."""

from nabla_rl.metrics.majority import MajorityAtK, majority_at_k, majority_index
from nabla_rl.metrics.mean import Mean, MeanWithError
from nabla_rl.metrics.pass_at_k import PassAtK, pass_at_k
from nabla_rl.metrics.proportion import Interval, Proportion, wilson_interval

__all__ = [
    "Interval",
    "MajorityAtK",
    "Mean",
    "MeanWithError",
    "PassAtK",
    "Proportion",
    "majority_at_k",
    "majority_index",
    "pass_at_k",
    "wilson_interval",
]
